"""Run a module as the main program, in a process that does not outlive the one that started it.

    python tied.py MODULE ARGUMENTS

The starter holds the other end of standard input, and a thread waits for its end: with the starter,
however that dies, this process is killed. On Linux the kernel does the same, also to a process
that is stopped. Nothing else is imported: a run records what is, as its sources.
"""

import contextlib
import ctypes
import os
import runpy
import signal
import sys
import threading


def _die_with_starter() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # a worker blocks some, and this inherits
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    threading.Thread(target=_die_with_starter, daemon=True).start()
    del sys.argv[0]
    sys.path[0] = os.getcwd()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
