"""Runs files of Python, each in a process of its own that has imported libraries and nothing else.

The libraries take seconds to load, the fork of a process that has them does not. A line on the input is a JSON list:
the file, the folder to run in and the file for what it prints; the answer is its exit status.
"""
import json
import os
import runpy
import sys
import traceback

import sklearn.datasets  # noqa: F401


def run(path, folder, printed):
    "In the child: as `python path` would."
    out = os.open(printed, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2): os.dup2(out, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(folder)
    sys.argv, sys.path[0] = [path], folder
    try:
        runpy.run_path(path, run_name='__main__')
        status = 0
    except SystemExit as e: status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr): stream.flush()
    os._exit(status)


for line in sys.stdin:
    if not (pid := os.fork()): run(*json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
