"""One form of a cache into another: the same vectors, rows and settings.

What it writes as npy, npz or zarr goes through the sinks and indexes of the jobs and has the same
bytes as if the job had been run with that --format: it goes on in the new folder. For others:

- ``parquet``: one file ``embeddings.parquet``, index and vectors (a column of fixed-size lists).
- ``safetensors``: ``embeddings.safetensors`` with one tensor ``embeddings`` [N, D], and the index
  as ``index.parquet`` beside it: the format's own place for text is one JSON object that every
  reader parses whole and that may have 100 MB, a million rows.

Their rows are in the order of a zarr store, so that they do not depend on the form before.

A number is never changed and never made up. What a form lacks (npy of segments has no labels, a
database no paths of tensors, only npz knows which segments were chosen) is taken from the list of
the data set where that is given, and is otherwise left out or refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from . import signature
from .caches import PARQUET, SAFETENSORS, EmbeddingStore, unfinished
from .caches.tables import INDEX, VECTORS
from .database import DBConfig
from .indexes import ImageTsv, SegmentTsv, Tsv
from .nouns import Source
from .records import Embedded, Item
from .sinks import NpyPerPart, NpyPerSample, NpzPerSample
from .staging import sync_folder
from .store import Parquet, SegmentParquet, Zarr

FORMS = ("npy", "npz", "zarr", "parquet", "safetensors")
_SAMPLES, _SEGMENTS = Parquet.columns, SegmentParquet.columns
_BLOCK_BYTES = 16 << 20
_ROW_GROUP_BYTES = 32 << 20
# All that jobs and this leave in a folder: what --overwrite may remove with it.
_OURS = re.compile(
    r"fastembed(-runs)?\.json|checksums\.tsv|failures.*\.jsonl|\..*\.(lock|tmp)|"
    r"embeddings\.(zarr|parquet|safetensors)|index\.parquet|store-[0-9a-f]{16}|"
    r"(image_embeddings|inst2feat|image_index)\.tsv|"
    r"emb_.*\.npy|\d+_\d+\.npy|\d+\.npz"
)


@dataclass(frozen=True)
class Conversion:
    """What `convert` did.

    Attributes:
        rows, dim, dtype: of the vectors.
        lost: columns of the index that the new form has no place for.
        missing: columns of the job's index that the source does not hold either.
    """

    rows: int
    dim: int
    dtype: str
    lost: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def convert(
    folder: str | Path,
    target: str | Path,
    form: str,
    *,
    source: Source | None = None,
    database: DBConfig | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Writes a cache of ``fastembed multichannel`` or ``panoptic`` anew, in another form.

    The new folder is there whole or not at all; what a killed call leaves is hidden and removed by
    the next. Memory grows with the index, not with the vectors.

    Args:
        folder: of the cache: of a job, in whichever --format, or of `convert`.
        target: the new folder.
        form: ``npy``, ``npz`` (of segments), ``zarr``, ``parquet`` or ``safetensors``.
        source: the data set that the cache was made of, for what the cache does not hold:
            `CocoPanoptic` for labels and, with the classes and the like that were used, for npz;
            `TensorCsv` or `TensorPostgres` for paths of tensors.
        database: of a cache whose index is a table.
        overwrite: replace the target, if it is a cache and holds nothing else.

    Raises:
        ValueError: a run into the folder is not finished; the form needs what neither the cache
            nor `source` holds, or they contradict each other; a vector is damaged.
        FileExistsError: the target is there, or holds what is not ours.
        FileNotFoundError: the folder holds no cache. OSError: disk full and the like.
    """
    folder, target = Path(folder).resolve(), Path(target).resolve()
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}; got {form!r}")
    if left := unfinished(folder):
        raise ValueError(f"{folder} is not finished: {left}; run the same command again first")
    _check_target(folder, target, overwrite)
    settings = signature.read(folder)
    store = EmbeddingStore(folder, database)
    if not len(store):
        raise ValueError(f"{folder} holds no vectors")
    segments = "segment_id" in store.columns
    if form == "npz" and not segments:
        raise ValueError(f"npz is a form of segments; {folder} holds samples")
    index = _index(store, source)
    settings = {**settings, "output": {**settings["output"], "form": form}}
    if form == "npz":
        settings["selection"] = _selection(settings, index, source, folder)
    elif form in ("npy", "zarr"):
        settings.pop("selection", None)
    wanted = _SEGMENTS if segments else _SAMPLES
    missing = tuple(name for name in wanted if name not in index.column_names)
    needed = () if form in ("parquet", "safetensors") else wanted
    if form == "npy" and segments:
        needed = tuple(name for name in wanted if name != "label")
    if lacking := [name for name in missing if name in needed]:
        hint = "--data_path" if segments else "--manifest or --db"
        raise ValueError(
            f"{form} has a column {', '.join(lacking)}, which {folder} ({store.form}) does not "
            f"hold: give source, the data set that it was made of ({hint})"
        )
    write = {"parquet": _write_parquet, "safetensors": _write_safetensors}.get(form)
    with _workplace(target) as place:
        signature.claim(place, settings)
        if write is None:
            _write_as_job(place, form, segments, index, store)
        else:
            write(place, index.drop_columns("place"), _Vectors(store, index), settings)
        _sync(place)
        _put(place, target)
    first = store[:1]
    lost = ("label",) if form == "npy" and "label" in store.columns else ()
    dtype = str(first.dtype).removeprefix("torch.")
    return Conversion(len(store), first.shape[1], dtype, lost, missing if needed == () else ())


