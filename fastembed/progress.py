"""How far a run is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from tqdm import tqdm

from .report import Report


class Progress:
    """Give it to `extract(progress=...)`; use it in a with block.

    Args:
        stream: where to show it; stderr by default.
        interval: seconds between lines where there is no terminal.
    """

    def __init__(self, stream: TextIO | None = None, interval: float = 30.0) -> None:
        self._stream = stream or sys.stderr
        self._interval = interval
        self._bar: tqdm | None = None
        self._last: Report | None = None
        self._start = self._shown = time.monotonic()

    def __call__(self, report: Report, total: int) -> None:
        if self._last is None:
            print(f"Running with {report.plan}.", file=self._stream, flush=True)
        self._last = report
        finished = report.embedded + report.already_done + report.failed + report.duplicates
        if self._stream.isatty():
            self._show_bar(report, finished, total)
        elif time.monotonic() - self._shown >= self._interval:
            self._shown = time.monotonic()
            elapsed = self._shown - self._start
            rate = report.embedded / elapsed
            left = f", about {(total - finished) / rate:.0f} s left" if rate else ""
            print(
                f"{finished}/{total} samples, {rate:.2f}/s{left}, {report.failed} failed",
                file=self._stream,
                flush=True,
            )

    def _show_bar(self, report: Report, finished: int, total: int) -> None:
        if self._bar is None:
            # Samples of an earlier run would spoil the rate: the bar starts after them.
            self._bar = tqdm(
                total=total, initial=report.already_done, unit="sample", file=self._stream
            )
        self._bar.total = max(total, finished)
        self._bar.set_postfix(failed=report.failed, refresh=False)
        self._bar.update(finished - self._bar.n)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if kind is not None and self._last is not None:
            done = self._last.embedded + self._last.already_done
            print(
                f"{done} samples are committed, {self._last.embedded} of them by this run",
                file=self._stream,
                flush=True,
            )
