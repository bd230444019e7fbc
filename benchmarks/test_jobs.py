"""Whole jobs beside the plain way of doing them, on the same files and weights.

"to model input" starts at the files and ends at the filled batch, on one thread. "end to end"
starts at the files and ends at the written vectors: each library at its own defaults, all
threads; the row tells what share of the time the engine computed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import jobs
import numpy as np
import pytest
import torch

from fastembed.engines.gate import COSINE
from fastembed.engines.upstream import upstream

PHOTOS = {"COCO photo": True, "generated photos": False}


@pytest.fixture(scope="module", params=[(job, kind) for job in jobs.JOBS for kind in PHOTOS])
def photos(request):
    job, kind = request.param
    if PHOTOS[kind] and not jobs.REAL.is_dir():
        pytest.skip(f"no real photo: {jobs.REAL} is missing (set FASTEMBED_DATA)")
    return job, kind


@pytest.fixture(scope="module")
def job(photos, tmp_path_factory):
    name, kind = photos
    return jobs.JOBS[name](tmp_path_factory.mktemp("job"), 4, PHOTOS[kind])


@pytest.fixture(scope="module")
def model(photos):
    return upstream(jobs.JOBS[photos[0]].spec)


def describe(job) -> str:
    return f"{job.images} photos, {job.units} {job.unit}s"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("contender", ["NumPy, Pillow, the model's transform", "recipe"])
def test_to_model_input(row, photos, job, model, contender):
    out = torch.empty(job.units, *job.CONTRACT.shape)
    expected = job.plain_inputs(model.prepare)
    assert (job.our_inputs(out) - expected).abs().max() <= job.tolerance

    def ours():
        return job.our_inputs(out)

    def plain():
        return job.plain_inputs(model.prepare)

    benchmark = row(
        f"{photos[0]}, {photos[1]}, files to model input", contender, dtype="float32",
        shape=describe(job), images=job.images, units=job.units, baseline=contender != "recipe",
        exactness=f"within {job.tolerance}" if job.tolerance else "bits",
    )  # fmt: skip
    benchmark.pedantic(ours if contender == "recipe" else plain, rounds=7, warmup_rounds=1)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("contender", ["upstream", "engine"])
def test_end_to_end(row, photos, job, model, tmp_path, contender):
    def fresh():
        return (Path(tempfile.mkdtemp(dir=tmp_path)),), {}

    shares = []
    if contender == "upstream":
        name, cosine = f"{model.origin} fp32, one photo per call", ""

        def work(folder):
            job.plain_run(folder, model)
    else:
        engine = job.engine(model.save(tmp_path))
        name = f"engine {engine.precision}"

        def work(folder):
            report = job.our_run(folder, engine)
            shares.append(report.engine_busy)

        (theirs,), _ = fresh()
        job.plain_run(theirs, model)
        (ours,), _ = fresh()
        work(ours)
        cosine = lowest_cosine(theirs, ours)
        assert cosine >= COSINE, cosine
    benchmark = row(
        f"{photos[0]}, {photos[1]}, files to files", name, shape=describe(job),
        images=job.images, units=job.units, baseline=contender == "upstream",
        exactness=cosine and f"cosine {cosine:.6f}",
    )  # fmt: skip
    benchmark.pedantic(work, setup=fresh, rounds=3)
    if shares:
        benchmark.extra_info["busy"] = float(np.median(shares))


def lowest_cosine(one: Path, other: Path) -> float:
    """Of vectors, or of the patches of maps."""
    names = sorted(path.name for path in one.glob("*.npy") if not path.stem.endswith("_mask"))
    assert {*names} <= {path.name for path in other.glob("*.npy")}
    a, b = (
        np.stack([np.load(folder / name) for name in names]).astype(np.float64)
        for folder in (one, other)
    )
    # A map [D, h, w] has a vector per patch: axis 1 is D in either case.
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / norms).min())