# What is converted ------------------------------------------------------------------------


def _index(store: EmbeddingStore, source: Source | None) -> pa.Table:
    """The rows in the order of a zarr store, with `place`, the row of each in `store`."""
    segments = "segment_id" in store.columns
    types = {"name": pa.large_string(), **(_SEGMENTS if segments else _SAMPLES)}
    columns = {
        name: pa.array(store.column(name), kind)
        for name, kind in types.items()
        if name in store.columns
    }
    added = "label" if segments else "tensor_path"
    if source is not None and added not in columns:
        columns[added] = pa.array(_looked_up(columns, source), types[added])
    table = pa.table({name: columns[name] for name in types if name in columns})
    table = table.append_column("place", pa.array(np.arange(len(table))))
    order = [name for name in (*types, "name") if name in columns and name != "name"]
    return table.sort_by([(name, "ascending") for name in (*order, "name")])


def _looked_up(columns: Mapping[str, pa.Array], source: Source) -> list:
    """Label of each segment, or path of each sample, as the source lists it."""
    names = columns["name"].to_pylist()
    if "segment_id" in columns:
        listed = {
            item.part_name(part): label
            for item in source.items()
            for part, label in item.parts.items()
        }
    else:
        wanted = set(names)
        listed = {item.name: item.path for item in source.items() if item.name in wanted}
    unknown = [name for name in names if name not in listed]
    if unknown:
        raise ValueError(
            f"{source} does not list {len(unknown)} of the cache, such as {unknown[0]}"
        )
    return [listed[name] for name in names]


def _selection(settings: Mapping, index: pa.Table, source: Source | None, folder: Path) -> dict:
    """Which segments were chosen. A photo in npz is done as a whole: a wrong choice would leave
    segments out for ever."""
    recorded = settings.get("selection")
    if source is None:
        if recorded is None:
            raise ValueError(
                f"npz records which segments were chosen, which {folder} does not hold: give "
                "source, the data set with the same choice (--data_path, --split, --classes, ..)"
            )
        return recorded
    if recorded not in (None, source.selection()):
        raise ValueError(f"source chooses {source.selection()}; {folder} was made of {recorded}")
    listed = {item.name: item for item in source.items()}
    for item in _photos(index):
        wanted = listed[item.name].parts.keys() if item.name in listed else set()
        if others := item.parts.keys() - wanted:
            raise ValueError(
                f"{folder} holds {len(others)} segments of photo {item.name} that source does not "
                f"choose, such as {min(others)}: give the choice that it was made with"
            )
        lacking = wanted - item.parts.keys()
        if lacking and (lacking := lacking & _in_the_map(source, listed[item.name])):
            raise ValueError(
                f"{folder} lacks {len(lacking)} segments of photo {item.name} that source chooses, "
                f"such as {min(lacking)}: run the job to its end first, or give another choice"
            )
    return source.selection()


def _in_the_map(source: Source, item: Item) -> set[int]:
    return set(source.read(item).segments.ids.tolist())


def _samples(index: pa.Table) -> Iterator[Item]:
    """The samples in order, from the index."""
    for batch in index.to_batches(max_chunksize=1 << 16):
        for row in batch.to_pylist():
            yield Item(row["name"], row["tensor_path"], row["name"], {"text_id": row["text_id"]})


def _photos(index: pa.Table) -> Iterator[Item]:
    """Photos with those of their segments that the index has, in order."""
    name, parts = None, {}
    for batch in index.to_batches(max_chunksize=1 << 16):
        for row in batch.to_pylist():
            if row["image_id"] != name:
                if parts:
                    yield Item(name, "", name, parts=parts)
                name, parts = row["image_id"], {}
            parts[row["segment_id"]] = row.get("label", 0)  # 0 where the form writes none
    if parts:
        yield Item(name, "", name, parts=parts)


