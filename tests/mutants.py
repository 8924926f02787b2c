"""Small mistakes made on purpose in the core, and whether its tests notice: `make mutants`.

    python tests/mutants.py                                  # 60 mutants of seed 0
    python tests/mutants.py --seed 1 --mutants 12 losses     # of one module

Each mutant is a copy of the package with one operator, number or condition changed. The tests of its module run against
it until the first of them fails. What survives is printed with its line: a test is missing, or nothing has changed.
"""
import argparse
import ast
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = {  # module -> the files of tests that answer for it
    'margins': ['test_margins'], 'losses': ['test_losses', 'test_fused'],
    'regularizers': ['test_regularizers', 'test_sharded'], 'engine.cosines': ['test_cosines', 'test_losses'],
    'engine.fused': ['test_fused', 'test_losses', 'test_sharded'], 'bounds': ['test_bounds'],
    'certificates': ['test_certificates', 'test_bounds']}
SWAPPED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
           ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub,
           ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.And: ast.Or, ast.Or: ast.And}
OPPOSITE = {'min': 'max', 'max': 'min', 'amin': 'amax', 'amax': 'amin', 'maximum': 'minimum', 'minimum': 'maximum',
            'any': 'all', 'all': 'any', 'floor': 'ceil', 'ceil': 'floor', 'sum': 'mean', 'argmin': 'argmax',
            'argmax': 'argmin', 'triu': 'tril', 'tril': 'triu'}


def mutated(node):
    "What may stand in the place of a part of the code; None if it stays."
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPPED:
        return ast.Compare(node.left, [SWAPPED[type(node.ops[0])]()], node.comparators)
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
        return ast.BinOp(node.left, SWAPPED[type(node.op)](), node.right)
    if isinstance(node, ast.BoolOp): return ast.BoolOp(SWAPPED[type(node.op)](), node.values)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub): return node.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, bool): return ast.Constant(not node.value)
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return ast.Constant(node.value + 1 if isinstance(node.value, int) else 2 * node.value or 1.)
    if isinstance(node, ast.Attribute) and node.attr in OPPOSITE:
        return ast.Attribute(node.value, OPPOSITE[node.attr], ast.Load())
    if isinstance(node, ast.Name) and node.id in OPPOSITE: return ast.Name(OPPOSITE[node.id])
    if isinstance(node, ast.IfExp): return ast.IfExp(node.test, node.orelse, node.body)


def executed(node):
    "The expressions below a node, but no annotations, and no text of messages."
    for name, value in ast.iter_fields(node):
        if name in ('annotation', 'returns') or isinstance(node, ast.Raise | ast.JoinedStr): continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child
                yield from executed(child)


def mutants(module):
    "Every change of a module: (line, before, after, the whole changed source)."
    source = (ROOT/'largest_margins'/f'{module.replace(".", "/")}.py').read_text(encoding='utf-8')
    lines = source.encode().splitlines(keepends=True)
    starts = [sum(map(len, lines[:n])) for n in range(len(lines))]
    for node in executed(ast.parse(source)):
        change = isinstance(node, ast.expr) and mutated(node)
        if change:
            start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
            text, new = source.encode()[start:end].decode(), ast.unparse(change)
            changed = source.encode()[:start] + f'({new})'.encode() + source.encode()[end:]
            yield node.lineno, text, new, changed.decode()


def survives(module, source, folder):
    "Whether the tests pass with a changed module; what takes more than ten minutes of the processor does not."
    shutil.copytree(ROOT/'largest_margins', folder/'largest_margins', ignore=shutil.ignore_patterns('__pycache__'))
    (folder/'largest_margins'/f'{module.replace(".", "/")}.py').write_text(source, encoding='utf-8')
    quiet = dict(OMP_NUM_THREADS='1', PYTHONDONTWRITEBYTECODE='1', PYTHONPATH=str(folder))
    limit = lambda: resource.setrlimit(resource.RLIMIT_CPU, (600, 600))  # noqa: E731
    files = [str(ROOT/'tests'/f'{name}.py') for name in TESTS[module]]
    done = subprocess.run([sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'no:cacheprovider', *files],
                          cwd=ROOT/'tests', env=os.environ | quiet, capture_output=True, preexec_fn=limit)
    return done.returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('modules', nargs='*', choices=[*TESTS, []], help='of largest_margins; all without a name')
    parser.add_argument('--mutants', type=int, default=60, help='how many, shared out evenly')
    parser.add_argument('--seed', type=int, default=0, help='which ones')
    options = parser.parse_args()
    modules, alive, total = options.modules or list(TESTS), [], 0
    for n, module in enumerate(modules):
        found = list(mutants(module))
        many = (options.mutants + len(modules) - 1 - n) // len(modules)
        for line, before, after, source in sorted(random.Random(options.seed).sample(found, min(many, len(found)))):
            with tempfile.TemporaryDirectory() as folder: lives = survives(module, source, Path(folder))
            total += 1
            print(f'{"SURVIVES" if lives else "noticed "}  {module}:{line}  {before!r} → {after!r}', flush=True)
            if lives: alive.append(line)
    print(f'{total - len(alive)} of {total} noticed')


if __name__ == '__main__': main()
