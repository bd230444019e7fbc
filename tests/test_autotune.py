"""The probe: what it chooses, and that no choice changes a bit."""

from __future__ import annotations

import time

import pytest
import torch
from conftest import TinyEngine, read_outputs

from fastembed import MultiCrop, NpyPerSample, Percentile, TensorCsv, Tsv, extract, load_engine
from fastembed.pipeline import autotune
from fastembed.pipeline.autotune import tune

RECIPE = MultiCrop(Percentile(), n_crops=3)


class Resizable(TinyEngine):
    """Takes a fixed time per batch, so that larger batches are faster."""

    resizable = True

    def __init__(self, batch_size: int = 8, seconds: float = 0.02, wrong_at: int = 0) -> None:
        super().__init__(batch_size)
        self.seconds, self.wrong_at = seconds, wrong_at

    def resized(self, batch_size: int) -> Resizable:
        return Resizable(batch_size, self.seconds, self.wrong_at)

    def settings(self) -> dict:
        return {"spec": "resizable", "batch_size": self.batch_size}

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        features = super().__call__(batch)
        if self.batch_size == self.wrong_at:
            features[-1, -1] += 1e-7  # one number of one row, by its last bits
        return features


def plan_for(plates, engine, count=1000, workers=None, slots=None, source=None):
    source = source or TensorCsv(plates.manifest)
    return tune(source, RECIPE, engine, source.items, count, workers, slots)


def test_a_larger_batch_is_taken_where_it_is_faster_and_the_bits_are_the_same(plates):
    plates.fill(6)
    plan = plan_for(plates, Resizable())
    assert plan.engine.batch_size == 64  # eight times its own is the most
    assert "batch 64" in str(plan)


def test_a_batch_with_other_bits_is_never_taken(plates):
    plates.fill(6)
    assert plan_for(plates, Resizable(wrong_at=16)).engine.batch_size == 8
    assert plan_for(plates, Resizable(wrong_at=32)).engine.batch_size == 16


def test_a_batch_that_does_not_fit_is_not_taken(plates):
    class Small(Resizable):
        def resized(self, batch_size):
            other = Small(batch_size)
            if batch_size > 16:
                other.__class__ = Full
            return other

    class Full(Small):
        def __call__(self, batch):
            raise torch.OutOfMemoryError("no room")

    plates.fill(6)
    assert plan_for(plates, Small()).engine.batch_size == 16


def test_long_batches_stay_as_they_are(plates, monkeypatch):
    monkeypatch.setattr(autotune, "_SHORT", 0.01)
    plates.fill(6)
    assert plan_for(plates, Resizable()).engine.batch_size == 8


def test_readers_keep_up_with_the_engine(plates, monkeypatch):
    """Slow reading that waits gets threads beyond the cores, a slow engine only one more."""
    monkeypatch.setattr(autotune.os, "sched_getaffinity", lambda _: {0, 1})
    plates.fill(6)
    source = TensorCsv(plates.manifest)
    read = source.read

    def slow_read(*arguments):
        time.sleep(0.06)
        return read(*arguments)

    source.read = slow_read
    waiting = plan_for(plates, Resizable(seconds=0.05), source=source, workers=None)
    assert waiting.workers > 4
    slow_engine = plan_for(plates, Resizable(seconds=2.0))
    assert slow_engine.workers <= 3
    assert waiting.slots >= 3


def test_what_is_given_is_kept(plates):
    plates.fill(6)
    plan = plan_for(plates, TinyEngine(), workers=7, slots=5)
    assert (plan.workers, plan.slots, plan.engine.batch_size) == (7, 5, 8)
    assert plan.why == "as given"
    assert plan_for(plates, Resizable(), workers=7).workers == 7


def test_a_short_run_is_not_probed(plates):
    plates.fill(3)
    engine = Resizable()
    assert "no probe" in plan_for(plates, engine, count=99).why
    assert engine.calls == 0


def test_bad_samples_do_not_stop_the_probe(plates):
    plates.add("missing.npy", None)
    plates.add("torn.npy", b"\x93NUMPY")
    assert "too few" in plan_for(plates, Resizable()).why
    plates.fill(6)
    assert "probe of" in plan_for(plates, Resizable()).why


def test_no_choice_changes_a_bit_of_a_run(plates, tmp_path, monkeypatch):
    """A folder that one choice began goes on with another: one signature, the same bytes."""
    plates.fill(8)
    monkeypatch.setattr(autotune, "_WORTH", 0)

    def run(folder, **options):
        return extract(
            TensorCsv(plates.manifest), RECIPE, Resizable(), NpyPerSample(folder), Tsv(folder),
            **options,
        )  # fmt: skip

    tuned = run(tmp_path / "tuned")
    assert "batch 64" in tuned.plan
    monkeypatch.setattr(autotune, "_LARGEST", 1)
    plain = run(tmp_path / "plain", workers=1, slots=3)
    assert "batch 8" in plain.plan
    assert read_outputs(tmp_path / "tuned") == read_outputs(tmp_path / "plain")
    assert run(tmp_path / "tuned").already_done == 8


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_real_model_has_the_same_bits_in_a_resized_batch(precision):
    with pytest.warns(UserWarning, match="RANDOM"):
        engine = load_engine(
            "timm:vit_tiny_patch16_224", weights="random", size=64, precision=precision,
            device="cpu",
        )  # fmt: skip
    assert engine.resizable and engine.batch_size == 16
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(32, *engine.contract.shape, generator=generator).to(engine.contract.dtype)
    halves = torch.cat([engine(rows[:16]), engine(rows[16:])])
    assert torch.equal(engine.resized(32)(rows), halves)
    with pytest.warns(UserWarning):
        fixed = load_engine("timm:vit_tiny_patch16_224", weights="random", batch_size=4, size=64)
    assert not fixed.resizable
    with pytest.raises(ValueError, match="batch_size is fixed at 4"):
        fixed.resized(8)
