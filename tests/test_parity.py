"""`fastembed parity`, and the gate that it shares: they must be able to fail."""

from __future__ import annotations

import json

import pytest
import torch

from fastembed.cli import main
from fastembed.engines import gate, load_engine, parity
from fastembed.engines.models import huggingface
from fastembed.engines.models.backbone import IMAGENET

pytest.importorskip("transformers")

TINY = "facebook/dinov3-tiny"


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    monkeypatch.setitem(huggingface.KNOWN, TINY, huggingface._dinov3(64, 2, 2, 128))


def load(precision: str = "bf16", seed: int = 0):
    with pytest.warns(UserWarning, match="RANDOM"):
        return load_engine(
            f"transformers:{TINY}", weights="random", precision=precision, size=64,
            batch_size=4, device="cpu", seed=seed,
        )  # fmt: skip


def test_report(tmp_path, capsys):
    spec = f"transformers:{TINY}"
    assert main(["parity", spec, "--out", str(tmp_path / "report")]) == 0
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [(row["precision"], row["failed"]) for row in rows] == [("fp32", ""), ("bf16", "")]
    assert rows[0]["cosine"] > rows[1]["cosine"] > 0.999
    assert rows[0]["same_bits"] and rows[0]["input_levels"] < 0.01
    report = (tmp_path / "report.md").read_text()
    assert "2 of 2 rows hold every gate" in report and f"| `{spec}` | transformers" in report
    assert "bf16 against transformers" in capsys.readouterr().out


@pytest.mark.parametrize(
    "broken,message",
    [
        ("statistics", "input differs by"),
        ("weights", "cosine"),
        ("batch", "bits depend on the batch"),
    ],
)
def test_what_is_wrong_is_found(monkeypatch, capsys, broken, message):
    if broken == "statistics":
        monkeypatch.setattr(huggingface, "statistics", lambda name: (IMAGENET[1], IMAGENET[0]))
    elif broken == "weights":
        read = huggingface.read_weights

        def nudged(path):
            state, digest = read(path)
            return {k: v + 0.003 * v.abs().max() for k, v in state.items()}, digest

        monkeypatch.setattr(huggingface, "read_weights", nudged)
    else:
        whole = parity.load_engine

        def uneven(*arguments, **options):
            engine = whole(*arguments, **options)
            run = engine.run
            engine.run = lambda x: tuple(
                y * (1 + 1e-7 * float((x != 0).sum() > x.numel() / 2)) for y in run(x)
            )
            return engine

        monkeypatch.setattr(parity, "load_engine", uneven)
    assert main(["parity", f"transformers:{TINY}", "--precision", "fp32"]) == 1
    assert f"MISSED: {message}" in capsys.readouterr().out


def test_specs_without_upstream_are_named(capsys):
    assert main(["parity", "dinov3:/some/config.yaml"]) == 1
    assert "dinov3:/some/config.yaml is not one of vits16" in capsys.readouterr().err


def test_files_have_the_same_bytes_on_every_machine():
    import hashlib

    from PIL import Image

    first, again = parity.image_files(), parity.image_files()
    assert first == again and len({hashlib.sha256(data).digest() for data in first}) == 8
    import io

    kinds = {Image.open(io.BytesIO(data)).format for data in first}
    assert kinds == {"JPEG", "PNG"}


# --- the gate ---------------------------------------------------------------------------------


def test_a_precision_that_keeps_the_numbers_passes_once(monkeypatch):
    measured = []
    lowest = gate.lowest_cosine
    monkeypatch.setattr(
        gate, "lowest_cosine", lambda *pair: measured.append(lowest(*pair)) or measured[-1]
    )
    load(seed=11)
    load(seed=11)
    assert len(measured) == 1 and 0.999 < measured[0] < 1
    load(seed=12)
    assert len(measured) == 2
    load("fp32", seed=13)
    assert len(measured) == 2
    monkeypatch.setattr(gate, "_machine", lambda device: "another processor")
    load(seed=11)
    assert len(measured) == 3


def test_a_precision_that_does_not_is_refused_with_the_figure_every_time(monkeypatch):
    cast = torch.bfloat16

    def coarse(module, device, dtype):
        module.to(device=device, dtype=dtype)
        for p in module.parameters():
            if dtype == cast and p.ndim > 1:
                p.copy_((p.float() * 8).round() / 8)

    monkeypatch.setattr("fastembed.engines.runtimes.torch_runtime.cast", coarse)
    for _ in range(2):  # the second time from the cache
        with pytest.raises(ValueError, match=r"bf16 has a cosine of 0\.\d{6} .*precision='fp32'"):
            load(seed=14)


def test_a_cache_that_is_broken_or_read_only_costs_a_measurement(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTEMBED_CACHE", str(tmp_path))
    load(seed=15)
    [verdict] = tmp_path.glob("gates/*.json")
    verdict.write_text("{")
    load(seed=15)
    assert json.loads(verdict.read_text())["cosine"] > 0.999
    monkeypatch.setenv("FASTEMBED_CACHE", "/proc/nowhere")
    load(seed=15)


def test_nan_is_no_agreement():
    good = torch.ones(2, 8)
    bad = good.clone()
    bad[1, 3] = torch.nan
    assert gate.lowest_cosine(good, good) == pytest.approx(1)
    assert gate.lowest_cosine(bad, good) == -1
