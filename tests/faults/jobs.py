"""The jobs that are tormented: a command, small data for it, and what of its output is done."""

from __future__ import annotations

import contextlib
import csv
import io
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Job:
    """A command on data of its own.

    Attributes:
        name: of the job and its sink.
        data: makes the data in a folder.
        argv: of the command, by data and output.
        committed: what of an output is done, by name, with all its bytes.
        growing: patterns of files that change until a run ends, or that only `committed` can judge.
        tensorstore: whether it uses TensorStore, after which a process cannot fork.
        shards: whether it takes --shard.
    """

    name: str
    data: Callable[[Path], None]
    argv: Callable[[Path, Path], list[str]]
    committed: Callable[[Path], dict[str, bytes]]
    growing: tuple[str, ...]
    tensorstore: bool = False
    shards: bool = True


def tensors(folder: Path, count: int = 24) -> None:
    from conftest import Plates

    Plates(folder).fill(count)


def photos(folder: Path) -> None:
    from test_panoptic_job import Coco

    Coco(folder).fill(14)


def pictures(folder: Path) -> None:
    from fastembed.testing import scene

    for i in range(16):
        pixels = scene(40 + i, 50, 4, i)[0]
        if i % 2:
            alpha = np.zeros(pixels.shape[:2], np.uint8)
            alpha[:, i : i + 20] = 255
            pixels = np.dstack([pixels, alpha])
        place = folder / ("a" if i % 3 else "b/c")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"photo_{i:03d}.png")


def sections(folder: Path) -> None:
    from test_volumes_job import make_sections

    make_sections(folder / "sections")


def tiles(folder: Path) -> None:
    import tifffile
    from scipy import ndimage

    for i in range(12):
        place = folder / ("gfap", "neun")[i % 2] / f"2010050{i % 3}_slide"
        place.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(i)
        smooth = ndimage.gaussian_filter(rng.normal(size=(2, 64, 48)), (0, 2, 2))
        for channel, plane in enumerate((1000 + 4000 * smooth).clip(0, 60000).astype(np.uint16)):
            tifffile.imwrite(place / f"field{i}_b0c{channel}.tif", plane)


def _rows(path: Path) -> list[list[str]]:
    """The whole rows of a TSV below its header."""
    if not path.exists():
        return []
    text = path.read_bytes()
    text = text[: text.rfind(b"\n") + 1].decode()
    return list(csv.reader(io.StringIO(text), dialect="excel-tab"))[1:]


def _by_index(file: str, files_of: Callable[[list[str]], list[str]]):
    """`committed` of an index in TSV whose rows name files."""

    def committed(out: Path) -> dict[str, bytes]:
        done = {}
        for row in _rows(out / file):
            key = "\t".join(row)
            if key in done:
                raise AssertionError(f"{file} has a row twice: {key}")
            done[key] = b"".join((out / name).read_bytes() for name in files_of(row))
        return done

    return committed


def _of_store(out: Path) -> dict[str, bytes]:
    import pyarrow.parquet as pq

    from fastembed.datasets import EmbeddingStore
    from fastembed.store import journal

    done = {}
    if (out / "embeddings.zarr").exists() or (out / "index.parquet").exists():
        rows = pq.read_table(out / "index.parquet").drop_columns("row").to_pylist()
        with warnings.catch_warnings():  # that a run was stopped is what we came for
            warnings.simplefilter("ignore")
            vectors = EmbeddingStore(out).as_numpy()
        done = {str(r): v.tobytes() for r, v in zip(rows, vectors, strict=True)}
        if len(done) != len(rows):
            raise AssertionError("index.parquet has a row twice")
    for path in journal.paths(out) if out.exists() else ():
        log = journal.Log(path)
        if len(log):
            vectors = log.rows(log.places)
            done |= {
                str(row): vector.tobytes()
                for row, vector in zip(log.index.to_pylist(), vectors, strict=True)
            }
    return done


def _of_volumes(out: Path) -> dict[str, bytes]:
    done = {}
    for path in sorted(out.glob("volume_*_metadata.json")):
        name = path.name.removesuffix("_metadata.json")
        arrays = sorted(file for file in out.rglob("*") if file.is_file() and name in str(file)
                        and ".zarr" in str(file))  # fmt: skip
        done[name] = b"".join(file.read_bytes() for file in arrays)
        if len(arrays) < 4:
            raise AssertionError(f"{name} has metadata, but only {len(arrays)} files")
    return done


