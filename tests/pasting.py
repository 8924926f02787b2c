"""Runs a notebook once, for two promises: it runs from top to bottom, and what a reader sees runs when pasted.

Cells that a reader sees have names and an empty folder of their own, as a script of them would. The other cells find
the names of those, too; they stand in the notebook's folder, and in the module that it writes. What is exported is
there already, since `make test` has compared the module with the notebook.
"""
import ast
import json
import os
import re
import sys
from importlib import import_module
from symtable import symtable
from types import ModuleType

from execnb.shell import CaptureShell
from nbdev.config import get_config
from nbdev.test import nb_test_cells

FENCE = re.compile(r'^```(\w+)\n(.*?)^```', re.M | re.S)
EXPORTED = re.compile(r'^#\|\s*exporti?s?\b', re.M)
# cells that no reader sees, that are folded, or that show the library's own source
UNSEEN = re.compile(r'^(?:#\|\s*(?:hide|exporti?s?|default_exp|echo:\s*false|code-fold:\s*true|include:\s*false)\b|'
                    r'show_doc\()', re.M)


def fences(markdown, languages):
    return [code for language, code in FENCE.findall(markdown) if language in languages]


def foreign(code, names):
    "Which of these names the code reads without having made them."
    made = {s.get_name() for s in symtable(code, '', 'exec').get_symbols() if s.is_local()}
    read = {n.id for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    return read & names - made


class Side:
    "A module whose names cells have, and the folder that they stand in."

    def __init__(self, shell, module, folder):
        self.shell, self.module, self.folder, self.names = shell, module, folder, vars(module)
        self.update(shell.user_ns)

    def update(self, names): self.names |= {name: value for name, value in names.items() if name[:2] != '__'}

    def run(self, code):
        os.chdir(self.folder)
        self.shell.user_module, self.shell.user_ns = self.module, self.names
        self.shell.run(code)
        self.folder = os.getcwd()
        if self.shell.exc: raise self.shell.exc from None


def run_notebook(path, folder, pasted):
    "In a process of its own; in the first folder what nobody sees, in the other what a reader would paste."
    tested = {cell.id for cell in nb_test_cells(path, skip_flags=get_config(path).tst_flags.split())}
    cells = [(cell, ''.join(cell['source'])) for cell in json.loads(path.read_text(encoding='utf-8'))['cells']
             if cell['cell_type'] == 'markdown' or cell['id'] in tested]
    exports = re.search(r'^#\|\s*default_exp (\S+)', '\n'.join(text for _, text in cells), re.M)
    shell, page = CaptureShell(path), ModuleType('__main__')
    of_the_shell = {'display': None, **shell.user_ns}
    del of_the_shell['open']  # which a script has, too
    module = import_module(f'largest_margins.{exports[1]}') if exports else ModuleType('hidden')
    seen, unseen, known = Side(shell, page, pasted), Side(shell, module, folder), dict(of_the_shell)
    sys.modules['__main__'] = page
    for cell, text in cells:
        if cell['cell_type'] == 'code' and EXPORTED.search(text): continue
        if cell['cell_type'] == 'code' and UNSEEN.search(text):
            unseen.run(text)
            continue
        for code in fences(text, {'python', 'py'}) if cell['cell_type'] == 'markdown' else [text]:
            strange = foreign(code, {name for name, value in of_the_shell.items() if known[name] is value})
            if strange: raise NameError(f'only a notebook knows {strange}')
            seen.run(code)
            new = {name: value for name, value in seen.names.items() if name not in known or known[name] is not value}
            unseen.update(new)
            known |= new
