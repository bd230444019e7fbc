"""Runs commands of fastembed in forked children, so that a run costs its work and no imports.

    LD_PRELOAD=faults.so python server.py

Reads a request, a line of JSON, from stdin; forks; the child runs ``fastembed ARGV`` as the
installed command does, with engines that are small; answers with a line of JSON when the child
has ended. This process stays single-threaded, since it forks. Give it one thread per library
(OMP_NUM_THREADS=1 and so on).
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import mmap
import os
import select
import signal
import sys
import threading
import time
import traceback

import stand_ins
import torch

from fastembed import cli

RULES = 8
LEFT_THREADS = 99  # an exit status that no command has

shim = ctypes.CDLL(None)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    stand_ins.install()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), file=answers, flush=True)


def serve(requests: list[dict]) -> list[dict]:
    """Runs commands at the same time; how each ended.

    Args:
        requests: with argv; log, the file for its output; faults, rules of faults.c; clock, a seed;
            hook, a function of stand_ins to be called first, and its arguments; delay, seconds
            before it starts; signals, pairs of a moment in seconds and a signal; timeout. With
            `here` it runs in this process, which then has compiled what it needs; for commands
            that leave no thread behind.
    """
    if requests[0].get("here"):
        with contextlib.redirect_stdout(sys.stderr):
            return [{"status": cli.main(requests[0]["argv"])}]
    children = [_Child(request) for request in requests]
    return [child.ending() for child in children]


class _Child:
    """A forked child that runs one command."""

    def __init__(self, request: dict) -> None:
        self.request = request
        self._page = mmap.mmap(-1, mmap.PAGESIZE)
        self._start = time.perf_counter()
        self._process = os.fork()
        if self._process == 0:
            _be_the_command(request, self._page)
        self._descriptor = os.pidfd_open(self._process)
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLIN)

    def ends_within(self, seconds: float) -> bool:
        """Whether it has ended that long after its start; without a thread."""
        left = self._start + seconds - time.perf_counter()
        return bool(self._poll.poll(max(0.0, left * 1e3)))

    def ending(self) -> dict:
        for moment, number in self.request.get("signals", ()):
            if self.ends_within(moment):
                break
            os.kill(self._process, number)
        timed_out = not self.ends_within(self.request.get("timeout", 120.0))
        if timed_out:
            os.kill(self._process, signal.SIGABRT)  # faulthandler says where it hangs
            if not self.ends_within(time.perf_counter() - self._start + 5):
                os.kill(self._process, signal.SIGKILL)
        _, status = os.waitpid(self._process, 0)
        os.close(self._descriptor)
        counts = memoryview(self._page).cast("l")
        return {
            "status": os.waitstatus_to_exitcode(status),
            "seconds": time.perf_counter() - self._start,
            "timed_out": timed_out,
            "seen": counts[:RULES].tolist(),
            "hit": counts[RULES : 2 * RULES].tolist(),
        }


def _be_the_command(request: dict, page: mmap.mmap) -> None:
    """The child: never returns."""
    status = 1
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.enable()
        torch.set_num_threads(1)  # else two threads at once may find out that torch was forked
        if hook := request.get("hook"):
            getattr(stand_ins, hook[0])(*hook[1:])
        time.sleep(request.get("delay", 0.0))
        shim.faults_page(ctypes.byref(ctypes.c_char.from_buffer(page)))
        for rule in request.get("faults", ()):
            shim.faults_add(os.fsencode(rule))
        shim.faults_clock(ctypes.c_uint64(request.get("clock", 0)))
        try:
            status = cli.main(request["argv"])
        except SystemExit as error:
            status = error.code
        others = [t.name for t in threading.enumerate()[1:] if not t.daemon]
        if others:
            print(f"threads that outlive the command: {others}", file=sys.stderr)
            status = LEFT_THREADS
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
