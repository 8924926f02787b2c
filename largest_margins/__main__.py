"`python -m largest_margins` is the command `largest-margins`."
import signal

before = signal.getsignal(signal.SIGINT)
if before is signal.default_int_handler:  # while it loads, Ctrl-C ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
from largest_margins.cli import main  # noqa: E402

if before is signal.default_int_handler: signal.signal(signal.SIGINT, before)

if __name__ == '__main__': main()
