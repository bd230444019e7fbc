"""Runs a command that does not outlive the process that asked for it, however that one ends.

    python -I -S lifeline.py PIPE LOCK COMMAND ...

PIPE is the reading end of a pipe of which only that process holds the writing end. When it dies,
by SIGKILL too, the kernel closes the pipe and everything in our process group is killed. (A
parent-death signal would reach the shell alone, not what it runs.) LOCK is a descriptor that the
command and its children keep open, so that a lock on it lasts as long as any of them.
"""

import os
import signal
import subprocess
import sys
import threading


def main() -> int:
    pipe, lock = map(int, sys.argv[1:3])
    # A polite end is for the command, which shares our group: we stay to pass on its status.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_watch, args=(pipe,), daemon=True).start()
    child = subprocess.Popen(sys.argv[3:], pass_fds=(lock,))
    status = child.wait()
    return status if status >= 0 else 128 - status


def _watch(pipe: int) -> None:
    os.read(pipe, 1)  # returns when nobody is left to write
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
