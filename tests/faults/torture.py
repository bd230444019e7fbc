"""The long form of the tests in this folder: every job, killed and hindered at random moments.

    python tests/faults/torture.py [--seconds 600] [--seed N] [--jobs NAME..] [--torments NAME..]

Each of two workers draws jobs and moments from its own seed, one on the disk and one on a file
system in memory, whose other ways of flushing are other code here. Prints counts at the end; exits
with 1 where anything was lost, wrong, left over, or hung, with the seed that does it again:

    python tests/faults/torture.py --again SEED --jobs "panoptic npz" --torments kills
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import astuple, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import shim
from bench import Bench, Counts, base_seed
from jobs import JOBS, with_postgres

from fastembed.database import embedded

# How often each is drawn, in this proportion.
TORMENTS = {"kills": 6, "bad_disk": 3, "crowd": 2, "signals": 2, "bad_input": 1, "hiccups": 1}


class _Worker(threading.Thread):
    """Stories one after the other, on a server of its own."""

    def __init__(self, number: int, folder: Path, library: Path, jobs: dict, arguments) -> None:
        super().__init__(name=f"worker-{number}")
        self.folder, self.library, self.jobs, self.arguments = folder, library, jobs, arguments
        self.draw = random.Random(f"{arguments.seed} {number}")
        self.benches: dict[str, Bench] = {}
        self.stories: dict[str, int] = dict.fromkeys(TORMENTS, 0)
        self.failures: list[str] = []

    def run(self) -> None:
        end = time.monotonic() + self.arguments.seconds
        server = shim.Server(self.library, self.folder)
        try:
            for torment, name, seed in self._plan():
                self._story(server, torment, name, seed)
                if self.arguments.again is None and time.monotonic() > end:
                    break
        except Exception as error:  # a server that died is a finding as well
            self.failures.append(f"{type(error).__name__}: {error}")
        finally:
            server.close()

    def _plan(self) -> Iterator[tuple[str, str, int]]:
        if self.arguments.again is not None:
            for name, torment in itertools.product(self.jobs, self.arguments.torments):
                yield torment, name, self.arguments.again
            return
        often = [TORMENTS[torment] for torment in self.arguments.torments]
        while True:
            names = list(self.jobs)
            self.draw.shuffle(names)  # each job equally often, in any order
            for name in names:
                [torment] = self.draw.choices(self.arguments.torments, often)
                yield torment, name, self.draw.randrange(1 << 32)

    def _story(self, server: shim.Server, torment: str, name: str, seed: int) -> None:
        if torment == "crowd" and not self.jobs[name].shards:
            return
        try:
            if name not in self.benches:
                self.benches[name] = Bench(self.jobs[name], server, self.folder)
            getattr(self.benches[name], torment)(seed)
        except AssertionError as error:
            self.failures.append(str(error))
            print(f"FAILED {error}", flush=True)
        else:
            self.stories[torment] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    seconds = float(os.environ.get("FASTEMBED_TORTURE_SECONDS", 600))
    parser.add_argument("--seconds", type=float, default=seconds, help=f"default {seconds:g}")
    parser.add_argument("--seed", type=int, default=base_seed(), help="default one of this moment")
    parser.add_argument("--jobs", nargs="+", choices=[*JOBS, "multichannel postgres"])
    parser.add_argument("--torments", nargs="+", choices=TORMENTS, default=list(TORMENTS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--again", type=int, metavar="SEED", help="that one story of each")
    arguments = parser.parse_args()
    if shim.compiler() is None:
        print("torture: needs a C compiler for its fault library", file=sys.stderr)
        return 1
    print(f"seed {arguments.seed}, {arguments.seconds:g} s", flush=True)
    with tempfile.TemporaryDirectory(prefix="fastembed-torture-") as folder:
        work = Path(folder)
        jobs = dict(JOBS)
        postgres = _postgres(work)
        if postgres is not None:
            jobs[postgres.name] = postgres
        jobs = {name: job for name, job in jobs.items() if name in (arguments.jobs or jobs)}
        library = shim.build_shim(work)
        with _in_memory() as memory:
            workers = []
            for number in range(arguments.workers):
                place = (memory if number % 2 and memory else work) / f"worker-{number}"
                place.mkdir()
                workers.append(_Worker(number, place, library, jobs, arguments))
            start = time.monotonic()
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            return _report(workers, time.monotonic() - start)


@contextlib.contextmanager
def _in_memory() -> Iterator[Path | None]:
    """A folder on a tmpfs, where the machine has one that anybody can write to."""
    if not os.access("/dev/shm", os.W_OK):
        print("no /dev/shm: all on one file system", file=sys.stderr)
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="fastembed-torture-", dir="/dev/shm") as folder:
        yield Path(folder)


def _postgres(folder: Path):
    """The job with a PostgreSQL; None, with the reason said, where there is none to be had."""
    try:
        import psycopg2  # noqa: F401

        return with_postgres(embedded(folder / "postgres", "torture"))
    except ImportError as error:
        print(f"no PostgreSQL: {error}", file=sys.stderr)
        return None


def _report(workers: list[_Worker], seconds: float) -> int:
    """The table of what was done; the exit status."""
    by_job: dict[str, Counts] = {}
    for worker in workers:
        for name, bench in worker.benches.items():
            by_job[name] = by_job.get(name, Counts()) + bench.counts
    names = [field.name for field in fields(Counts)]
    print(f"\n{'job':<24}" + "".join(f"{name:>12}" for name in names))
    total = sum(by_job.values(), Counts())
    for name, counts in [*sorted(by_job.items()), ("all", total)]:
        print(f"{name:<24}" + "".join(f"{value:>12,}" for value in astuple(counts)))
    for torment in TORMENTS:
        print(f"{torment:<24}{sum(worker.stories[torment] for worker in workers):>12,} stories")
    failures = [failure for worker in workers for failure in worker.failures]
    print(
        f"{seconds:.0f} s; "
        + (f"{len(failures)} FAILED" if failures else "nothing lost, nothing wrong, nothing hung")
    )
    return 1 if failures or not total.samples else 0


if __name__ == "__main__":
    sys.exit(main())
