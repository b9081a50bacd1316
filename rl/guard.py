"""Runs a command until it ends, or until standard input closes: then kills its process group.

    PYTHON -P guard.py COMMAND …

Standard input is a pipe from the run that wants the command; a run that is killed closes it.
"""

import os
import signal
import subprocess
import sys
import threading


def _await_end() -> None:
    while os.read(0, 4096):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    threading.Thread(target=_await_end, daemon=True).start()
    sys.exit(abs(child.wait()))
