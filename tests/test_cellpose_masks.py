"""Metrics and masks against cellpose's own functions, and the cache that thresholds share."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import tifffile
import torch

pytest.importorskip("cellpose", reason="cellpose is not installed")

from cellpose import dynamics, models, utils
from cellpose.metrics import average_precision
from cellpose_study import TINY, draw_cells, noisy_flows, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from fastembed.cellpose import masks
from fastembed.cellpose.cache import FlowCache
from fastembed.cellpose.metrics import Score, overlaps, score, summarize, summarize_groups
from fastembed.cellpose.network import (
    architecture_of,
    load_network,
    random_network,
    read_state,
)
from fastembed.signature import SignatureMismatch

CPU = torch.device("cpu")


def cellpose_score(true: np.ndarray, predicted: np.ndarray) -> Score:
    # A border of background, since cellpose takes the lowest label for it.
    framed = [np.pad(labels.astype(np.int64), 1) for labels in (true, predicted)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 0 / 0 of labels that are not there
        _, tp, fp, fn = average_precision(*framed, threshold=[0.5, 0.75, 0.9])
    return Score(*(tuple(int(n) for n in counts) for counts in (tp, fp, fn)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.booleans(), st.sampled_from([1, 3, 40]))
def test_counts_are_cellposes(seed, labels, background, gap):
    generator = np.random.default_rng(seed)
    low = 0 if background else 1
    true = generator.integers(low, low + labels, (8, 9)).repeat(3, 0)
    other = generator.integers(low, low + labels, true.shape)
    predicted = np.where(generator.random(true.shape) < generator.random(), other, true)
    true, predicted = gap * true, gap * predicted
    found = score(true, predicted)
    assert found == cellpose_score(true, predicted)
    if background and not found.both_empty:
        true[0, 0] = predicted[0, 0] = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ap = average_precision(true, predicted, threshold=[0.5, 0.75, 0.9])[0]
        np.testing.assert_allclose(score(true, predicted).ap, ap, rtol=1e-6)


def test_counts_of_real_masks_are_cellposes(real_data):
    true = tifffile.imread(real_data / "nuclei" / "mask2d.tif")
    for shift in range(8):
        predicted = np.roll(true, (shift, shift // 2), (0, 1))
        predicted[predicted % 7 == shift % 7] = 0
        assert score(true, predicted) == cellpose_score(true, predicted)


def test_an_object_at_half_in_two_pieces_is_found_once():
    true, predicted = np.zeros((2, 4), int), np.zeros((2, 4), int)
    true[0], predicted[0] = [5, 5, 5, 5], [1, 1, 2, 2]
    assert score(true, predicted) == Score((1, 0, 0), (1, 2, 2), (0, 1, 1))


def test_memory_is_that_of_pairs_that_touch():
    labels = np.arange(70_000).reshape(250, 280).repeat(2, 0).repeat(2, 1)
    pairs = overlaps(labels, np.roll(labels, 1, 1))
    assert len(pairs.iou) < 3 * 70_000  # a dense matrix has 4.9e9
    assert score(labels, labels) == Score((69_999,) * 3, (0,) * 3, (0,) * 3)


def test_means_sums_and_images_without_objects():
    empty = score(np.zeros((4, 4), int), np.zeros((4, 4), int))
    assert empty.both_empty and empty.ap == (1.0, 1.0, 1.0)
    half, wrong = Score((1, 0, 0), (1, 2, 2), (0, 1, 1)), Score((0,) * 3, (2,) * 3, (0,) * 3)
    found = summarize([half, wrong, empty])
    assert found["ap50"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert found["ap75"] == pytest.approx(1 / 3)
    assert (found["tp"], found["fp"], found["fn"]) == (1, 3, 0)
    precision, recall = 1 / (4 + 1e-8), 1 / (1 + 1e-8)
    assert found["precision"] == precision and found["recall"] == recall
    assert found["f1"] == 2 * precision * recall / (precision + recall + 1e-8)
    groups = summarize_groups(["a", "b", "c"], ["x", "y", "x"], [half, wrong, empty])
    assert groups["both_empty"] == ["c"] and groups["x"]["n_images"] == 2
    assert groups["y"]["ap50"] == 0 and groups["per_image"]["a"]["ap"][0] == 0.5
    with pytest.raises(ValueError, match="scores must not be empty"):
        summarize([])


def test_masks_of_different_shape():
    with pytest.raises(ValueError, match=r"must have one shape; got \[4, 4\] and \[4, 5\]"):
        score(np.zeros((4, 4), int), np.zeros((4, 5), int))


def flow_cases():
    """Flows as a cache has them: noise of all strengths, holes, islands, nothing, one big cell."""
    for seed, noise in enumerate((0.0, 0.7, 1.5, 4.0)):
        yield noisy_flows(draw_cells(96, 14, seed), seed, noise)
    y, x = np.mgrid[:90, :90]
    radius = np.hypot(y - 45, x - 45)
    ring = ((radius < 30) & (radius > 16)).astype(np.int32) + 2 * (radius < 9)
    yield noisy_flows(ring, 0, 0.3)
    yield noisy_flows((radius < 44).astype(np.int32), 0, 0.3)  # above max_size_fraction
    yield np.full((3, 40, 50), -8, np.float32)
    yield np.random.default_rng(0).standard_normal((3, 64, 48)).astype(np.float32)


@pytest.mark.parametrize("flows", [pytest.param(f, id=str(i)) for i, f in enumerate(flow_cases())])
def test_every_threshold_gives_the_pixels_of_cellpose(flows):
    flows = flows.astype(np.float16)
    flow, cellprob = flows[:2].astype(np.float32), flows[2].astype(np.float32)
    for cell_threshold in (-1.0, 0.0, 0.5):
        found = masks.candidates(flows, cell_threshold)
        for flow_threshold in (0.0, 0.1, 0.2, 0.4, 0.6):
            for min_size in (15, 60):
                expected = dynamics.resize_and_compute_masks(
                    flow, cellprob, cellprob_threshold=cell_threshold,
                    flow_threshold=flow_threshold, min_size=min_size, device=CPU,
                )  # fmt: skip
                got = masks.select(found, flow_threshold, min_size)
                np.testing.assert_array_equal(got, expected)
                assert got.dtype == expected.dtype


def real_flows(real_data) -> tuple[np.ndarray, np.ndarray]:
    labels = tifffile.imread(real_data / "nuclei" / "mask2d.tif")[:256, :256]
    return labels, noisy_flows(labels, 0, 1.5)


def test_real_nuclei_give_the_pixels_of_cellpose(real_data):
    _, flows = real_flows(real_data)
    for flow_threshold in (0.3, 0.5):
        expected = dynamics.resize_and_compute_masks(
            flows[:2], flows[2], flow_threshold=flow_threshold, device=CPU
        )
        got = masks.compute_masks(flows, flow_threshold=flow_threshold)
        assert got.max() > 20
        np.testing.assert_array_equal(got, expected)


def test_flow_errors_and_training_flows_are_cellposes(real_data):
    labels, flows = real_flows(real_data)
    labels = dynamics.fastremap.renumber(labels)[0]
    expected, _ = dynamics.flow_error(labels, flows[:2], CPU)
    np.testing.assert_allclose(masks.flow_errors(labels, flows[:2]), expected, rtol=1e-12)
    theirs = dynamics.labels_to_flows([labels.copy()], device=CPU)[0]
    found = masks.label_flows(labels)
    np.testing.assert_array_equal(found[:2], theirs[:2])
    np.testing.assert_allclose(found[2:], theirs[2:], rtol=2e-7)
    gaps = labels * np.uint16(3)
    np.testing.assert_array_equal(masks.label_flows(gaps)[2:], found[2:])
    assert not masks.label_flows(np.zeros((8, 8), np.uint16)).any()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(1, 12))
def test_holes_and_small_masks_are_cellposes(seed, count, min_size):
    # Noise has all there is: objects in pieces, within holes of others, and swallowed by them.
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, count + 1, (9, 10)).repeat(2, 0).repeat(2, 1)
    labels[generator.random(labels.shape) < 0.1] = 0
    labels = dynamics.fastremap.renumber(labels.astype(np.uint16))[0]
    expected = utils.fill_holes_and_remove_small_masks(labels.copy(), min_size=min_size)
    got = masks.fill_and_remove_small(labels.copy(), min_size)
    np.testing.assert_array_equal(got, expected)


def test_70000_masks():
    squares = np.kron(np.arange(1, 70_001, dtype=np.uint32).reshape(250, 280), np.ones((4, 4), int))
    squares[::4] = squares[:, ::4] = 0
    found = masks.Candidates(squares.astype(np.uint32), np.arange(70_000) / 70_000)
    assert masks.select(found, 0.0, 9).max() == 70_000
    assert masks.select(found, 0.0, 10).max() == 0
    kept = masks.select(found, 0.5, 9)
    assert kept.max() == 35_001 and kept.dtype == np.uint16


def test_flows_are_those_of_cellposes_model(tmp_path, monkeypatch):
    start = tiny_model(tmp_path)
    image = np.random.default_rng(0).integers(0, 4000, (70, 300, 3)).astype(np.uint16)
    network = load_network(start.model, device="cpu")

    def small(dtype: torch.dtype):  # cellpose itself builds the full size only
        net = random_network(TINY, seed=9)
        net.dtype = dtype
        return net

    monkeypatch.setattr(models, "CPSAM", small)
    theirs = models.CellposeModel(pretrained_model=start.model, device=CPU)
    expected, (_, flow, cellprob), _ = theirs.eval(image, cellprob_threshold=-0.1)
    flows = network.flows(image)
    np.testing.assert_array_equal(flows, np.concatenate([flow, cellprob[None]]))
    np.testing.assert_array_equal(masks.compute_masks(flows, cellprob_threshold=-0.1), expected)


def test_a_network_is_known_by_its_file(tmp_path):
    start = tiny_model(tmp_path)
    assert architecture_of(read_state(start.model)) == TINY
    state = torch.load(start.model)
    torch.save(
        {f"module.{name}": weights for name, weights in state.items()}, tmp_path / "parallel"
    )
    image = np.random.default_rng(0).integers(0, 255, (40, 40, 3)).astype(np.uint8)
    one, other = (load_network(path, device="cpu") for path in (start.model, tmp_path / "parallel"))
    np.testing.assert_array_equal(one.flows(image), other.flows(image))
    assert one.digest != other.digest


def test_models_that_are_none(tmp_path):
    old = tmp_path / "cyto3"
    torch.save({"downsample.down.res_down_0.conv.conv_0.0.weight": torch.zeros(2)}, old)
    with pytest.raises(ValueError, match="cyto3 is a model of cellpose 3, a U-Net"):
        load_network(old)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match="other is not a Cellpose-SAM model"):
        load_network(tmp_path / "other")
    (tmp_path / "text").write_text("weights")
    with pytest.raises(ValueError, match="text is not a model file"):
        load_network(tmp_path / "text")
    torch.save([1, 2], tmp_path / "list")
    with pytest.raises(ValueError, match="holds no table of weights"):
        load_network(tmp_path / "list")
    state = torch.load(tiny_model(tmp_path).model)
    del state["out.bias"]
    torch.save(state, tmp_path / "part")
    with pytest.raises(ValueError, match="part is not a whole Cellpose-SAM model"):
        load_network(tmp_path / "part")
    with pytest.raises(
        ValueError, match=r"model must be a file, random, or one of .*cpsam.*got 'cp'"
    ):
        load_network("cp")
    with pytest.raises(ValueError, match="precision must be bf16 or fp32; got 'fp16'"):
        load_network(old, precision="fp16")
    with (
        pytest.warns(UserWarning, match="random weights"),
        pytest.raises(ValueError, match="got 40"),
    ):
        load_network("random:1x40")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_no_gpu_is_said(tmp_path):
    with pytest.raises(ValueError, match="there is no CUDA device here"):
        load_network(tiny_model(tmp_path).model, device="cuda")


def test_images_that_are_none(tmp_path):
    network = tiny_model(tmp_path).load()
    with pytest.raises(ValueError, match=r"image must be \[H, W, 3\]; got shape \[9, 9\]"):
        network.flows(np.zeros((9, 9)))


def test_the_cache_runs_the_network_once_per_image(tmp_path):
    network = tiny_model(tmp_path).load()
    image = np.random.default_rng(0).integers(0, 255, (40, 40, 3)).astype(np.uint8)
    cache = FlowCache(tmp_path / "cache", network)
    first = cache.flows("x", image)
    again = FlowCache(tmp_path / "cache", network)
    np.testing.assert_array_equal(again.flows("x", image), first)
    assert (cache.passes, again.passes, again.hits) == (1, 0, 1)
    np.testing.assert_array_equal(first, network.flows(image).astype(np.float16))
    again.flows("x", image + 1)  # other pixels under the same name
    assert again.passes == 1
    exact = FlowCache(tmp_path / "exact", network, "float32").flows("x", image)
    np.testing.assert_array_equal(exact, network.flows(image))


def test_the_cache_of_another_network_is_refused(tmp_path):
    FlowCache(tmp_path / "cache", tiny_model(tmp_path, 0).load())
    with pytest.raises(SignatureMismatch, match="model: "):
        FlowCache(tmp_path / "cache", tiny_model(tmp_path, 1).load())
    with pytest.raises(SignatureMismatch, match="dtype: 'float16' there, 'float32' now"):
        FlowCache(tmp_path / "cache", tiny_model(tmp_path, 0).load(), "float32")


def test_a_cache_entry_that_was_cut_off_is_made_again(tmp_path):
    network = tiny_model(tmp_path).load()
    image = np.random.default_rng(0).integers(0, 255, (40, 40, 3)).astype(np.uint8)
    cache = FlowCache(tmp_path / "cache", network)
    whole = cache.flows("x", image)
    (tmp_path / "cache" / "x.zarr").rename(tmp_path / "cache" / "x.part")  # killed before rename
    np.testing.assert_array_equal(cache.flows("x", image), whole)
    assert cache.passes == 2 and not (tmp_path / "cache" / "x.part").exists()
