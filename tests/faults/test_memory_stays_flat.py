"""The short form of memory.py: what Python and NumPy hold, which is steadier than a process."""

from __future__ import annotations

import tracemalloc

import memory
import pytest
from conftest import TinyEngine

SAMPLES = 2000
BOUND = 0.7  # MB per 1,000 samples: names, in a few sets


class Hoarder(TinyEngine):
    """Keeps what it was fed."""

    def __init__(self) -> None:
        super().__init__(batch_size=64, size=8)
        self.kept = []

    def __call__(self, batch):
        self.kept.append(batch.numpy().copy())
        return super().__call__(batch)


@pytest.fixture
def growth(tmp_path, monkeypatch):
    """Of a run over tiny samples, by form and engine: MB per 1,000."""
    monkeypatch.setattr("fastembed.pipeline.run._COMMIT_SECONDS", 0.05)

    def measured(form: str, engine=None) -> float:
        tracemalloc.start()
        try:
            readings = memory.measure(
                SAMPLES, form, memory.Made(SAMPLES), tmp_path / form, memory.traced, engine
            )
        finally:
            tracemalloc.stop()
        return memory.slope(readings, SAMPLES)

    return measured


@pytest.mark.parametrize("form", ["npy", "zarr"])
def test_memory_grows_by_the_names_alone(growth, form):
    if form == "zarr":
        pytest.importorskip("tensorstore", reason="tensorstore is not installed (extra zarr)")
    assert growth(form) < BOUND


def test_a_leak_shows(growth):
    assert growth("npy", Hoarder()) > BOUND
