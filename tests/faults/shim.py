"""faults.c from Python: rules for it, and a server that runs commands under them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
MUTATING = "create,write,sync,rename,truncate,unlink,mkdir"


@dataclass(frozen=True)
class Fault:
    """What happens to some system calls on files of a folder; see faults.c.

    Attributes:
        folder: absolute, without links.
        what: count, error, short, delay, signal, kill-before, kill-after, torn.
        calls: of open, create, read, write, sync, rename, truncate, unlink, mkdir, map.
        error: a name of `errno`, or a signal's.
        first, last: which of these calls, from 1.
        probability: of each of those, decided by its number and `seed`.
    """

    folder: Path
    what: str
    calls: str = MUTATING
    error: str = "EIO"
    first: int = 1
    last: int = 1 << 40
    probability: float = 1.0
    seed: int = 0
    milliseconds: int = 0

    @property
    def reason(self) -> str:
        """The operating system's words for the error."""
        return os.strerror(getattr(errno, self.error))

    def __str__(self) -> str:
        number = int(getattr(signal if self.what == "signal" else errno, self.error))
        fields = (
            self.folder, self.what, self.calls, number, self.first, self.last,
            self.probability, self.seed, self.milliseconds,
        )  # fmt: skip
        return "\t".join(map(str, fields))


@dataclass(frozen=True)
class Ending:
    """How a command ended.

    Attributes:
        status: its exit status, or minus the signal that ended it.
        text: what it printed, on both streams.
        seen, hit: by rule, calls that it was about, and those that it struck.
    """

    status: int
    seconds: float
    text: str
    seen: tuple[int, ...]
    hit: tuple[int, ...]
    timed_out: bool


def compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def build_shim(folder: Path) -> Path:
    """faults.c as a library."""
    library = folder / "faults.so"
    source = str(HERE / "faults.c")
    command = [compiler(), "-shared", "-fPIC", "-O2", "-Wall", "-o", str(library), source, "-ldl"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


class Server:
    """A process that has everything imported and forks a child per command."""

    def __init__(self, shim: Path, folder: Path) -> None:
        self._log = folder / f"server-{time.monotonic_ns()}.log"
        one = dict.fromkeys(
            ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"
        )
        with self._log.with_suffix(".err").open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "server.py")],
                env={**os.environ, **one, "LD_PRELOAD": str(shim)},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip
        self._answer()

    def run(self, argv: list[str], *faults: Fault, **options) -> Ending:
        """Runs a command; see `server.serve` for the options."""
        return self.run_together((argv, faults, options))[0]

    def run_together(self, *commands: tuple[list[str], tuple[Fault, ...], dict]) -> list[Ending]:
        """Runs commands at the same time: (argv, faults, options) each."""
        requests = []
        for number, (argv, faults, options) in enumerate(commands):
            log = self._log.with_suffix(f".{number}.log")
            log.write_text("")
            faults = list(map(str, faults))
            requests.append({"argv": argv, "log": str(log), "faults": faults, **options})
        answers = self._ask(requests)
        return [
            Ending(
                answer["status"],
                answer["seconds"],
                Path(request["log"]).read_text(errors="replace"),
                tuple(answer["seen"]),
                tuple(answer["hit"]),
                answer["timed_out"],
            )
            for request, answer in zip(requests, answers, strict=True)
        ]

    def warm_up(self, argv: list[str]) -> None:
        """Runs a command in the server itself, so that its children find all compiled."""
        if self._ask([{"argv": argv, "here": True}])[0]["status"]:
            raise RuntimeError(self._log.with_suffix(".err").read_text()[-2000:])

    def _ask(self, requests: list[dict]) -> list[dict]:
        self._process.stdin.write(json.dumps(requests) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> list[dict]:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"the server died: {self._log.with_suffix('.err').read_text()[-2000:]}"
            )
        return json.loads(line)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=30)
