"""Runs an adapter in another environment's Python, and ends with the process that asked for it.

    python start.py LIFE ADAPTER

LIFE is the number of a pipe's reading end.  Its other end is the asking process's alone, which never writes: reading
returns only when that process has ended, in whatever way, and then this whole group of processes is killed, workers and
downloads too.  Standard library of Python 3.7 and no more: what is installed here is another project's.
"""

import os
import runpy
import signal
import sys
import threading


def watch(life: int) -> None:
    """Wait for the other end to close."""
    os.read(life, 1)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    pipe, adapter = int(sys.argv[1]), os.path.abspath(sys.argv[2])
    threading.Thread(target=watch, args=(pipe,), daemon=True).start()
    sys.argv = [adapter]
    sys.path[0] = os.path.dirname(adapter)  # as if it had been started itself
    runpy.run_path(adapter, run_name="__main__")