def _of_tiles(out: Path) -> dict[str, bytes]:
    done = {}
    for path in sorted(out.rglob("tiles/*.json")):
        if not path.name.startswith("."):
            mask = path.parent.parent / "pred_masks" / f"{path.stem}.tif"
            done[path.stem] = path.read_bytes() + mask.read_bytes()
    return done


_MULTICHANNEL = ["multichannel", "--model", "tiny:cls", "--workers", "2"]
_PANOPTIC = ["panoptic", "--embedder_spec", "tiny:pooled", "--split", "val2017", "--workers", "2"]
_STORE = ("store-*", ".store-building*", "staged-*.log", "embeddings.zarr", "index.parquet",
          "embeddings.zarr/*")  # fmt: skip


def _multichannel(*options: str):
    return lambda data, out: [
        *_MULTICHANNEL, "--manifest", f"{data}/tensors.csv", "--output-dir", str(out), *options,
    ]  # fmt: skip


def _panoptic(form: str):
    return lambda data, out: [
        *_PANOPTIC, "--data_path", str(data), "--cache_dir", str(out), "--format", form,
    ]  # fmt: skip


def _maps(data: Path, out: Path) -> list[str]:
    return [
        "maps", "--model", "tiny:map", "--input", str(data), "--output", str(out), "--recursive",
        "--layers", "3,-1", "--save_meta", "--workers", "2",
    ]  # fmt: skip


def _volumes(*options: str):
    return lambda data, out: [
        "volumes", "preprocess", "--volume-index", "0-3", "--output-dir", str(out),
        "--datasets", f"{data}/sections/datasets.yaml", "--organelles", "mito",
        "--base-resolution", "40", "--min-resolution-for-raw", "10", "--output-image-dim", "12",
        "--min-unique-ids", "1", "--model-id", "tiny:map", "--chunks", "3,6,6,6",
        "--num-threads", "2", *options,
    ]  # fmt: skip


def _cellpose(data: Path, out: Path) -> list[str]:
    return ["cellpose", "infer", "--tiles", str(data), "--output-dir", str(out), "--save-masks"]


JOBS = {
    job.name: job
    for job in (
        Job("multichannel npy", tensors, _multichannel(),
            _by_index("image_embeddings.tsv", lambda row: [row[0]]), ("*.tsv",)),
        Job("multichannel zarr", tensors, _multichannel("--format", "zarr"), _of_store, _STORE,
            True),
        Job("panoptic npy", photos, _panoptic("npy"),
            _by_index("inst2feat.tsv", lambda row: [row[2]]), ("*.tsv",)),
        Job("panoptic npz", photos, _panoptic("npz"),
            _by_index("image_index.tsv", lambda row: [row[1]]), ("*.tsv",)),
        Job("panoptic zarr", photos, _panoptic("zarr"), _of_store, _STORE, True),
        Job("maps", pictures, _maps,
            _by_index("maps.tsv", lambda row: [
                f"{row[0]}{end}" for end in
                (".npy", "_layer3.npy", "_layer-1.npy", "_mask.npy", ".json")
            ]), ("*.tsv",)),
        Job("volumes", sections, _volumes(), _of_volumes, ("*.zarr/*",), True, False),
        Job("volumes ome-zarr", sections,
            _volumes("--layout", "ome-zarr", "--shards", "3,12,12,12", "--compression"),
            _of_volumes, ("*.zarr/*",), True, False),
        Job("cellpose infer", tiles, _cellpose, _of_tiles, ("*.tsv", "*infer.json")),
    )
}  # fmt: skip


def with_postgres(config) -> Job:
    """Multichannel to .npy and a PostgreSQL of `fastembed.database.embedded`."""
    from fastembed.database import get_db_connection
    from fastembed.indexes import EMBEDDING_TABLE

    def committed(out: Path) -> dict[str, bytes]:
        with contextlib.closing(get_db_connection(config)) as connection:
            with connection.cursor() as cursor:
                cursor.execute("SELECT to_regclass(%s)", (EMBEDDING_TABLE,))
                if cursor.fetchone()[0] is None:
                    return {}
                cursor.execute(
                    f"SELECT embedding_path, text_id FROM {EMBEDDING_TABLE} "
                    "WHERE starts_with(embedding_path, %s)",
                    (f"{out.resolve()}/",),
                )
                rows = cursor.fetchall()
        done = {f"{Path(path).name} {text}": Path(path).read_bytes() for path, text in rows}
        if len(done) != len(rows):
            raise AssertionError("the table has a row twice")
        return done

    return Job(
        "multichannel postgres", tensors, _multichannel("--db", config.url), committed, ("*.tsv",)
    )
