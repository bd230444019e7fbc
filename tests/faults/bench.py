"""A job under torment: killed, hindered, resumed, and compared byte by byte with a run that
nobody disturbed."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import random
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from jobs import Job
from shim import Ending, Fault, Server

from fastembed.verify import verify

# What of an output is a run's own and differs between runs that are equal in all else: locks, and
# the records of failures of a run that was stopped.
NOT_COMPARED = ("*.lock", "failures*.jsonl")
DONE, ERROR, FAILURES, KILLED, LEFT_THREADS = 0, 1, 3, -9, 99  # exit statuses


def snapshot(out: Path) -> dict[str, bytes]:
    """All that a finished run left, by path, hidden files too; a link's content is its target.

    Times of day, durations and the place of the output are taken out of JSON files.
    """
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in NOT_COMPARED):
            continue
        if path.is_symlink():
            found[name] = os.readlink(path).encode()
        elif path.is_file():
            content = path.read_bytes()
            if path.name.endswith("_metadata.json"):
                facts = json.loads(content)
                del facts["timestamp"], facts["timing"]
                content = json.dumps(facts).encode()
            if path.suffix == ".json":
                content = content.replace(str(out).encode(), b"OUT")
            found[name] = content
    return found


def is_temporary(name: str) -> bool:
    """Whether a path is of those that a killed run may leave: hidden, or in a hidden folder."""
    return any(part.startswith(".") for part in name.split("/"))


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run left, and what it took."""

    files: dict[str, bytes]
    committed: dict[str, bytes]
    seconds: float
    calls: int


@dataclass
class Counts:
    """What was done: runs that were killed, commands given again, calls that were made to fail (or
    were cut or delayed), samples and bytes compared with an undisturbed run's."""

    stories: int = 0
    kills: int = 0
    resumes: int = 0
    injected: int = 0
    samples: int = 0
    bytes: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


