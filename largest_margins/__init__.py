"""Learning towards the largest margins: `import largest_margins as lm` gives every name that __init__.pyi lists.

Each is loaded on first use (PEP 562), so that the import itself takes no time and no torch."""
__version__ = "0.1.0"


def _homes():
    "Where each name lives, read from the list that type checkers read."
    import ast
    with open(__file__ + 'i', encoding='utf-8') as stub: tree = ast.parse(stub.read())
    return {name.asname: node.module for node in tree.body if isinstance(node, ast.ImportFrom) for name in node.names}


def __getattr__(name):
    from importlib import import_module
    homes = {} if name.startswith('_') else _homes()
    if name not in homes: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return globals().setdefault(name, getattr(import_module(f'{__name__}.{homes[name]}'), name))


def __dir__(): return sorted({*globals(), *_homes()})
