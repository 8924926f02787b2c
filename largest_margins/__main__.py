"`python -m largest_margins` is the command `largest-margins`."
from largest_margins.cli import main

if __name__ == '__main__': main()
