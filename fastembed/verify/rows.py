"""The rows of an index, read without trust and without changing it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Protocol

from ..indexes import Postgres, Tsv
from .findings import OPEN, ROW, Verdict

Row = Sequence[str]
_LONGEST = 100


class Rules(Protocol):
    """How the rows of an index are."""

    def name_of(self, row: Row) -> str:
        """The name of a row's output."""

    def fault_of_row(self, row: Row) -> str:
        """How a row contradicts itself; "" where it does not."""

    def doubt_of_row(self, row: Row) -> str:
        """Likewise, by a rule that the outputs of other sources need not follow."""


def of_tsv(index: Tsv, rules: Rules, verdict: Verdict) -> dict[str, Row]:
    """The rows that hold together, by name; the others are told to the verdict."""
    file = index.path.name
    try:
        data = index.path.read_bytes()
    except FileNotFoundError:  # no finding by itself: a run may be about to make it
        return {}
    if not data.endswith(b"\n"):
        verdict.add(OPEN, file, "its last line is torn: a run was stopped in it, or it was cut")
        data = data[: data.rfind(b"\n") + 1]
    good: dict[str, Row] = {}
    doubtful: dict[str, str] = {}
    for number, row in enumerate(_lines(data)):
        place = f"{file} row {number}"
        if number == 0:
            if tuple(row) != index.columns:
                verdict.add(ROW, file, f"its header must be {', '.join(index.columns)}")
        elif fault := _fault(row, index, rules):
            verdict.add(ROW, place, f"{fault}: {_shown(row)}")
        elif (name := rules.name_of(row)) in good:
            outputs = [] if good[name] == row else [name]
            verdict.add(ROW, place, f"{name} has a row already", outputs)
        else:
            good[name] = row
            if doubt := rules.doubt_of_row(row):
                doubtful[name] = f"{doubt}: {_shown(row)}"
    if 2 * len(doubtful) <= len(good):  # otherwise the source names outputs in another way
        for name, reason in doubtful.items():
            verdict.add(ROW, f"{file} row of {name}", reason)
            del good[name]
    return good


def _lines(data: bytes) -> Iterator[list[str]]:
    # Surrogates stand for bytes that are no UTF-8, which no row has.
    text = io.StringIO(data.decode("utf-8", errors="surrogateescape"), newline="")
    reader = csv.reader(text, dialect="excel-tab")
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # a quote that swallows all that follows
            yield [str(error)]


def _fault(row: Row, index: Tsv, rules: Rules) -> str:
    if len(row) != len(index.columns):
        return f"it must have {len(index.columns)} fields"
    if not "".join(row).isascii() and any("\ud800" <= c <= "\udfff" for c in "".join(row)):
        return "it is not UTF-8"
    return rules.fault_of_row(row)


def _shown(row: Row) -> str:
    text = "\t".join(row)
    return repr(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..")


def of_database(index: Postgres) -> set[str]:
    """Names of the outputs that a database has of the folder; creates no table.

    Raises:
        DatabaseError: the server cannot be reached or refuses.
    """
    try:
        return set(index.rows())
    finally:
        index.close()


def drop(index: Postgres, names: set[str]) -> None:
    """Drops the rows of these outputs."""
    index.open()
    try:
        index.remove(names)
    finally:
        index.close()
