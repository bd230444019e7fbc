"""The vectors most like others: exact, whatever their number.

A product in float32 finds the candidates, block by block; float64 settles their order. The product
errs by less than a bound that is known, so that nothing which belongs among the best is left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numba import njit

from .caches import EmbeddingStore

_BLOCK_BYTES = 8 << 20  # of rows in float32
_SCORES = 1 << 20  # of rows and queries at once
_MANY = 8  # queries, from which on a matrix product is faster than one after another


class Neighbours(NamedTuple):
    """The best of each of Q queries, best first.

    Attributes:
        rows: [Q, k] int64; -1 where there are fewer rows than k.
        cosines: [Q, k] float64; NaN there.
    """

    rows: np.ndarray
    cosines: np.ndarray


def search(
    store: EmbeddingStore | np.ndarray | torch.Tensor,
    queries: np.ndarray | torch.Tensor,
    k: int = 10,
    *,
    leave_out: Sequence[int | None] | None = None,
) -> Neighbours:
    """The k rows of largest cosine to each query.

    cosine = sum(x q) / sqrt(sum(x^2) sum(q^2))

    in float64 of the stored numbers; 0 for a row of zeros. Of equal cosines the lower row comes
    first. Memory grows with Q and k, not with N: rows are read in blocks.

    Args:
        store: N vectors: a store, or an array or tensor [N, D] of float16 or float32.
        queries: [Q, D] or one [D], of any floating dtype.
        k: at least 1; at most N columns come back.
        leave_out: for each query a row that is not to be among its best, such as itself, or None.

    Raises:
        ValueError: another shape; k < 1; a query that is not finite or all zeros; a stored vector
            that is not finite.

    Exactness: the same rows as cosines in float64 of all rows; of equal vectors in their order.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}")
    count, dim = _shape(store)
    queries = _units(queries, dim)
    if leave_out is None:
        leave_out = [None] * len(queries)
    if len(leave_out) != len(queries):
        raise ValueError(
            f"leave_out must have {len(queries)} rows, one per query; got {len(leave_out)}"
        )
    best = _Best(queries, min(k, count), leave_out)
    single = np.ascontiguousarray(queries, np.float32)
    size = max(64, min(_BLOCK_BYTES // (4 * max(1, dim)), _SCORES // len(single)))
    start = 0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool, np.errstate(all="ignore"):
        for block in _blocks(store, size):
            best.see(start, block, *_products(block, single, pool))
            start += len(block)
    return Neighbours(best.rows, best.cosines)


def _products(
    block: np.ndarray, queries: np.ndarray, pool: ThreadPoolExecutor
) -> tuple[np.ndarray, np.ndarray]:
    """Products of rows [n, D] with queries [Q, D], and norms of the rows: float32 [n, Q] and [n].

    Not by torch: its float16 product is rounded, its float32 one may be told to be bfloat16, and
    threads that meet after each small step lose far more than they gain on a busy machine.
    """
    dots, norms = np.empty((len(block), len(queries)), "f4"), np.empty(len(block), "f4")
    rows = np.empty(block.shape, "f4") if len(queries) >= _MANY else np.empty((0, 0), "f4")
    kernel, bits = (_halves, block.view(np.uint16)) if block.dtype == "f2" else (_floats, block)
    few = queries if len(queries) < _MANY else queries[:0]
    step = -(-len(block) // pool._max_workers)
    parts = [slice(i, i + step) for i in range(0, len(block), step)]
    list(pool.map(lambda part: kernel(bits[part], few, dots[part], norms[part], rows[part]), parts))
    if len(queries) >= _MANY:
        np.matmul(rows, queries.T, out=dots)
    return dots, norms


@njit(nogil=True, fastmath={"reassoc", "contract"})
def _halves(bits, queries, dots, norms, rows):
    row = np.empty(bits.shape[1], np.float32)
    pattern = row.view(np.uint32)
    for i in range(len(bits)):
        largest = np.uint32(0)
        for d in range(len(row)):
            half = np.uint32(bits[i, d])
            size = half & np.uint32(0x7FFF)
            largest = max(largest, size)
            pattern[d] = (size << np.uint32(13)) | ((half & np.uint32(0x8000)) << np.uint32(16))
        square = np.float32(0)
        for d in range(len(row)):
            # The exponents of float16 and float32 begin 112 apart.
            row[d] *= np.float32(2.0**112)
            square += row[d] * row[d]
        norms[i] = np.sqrt(square) if largest < 0x7C00 else np.float32(np.inf)
        _dots(row, queries, dots[i])
        if len(rows):
            rows[i] = row


@njit(nogil=True, fastmath={"reassoc", "contract"})
def _floats(vectors, queries, dots, norms, rows):
    for i in range(len(vectors)):
        row = vectors[i]
        square = np.float32(0)
        for d in range(len(row)):
            square += row[d] * row[d]
        norms[i] = np.sqrt(square)
        _dots(row, queries, dots[i])
        if len(rows):
            rows[i] = row


@njit(nogil=True, fastmath={"reassoc", "contract"})
def _dots(row, queries, dots):
    for q in range(len(queries)):
        total = np.float32(0)
        for d in range(len(row)):
            total += row[d] * queries[q, d]
        dots[q] = total


class _Best:
    """The best k rows so far for each query, best first."""

    def __init__(self, queries: np.ndarray, k: int, leave_out: Sequence[int | None]) -> None:
        self.rows = np.full((len(queries), k), -1, np.int64)
        self.cosines = np.full((len(queries), k), np.nan)
        self._queries, self._k = queries, k
        self._leave_out = np.array([-1 if row is None else row for row in leave_out])
        # Any order of float32 sums is within D + 8 half steps, for vectors of length 1.
        self._error = (queries.shape[1] + 8) * 2.0**-24
        self._least = np.full(len(queries), -np.inf)  # the cosine that a row must have

    def see(self, start: int, block: np.ndarray, dots: np.ndarray, norms: np.ndarray) -> None:
        """Rows start, start + 1, ..: their products [n, Q] with the queries and their norms [n],
        both float32; `block` are the rows as they are stored."""
        # Where float32 does not reach: zeros, not finite, too small or large to be squared.
        odd = ~((norms > 1e-15) & (norms < 1e15))
        cosines = dots / np.where(odd, np.float32(1), norms)[:, None]
        cosines[odd] = -1
        least = self._least
        if len(block) > self._k and (least == -np.inf).any():
            # One more than k, for the row that is left out.
            top = np.partition(cosines, len(cosines) - self._k - 1, axis=0)[-self._k - 1]
            least = np.maximum(least, top - 2 * self._error)
        candidates = (cosines >= least) | odd[:, None]
        for query in np.flatnonzero(candidates.any(axis=0)):
            chosen = np.flatnonzero(candidates[:, query])
            chosen = chosen[chosen + start != self._leave_out[query]]
            exact = _cosines(block[chosen], self._queries[query])
            if not np.isfinite(exact).all():
                raise ValueError(f"row {start + chosen[~np.isfinite(exact)][0]} is not finite")
            self._merge(query, start + chosen, exact)

    def _merge(self, query: int, rows: np.ndarray, cosines: np.ndarray) -> None:
        have = self.rows[query] >= 0
        rows = np.append(self.rows[query][have], rows)
        cosines = np.append(self.cosines[query][have], cosines)
        # Rows come in order, and of equal ones the first stays first.
        order = np.argsort(-cosines, kind="stable")[: self._k]
        self.rows[query, : len(order)] = rows[order]
        self.cosines[query, : len(order)] = cosines[order]
        if len(order) == self._k:
            self._least[query] = self.cosines[query, -1] - self._error


def _cosines(rows: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Each row by itself, so that equal rows have equal cosines."""
    rows = rows.astype(np.float64)
    lengths = np.sqrt((rows * rows).sum(axis=1))
    return (rows * unit).sum(axis=1) / np.where(lengths == 0, 1.0, lengths)


def _shape(store) -> tuple[int, int]:
    if isinstance(store, EmbeddingStore):
        return len(store), store[:1].shape[1]
    if store.ndim != 2:
        raise ValueError(f"vectors must be [N, D]; got {list(store.shape)}")
    return tuple(store.shape)


def _units(queries, dim: int) -> np.ndarray:
    """[Q, D] float64 of length 1."""
    queries = np.asarray(queries, dtype=np.float64)
    queries = queries[None] if queries.ndim == 1 else queries
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise ValueError(f"queries must be [Q, {dim}]; got {list(queries.shape)}")
    lengths = np.sqrt((queries * queries).sum(axis=1, keepdims=True))
    for number, length in enumerate(lengths[:, 0]):
        if not np.isfinite(length) or length == 0:
            raise ValueError(f"query {number} must be finite and not zero; its length is {length}")
    return queries / lengths


def _blocks(store, rows: int) -> Iterator[np.ndarray]:
    if isinstance(store, EmbeddingStore):
        return store.blocks(rows)
    store = np.asarray(store)
    if store.dtype not in ("f2", "f4"):
        raise ValueError(f"vectors must be float16 or float32; got {store.dtype}")
    return (
        np.ascontiguousarray(store[start : start + rows]) for start in range(0, len(store), rows)
    )