class _Vectors:
    """The vectors in the order of the index, a slice at a time."""

    def __init__(self, store: EmbeddingStore, index: pa.Table) -> None:
        self._store = store
        self._places = index["place"].to_numpy()
        first = store[:1].numpy()
        self.dim, self.dtype = first.shape[1], first.dtype
        self.nbytes = len(self) * first.nbytes

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, part: slice) -> np.ndarray:
        return self._store[self._places[part]].numpy()

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """Blocks of at most `size` bytes, of a row at least."""
        rows = self.rows_in(size)
        return (self[start : start + rows] for start in range(0, len(self), rows))

    def rows_in(self, size: int) -> int:
        return max(1, size // (self.dim * self.dtype.itemsize))


# How it is written ------------------------------------------------------------------------


def _write_as_job(
    place: Path, form: str, segments: bool, index: pa.Table, store: EmbeddingStore
) -> None:
    sink, committed = _nouns(place, form, segments)
    vectors = _Vectors(store, index)
    committed.open()
    sink.open()
    items = _photos(index) if segments else _samples(index)
    limit, row = vectors.rows_in(_BLOCK_BYTES), 0
    for group in _grouped(items, limit):
        counts = [len(item.parts) or 1 for item in group]
        block = vectors[row : row + sum(counts)]
        row += len(block)
        for item, own in zip(group, np.split(block, np.cumsum(counts)[:-1]), strict=True):
            sink.write(Embedded(item, own))
        sink.flush()
        committed.commit(group)
    sink.close()
    committed.close()


def _nouns(place: Path, form: str, segments: bool) -> tuple:
    """Sink and index of a job with this --format."""
    if form == "zarr":
        sink = Zarr(place)
        return sink, (SegmentParquet if segments else Parquet)(sink)
    if form == "npz":
        return NpzPerSample(place), ImageTsv(place)
    return (NpyPerPart(place), SegmentTsv(place)) if segments else (NpyPerSample(place), Tsv(place))


def _grouped(items: Iterator[Item], limit: int) -> Iterator[list[Item]]:
    """Items of at least `limit` vectors together."""
    group, count = [], 0
    for item in items:
        group.append(item)
        count += len(item.parts) or 1
        if count >= limit:
            yield group
            group, count = [], 0
    if group:
        yield group


def _write_parquet(place: Path, index: pa.Table, vectors: _Vectors, settings: dict) -> None:
    kind = pa.list_(pa.from_numpy_dtype(vectors.dtype), vectors.dim)
    schema = index.schema.append(pa.field(VECTORS, kind, nullable=False))
    schema = schema.with_metadata({"fastembed": _about(vectors, settings)})
    others = index.column_names
    rows = vectors.rows_in(_ROW_GROUP_BYTES)
    with pq.ParquetWriter(
        place / PARQUET,
        schema,
        # Mantissas of embeddings are noise: they are neither compressed nor looked up.
        compression={**dict.fromkeys(others, "zstd"), f"{VECTORS}.list.element": "none"},
        use_dictionary=others,
        write_statistics=others,
        write_page_checksum=True,
    ) as writer:
        for start in range(0, len(vectors), rows):
            block = np.ascontiguousarray(vectors[start : start + rows])
            column = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), type=kind)
            part = index.slice(start, rows).append_column(schema.field(VECTORS), column)
            writer.write_table(part.cast(schema), row_group_size=rows)


def _write_safetensors(place: Path, index: pa.Table, vectors: _Vectors, settings: dict) -> None:
    # The format's library writes what is in memory only.
    header = {
        "__metadata__": {"fastembed": _about(vectors, settings)},
        "embeddings": {
            "dtype": {"f2": "F16", "f4": "F32"}[vectors.dtype.str[1:]],
            "shape": [len(vectors), vectors.dim],
            "data_offsets": [0, vectors.nbytes],
        },
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    with (place / SAFETENSORS).open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for block in vectors.blocks(_BLOCK_BYTES):
            stream.write(np.ascontiguousarray(block))
    index = index.append_column("row", pa.array(np.arange(len(index))))
    index = index.replace_schema_metadata({"fastembed": _about(vectors, settings)})
    pq.write_table(index, place / INDEX, compression="zstd")


def _about(vectors: _Vectors, settings: dict) -> str:
    about = {"signature": signature.signature(settings), "settings": settings}
    return json.dumps({**about, "dtype": vectors.dtype.name, "dim": vectors.dim})


# Where it is written ----------------------------------------------------------------------


def _check_target(folder: Path, target: Path, overwrite: bool) -> None:
    if target == folder or target in folder.parents or folder in target.parents:
        raise ValueError(f"the target must be a folder beside {folder}, not in it; got {target}")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{target} is there; --overwrite replaces it")
    others = [path.name for path in target.iterdir() if not _OURS.fullmatch(path.name)]
    if others or not (target / signature.FILE_NAME).exists():
        what = f"{others[0]}, which is no part of a cache" if others else "no cache"
        raise FileExistsError(f"{target} holds {what}: it is not replaced")


@contextmanager
def _workplace(target: Path) -> Iterator[Path]:
    """An empty hidden folder beside the target, for this process alone; removed on an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    place = target.with_name(f".{target.name}.converting")
    place.mkdir(exist_ok=True)
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(descriptor), place.stat()):
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            raise OSError(f"another process is converting into {target}") from None
        for left in place.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        try:
            yield place
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def _sync(place: Path) -> None:
    """The settings, and what no sink has written, survive a power cut."""
    for path in place.iterdir():
        if path.is_file() and path.suffix not in (".npy", ".npz"):
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    sync_folder(place)


def _put(place: Path, target: Path) -> None:
    replaced = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        os.rename(target, replaced)
    os.rename(place, target)
    sync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)
