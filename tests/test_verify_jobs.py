"""verify of what has an index of its own: tiles of an inference, volumes, PostgreSQL; the command."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from test_verify import flip, kinds, tree

from fastembed.commands import FILE_NAME as RUNS
from fastembed.commands import Command
from fastembed.runlock import FolderBusy, RunLock
from fastembed.verify import NotRecognised, findings, repair, verify


@pytest.fixture
def inference(tmp_path):
    """A folder of tiles' counts and masks, and what makes it."""
    pytest.importorskip("cellpose", reason="cellpose is not installed")
    pytest.importorskip("tifffile", reason="tifffile is not installed")
    import test_cellpose_infer as job

    for i in range(5):
        place = tmp_path / "in" / "gfap" / f"{job.DONORS[i % 3]}_slide"
        place.mkdir(parents=True, exist_ok=True)
        for channel, plane in zip(("c0", "c1"), job.tile(i), strict=True):
            job.tifffile.imwrite(place / f"field{i}_b0{channel}.tif", plane)

    def run(out, **options):
        return job.run(tmp_path / "in", out, keep_masks=True,
                       command=Command(("test",), "/", "0"), **options)  # fmt: skip

    run(tmp_path / "whole")
    return run


def first(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


TILE_DAMAGES = {
    "a record": (lambda f: flip(first(f, "tiles/*.json")), findings.DAMAGED),
    "a cut record": (lambda f: os.truncate(first(f, "tiles/*.json"), 9), findings.DAMAGED),
    "a mask": (lambda f: flip(first(f, "pred_masks/*.tif")), findings.DAMAGED),
    "no record": (lambda f: first(f, "tiles/*.json").unlink(), findings.ORPHAN),
    "no mask": (lambda f: first(f, "pred_masks/*.tif").unlink(), findings.MISSING),
    "the table": (lambda f: flip(f / "tile_counts.tsv"), findings.STALE),
    "the list": (lambda f: os.truncate(f / "checksums.tsv", 150), findings.OPEN),
    "the settings": (lambda f: flip(f / "fastembed.json", 30), findings.SETTINGS),
}


@pytest.mark.parametrize("damage", TILE_DAMAGES)
def test_tiles(inference, tmp_path, damage):
    run, out = inference, tmp_path / "out"
    run(out)
    assert tree(out) == tree(tmp_path / "whole")
    verdict = verify(out)
    assert verdict.sound and verdict.outputs == 5 and verdict.verified == 10
    do, kind = TILE_DAMAGES[damage]
    do(out)
    assert kind in kinds(verify(out))
    done = repair(out, lambda names: run(out, only=names))
    assert done.after.sound, done.after.findings
    assert tree(out) == tree(tmp_path / "whole")