class Bench:
    """A job with its data and its undisturbed outcome.

    Args:
        folder: for the data and the outputs; of any file system.
    """

    def __init__(self, job: Job, server: Server, folder: Path) -> None:
        self.job, self.server = job, server
        # Real: faults.c compares paths as they are opened.
        self.folder = Path(os.path.realpath(folder)) / re.sub(r"\W+", "_", job.name)
        self.data = self.folder / "data"
        self.data.mkdir(parents=True)
        job.data(self.data)
        self.counts = Counts()
        self._outputs = 0
        self.reference = self._undisturbed()

    def new_output(self) -> Path:
        self._outputs += 1
        return self.folder / f"out{self._outputs}"

    def argv(self, out: Path) -> list[str]:
        return self.job.argv(self.data, out)

    def run(self, out: Path, *faults: Fault, **options) -> Ending:
        """The command under these faults, which are counted.

        Raises:
            AssertionError: it hangs, or leaves a thread or a traceback behind.
        """
        ending = self.server.run(self.argv(out), *faults, **options)
        if ending.timed_out or ending.status == LEFT_THREADS or "Traceback" in ending.text:
            raise AssertionError(
                f"{'hangs' if ending.timed_out else 'no clean end'}: {ending.text}"
            )
        struck = sum(ending.hit)
        kill = ending.status == KILLED
        self.counts.kills += kill
        self.counts.injected += struck - (kill and struck > 0)
        return ending

    def check(self, out: Path, before: dict[str, bytes] | None = None) -> dict[str, bytes]:
        """What must hold of an output at any time; what is committed in it.

        Args:
            before: what was committed at an earlier time, which must be there still.

        Raises:
            AssertionError: a wrong or half file under its final name; a row without its file; one
                that is twice; something committed that is lost.
        """
        committed, reference = self.job.committed(out), self.reference
        for name, content in committed.items():
            if reference.committed.get(name) != content:
                raise AssertionError(f"{out}: {name} is committed with other bytes than it has")
        if lost := (before or {}).keys() - committed.keys():
            raise AssertionError(f"{out}: lost what was committed: {sorted(lost)[:5]}")
        if not out.exists():
            return committed
        self._verify(out)
        for name, content in self._raw(out).items():
            if is_temporary(name) or any(fnmatch.fnmatch(name, p) for p in self.job.growing):
                continue
            if name not in reference.files:
                raise AssertionError(f"{out}: {name} is none of the outputs")
            if content != reference.files[name]:
                raise AssertionError(f"{out}: {name} is wrong: {content[:80]!r}")
        return committed

    def check_complete(self, out: Path) -> None:
        """Every byte is the undisturbed run's, and nothing else is there."""
        committed, found = self.check(out), snapshot(out)
        reference = self.reference
        if committed != reference.committed:
            raise AssertionError(f"{out}: {len(committed)} of {len(reference.committed)} committed")
        for path in out.rglob("fastembed.json"):
            if not (verdict := verify(path.parent)).sound:
                raise AssertionError(f"{out}: verify says {verdict.findings}")
        if found != reference.files:
            names = [name for name in found.keys() | reference.files.keys()
                     if found.get(name) != reference.files.get(name)]  # fmt: skip
            raise AssertionError(f"{out}: differs in {sorted(names)[:8]}")
        self.counts.samples += len(committed)
        self.counts.bytes += sum(map(len, found.values()))

    def finish(self, out: Path, before: dict[str, bytes] | None = None) -> None:
        """The same command again, undisturbed: complete; what was committed `before` is there."""
        self._expect(self.run(out), DONE)
        self.check(out, before)
        self.check_complete(out)
        shutil.rmtree(out)

    # Torments: each draws what happens from a seed, and raises an AssertionError that names it.

    def kills(self, seed: int, times: int = 4) -> None:
        """Killed up to `times` times, resumed after each, and finished."""
        draw, out, history = random.Random(seed), self.new_output(), []
        with self._told(f"kills, seed {seed}", history):
            committed: dict[str, bytes] = {}
            for _ in range(times):
                left = 1 - len(committed) / len(self.reference.committed)
                faults, options = self._moment(draw, out, left)
                history.append(str((*faults, options)))
                ending = self.run(out, *faults, **options)
                committed = self.check(out, committed)
                if ending.status != KILLED:  # it was faster: from the start, then
                    self._expect(ending, DONE)
                    self.check_complete(out)
                    shutil.rmtree(out)
                    # Another folder: a database still has the rows of this one.
                    out, committed = self.new_output(), {}
                    continue
                self.counts.resumes += 1
            self.finish(out)

    def bad_disk(self, seed: int) -> None:
        """The output's disk is full from some call on, or fails in one: the run stops and says so;
        when the disk is well again, it goes on."""
        draw, out, history = random.Random(seed), self.new_output(), []
        with self._told(f"bad_disk, seed {seed}", history):
            first = draw.randint(1, self.reference.calls)
            if draw.random() < 0.5:
                fault = Fault(out, "error", "create,write,mkdir", "ENOSPC", first)
            else:
                fault = Fault(out, "error", "create,write,sync,rename", "EIO", first, first)
            history.append(str(fault))
            ending = self.run(out, fault)
            committed = self.check(out)
            if ending.hit[0]:
                self._expect(ending, ERROR)
                if fault.reason not in ending.text:
                    raise AssertionError(f"it does not say {fault.reason!r}:\n{ending.text}")
            else:
                self._expect(ending, DONE)
            self.counts.resumes += 1
            self.finish(out, committed)

    def bad_input(self, seed: int) -> None:
        """Reads of the data fail now and then: those samples are failures, recorded, and no others
        are touched; when the data can be read again, the same command makes them."""
        draw, out, history = random.Random(seed), self.new_output(), []
        with self._told(f"bad_input, seed {seed}", history):
            fault = Fault(
                self.data, "error", draw.choice(("open,read,map", "read")),
                probability=draw.choice((0.02, 0.1, 0.4)), seed=seed,
            )  # fmt: skip
            history.append(str(fault))
            ending = self.run(out, fault)
            committed = self.check(out)
            if ending.status == ERROR:  # the listing itself could not be read
                if fault.reason not in ending.text:
                    raise AssertionError(f"it does not say {fault.reason!r}:\n{ending.text}")
            elif ending.hit[0] and ending.status != DONE:
                self._expect(ending, FAILURES)
                records = [
                    json.loads(line)
                    for path in out.rglob("failures*.jsonl")
                    for line in path.read_text().splitlines()
                ]
                if not records or not all(record["reason"] for record in records):
                    raise AssertionError(f"status 3 without reasons: {records}")
            else:
                self._expect(ending, DONE)
            if ending.status != DONE:
                self.counts.resumes += 1
            self.finish(out, committed)

    def hiccups(self, seed: int) -> None:
        """Interrupted, short and slow calls, and a clock that jumps: nothing of it shows."""
        draw, out, history = random.Random(seed), self.new_output(), []
        with self._told(f"hiccups, seed {seed}", history):
            calls = "open,create,read,write,sync"
            faults = []
            if not self.job.tensorstore:  # which takes an interrupted call for an error
                faults = [
                    Fault(folder, "error", calls, "EINTR", probability=0.15, seed=seed)
                    for folder in (self.data, out)
                ]
            for folder in (self.data, out):
                wait = draw.choice((1, 5))
                faults += [
                    Fault(folder, "short", "read,write", probability=0.4, seed=seed + 1),
                    Fault(folder, "delay", calls, probability=0.05, seed=seed, milliseconds=wait),
                ]
            history += map(str, faults)
            self._expect(self.run(out, *faults, clock=seed + 1), DONE)
            self.check_complete(out)
            shutil.rmtree(out)

    def signals(self, seed: int) -> None:
        """SIGTERM or SIGINT at a call: the run ends with their status, says how to go on, and has
        committed what was complete."""
        draw, out, history = random.Random(seed), self.new_output(), []
        with self._told(f"signals, seed {seed}", history):
            name, status = draw.choice((("SIGTERM", 143), ("SIGINT", 130)))
            first = draw.randint(1, self.reference.calls)
            fault = Fault(out, "signal", error=name, first=first, last=first)
            history.append(str(fault))
            ending = self.run(out, fault)
            self._expect(ending, status if ending.hit[0] else DONE)
            if ending.hit[0] and "the same command goes on from there" not in ending.text:
                raise AssertionError(f"it does not say how to go on:\n{ending.text}")
            committed = self.check(out)
            self.counts.resumes += 1
            self.finish(out, committed)

    def crowd(self, seed: int) -> None:
        """Three shards at once, each killed in some call or not, all given again together: what
        one run leaves. Of jobs that have shards."""
        draw, out, history = random.Random(seed), self.new_output(), []
        with self._told(f"crowd, seed {seed}", history):
            commands = []
            for part in range(3):
                argv = [*self.argv(out), "--shard", f"{part}/3"]
                first = draw.randint(1, self.reference.calls)
                faults = (Fault(out, draw.choice(("kill-before", "torn")), first=first),)
                history.append(str(faults))
                commands.append((argv, faults, {}))
            for ending in self.server.run_together(*commands):
                if ending.status not in (DONE, KILLED):
                    raise AssertionError(f"status {ending.status}:\n{ending.text}")
                self.counts.kills += ending.status == KILLED
            committed = self.check(out)
            for ending in self.server.run_together(*((argv, (), {}) for argv, *_ in commands)):
                self._expect(ending, DONE)
            self.counts.resumes += 3
            self.check(out, committed)
            self.check_complete(out)
            shutil.rmtree(out)

    @contextlib.contextmanager
    def _told(self, what: str, history: list[str]) -> Iterator[None]:
        try:
            yield
        except (AssertionError, OSError, ValueError) as error:
            told = "\n  ".join(history)
            raise AssertionError(f"{self.job.name}, {what}: {error!s}\n  {told}") from error
        self.counts.stories += 1

    def _expect(self, ending: Ending, status: int) -> None:
        if ending.status != status:
            raise AssertionError(f"status {ending.status}, not {status}:\n{ending.text}")

    def _moment(self, draw: random.Random, out: Path, left: float) -> tuple[tuple, dict]:
        """When to kill: at a time, or in one of the calls that change the output."""
        if draw.random() < 0.3:
            seconds = draw.uniform(0.0, self.reference.seconds * (0.3 + 0.7 * left))
            return (), {"signals": [(seconds, 9)]}
        what = draw.choice(["kill-before", "kill-after", "torn"])
        last = max(12, int(self.reference.calls * left))
        return (Fault(out, what, first=draw.randint(1, last)),), {}

    def _verify(self, out: Path) -> None:
        """What a killed run leaves is never taken for damage, and no file lacks its checksum."""
        for path in out.rglob("fastembed.json"):
            verdict = verify(path.parent)
            damage = [finding for finding in verdict.findings if finding.is_damage]
            if damage or verdict.unlisted:
                raise AssertionError(f"{out}: {verdict.unlisted} unlisted; verify says {damage}")

    def _raw(self, out: Path) -> dict[str, bytes]:
        try:
            return snapshot(out)
        except ValueError as error:  # JSON that is cut off
            raise AssertionError(f"{out}: {error}") from error

    def _undisturbed(self) -> Reference:
        if not self.job.tensorstore:
            self.server.warm_up(self.argv(self.new_output()))
        for _ in range(2):  # the second is timed: caches are warm
            out = self.new_output()
            ending = self.server.run(self.argv(out), Fault(out, "count"))
            if ending.status != 0:
                raise AssertionError(f"{self.job.name}: status {ending.status}\n{ending.text}")
        files, committed = snapshot(out), self.job.committed(out)
        if not committed or not files:
            raise AssertionError(f"{self.job.name} left nothing to compare")
        shutil.rmtree(out)
        return Reference(files, committed, ending.seconds, ending.seen[0])


def seeds(base: int) -> Iterator[int]:
    """Seeds of stories, that follow from one."""
    draw = random.Random(base)
    while True:
        yield draw.randrange(1 << 32)


def base_seed() -> int:
    """FASTEMBED_TORTURE_SEED, or one of this moment."""
    return int(os.environ.get("FASTEMBED_TORTURE_SEED", time.time_ns() % (1 << 31)))
