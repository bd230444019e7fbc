"""The steps of the study: training and resuming, evaluation, sweeps, gates, budgets, markers."""

from __future__ import annotations

import json
import random
import warnings

import numpy as np
import pytest
import tifffile
import torch

pytest.importorskip("cellpose", reason="cellpose is not installed")

from cellpose.train import train_seg
from cellpose_study import MARKERS, Oracle, draw_tiles, tiny_model

from fastembed.cellpose.dataset import list_examples, prepare
from fastembed.cellpose.evaluate import Predictor, Thresholds, evaluate, predict
from fastembed.cellpose.experiment import budget_curve, budget_sample, leave_one_marker_out
from fastembed.cellpose.gate import Gate, gate, measure
from fastembed.cellpose.metrics import score, summarize
from fastembed.cellpose.network import Architecture, Pretrained, load_network
from fastembed.cellpose.sweep import first_best, sample_per_marker, sensitivity, sweep
from fastembed.cellpose.tables import read_tsv, write_tsv
from fastembed.cellpose.train import TrainSettings, train
from fastembed.cli import main
from fastembed.signature import SignatureMismatch


class Killed(BaseException):
    """What stands for a kill."""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Gradients have the same bits in every run only then; networks this small are faster so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    draw_tiles(folder / "tiles")
    prepare(folder / "tiles", folder / "data")
    return folder / "data"


@pytest.fixture(scope="module")
def splits(data):
    return {split: list_examples(data, split) for split in ("train", "val", "test")}


def weights(path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def assert_same_weights(one, other) -> None:
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


SHORT = TrainSettings(epochs=7, learning_rate=1e-3, checkpoint_every=2, nimg_per_epoch=4)


def test_training_is_cellposes_with_losses_and_best_weights(tmp_path, splits):
    start = tiny_model(tmp_path)
    shown = []
    trained = train(
        start.load(), splits["train"], splits["val"], tmp_path / "run", "net", SHORT, shown.append
    )
    images = {
        split: [np.ascontiguousarray(e.image().transpose(2, 0, 1)) for e in splits[split]]
        for split in ("train", "val")
    }
    labels = {
        split: [e.mask().astype(np.int32) for e in splits[split]] for split in ("train", "val")
    }
    net = start.load().model.net
    torch.manual_seed(SHORT.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path, train_losses, test_losses = train_seg(
            net, train_data=images["train"], train_labels=labels["train"],
            test_data=images["val"], test_labels=labels["val"], batch_size=2, learning_rate=1e-3,
            n_epochs=7, nimg_per_epoch=4, save_path=tmp_path, model_name="theirs",
        )  # fmt: skip
    assert_same_weights(trained.last, path)
    rows = read_tsv(tmp_path / "run" / "losses.tsv")
    assert [float(row["train_loss"]) for row in rows] == pytest.approx(list(train_losses))
    measured = {int(row["epoch"]): float(row["test_loss"]) for row in rows if row["test_loss"]}
    assert measured == pytest.approx({0: test_losses[0], 5: test_losses[5]})
    assert [epoch.epoch for epoch in shown] == list(range(7))

    assert trained.best_epoch == 5  # the only one after the first that cellpose measures
    six = TrainSettings(epochs=6, learning_rate=1e-3, nimg_per_epoch=4)
    shorter = train(start.load(), splits["train"], splits["val"], tmp_path / "six", "net", six)
    assert_same_weights(trained.best, shorter.last)
    assert (tmp_path / "run" / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "run" / "resume.pt").exists()


@pytest.mark.parametrize("killed_in", [1, 4])
def test_a_training_that_was_killed_ends_with_the_same_bits(tmp_path, splits, killed_in):
    start = tiny_model(tmp_path)
    whole = train(start.load(), splits["train"], splits["val"], tmp_path / "whole", "net", SHORT)

    def kill(epoch):
        if epoch.epoch == killed_in:
            raise Killed

    arguments = (splits["train"], splits["val"], tmp_path / "cut", "net", SHORT)
    with pytest.raises(Killed):
        train(start.load(), *arguments, kill)
    seen = []
    torch.manual_seed(77)  # the state of the process does not matter
    rest = train(start.load(), *arguments, seen.append)
    assert rest.resumed_at == seen[0].epoch == 2 * (killed_in // 2)
    assert_same_weights(whole.last, rest.last)
    assert_same_weights(whole.best, rest.best)
    assert (tmp_path / "cut" / "losses.tsv").read_bytes() == (
        tmp_path / "whole" / "losses.tsv"
    ).read_bytes()

    done = train(start.load(), *arguments, kill)  # nothing left to do
    assert done.resumed_at == SHORT.epochs and done.best_epoch == whole.best_epoch
    other = TrainSettings(epochs=7, learning_rate=2e-3)
    with pytest.raises(SignatureMismatch, match=r"learning_rate: 0.001 there, 0.002 now"):
        train(start.load(), splits["train"], splits["val"], tmp_path / "cut", "net", other)


def test_training_leaves_the_random_state_of_the_process_alone(tmp_path, splits):
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    one = TrainSettings(epochs=1)
    train(tiny_model(tmp_path).load(), splits["train"], [], tmp_path / "run", "net", one)
    np.testing.assert_array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


def test_images_with_few_objects_are_left_out_by_name(tmp_path, splits):
    counts = {e.stem: len(np.unique(e.mask())) - 1 for e in splits["train"]}
    least = min(counts.values())
    one = TrainSettings(epochs=1, min_train_masks=least + 1)
    net = tiny_model(tmp_path).load()
    trained = train(net, splits["train"], splits["val"], tmp_path / "run", "net", one)
    assert trained.dropped == {stem: n for stem, n in counts.items() if n <= least}
    report = json.loads((tmp_path / "run" / "train.json").read_text())
    assert report["dropped_by_min_train_masks"] == trained.dropped
    assert set(report["images"]) == set(trained.used) == counts.keys() - trained.dropped.keys()
    none = TrainSettings(epochs=1, min_train_masks=99)
    with pytest.raises(ValueError, match="no image has min_train_masks=99 objects or more"):
        train(net, splits["train"], splits["val"], tmp_path / "none", "net", none)


def test_settings_that_make_no_sense():
    with pytest.raises(ValueError, match="epochs must be at least 1; got 0"):
        TrainSettings(epochs=0)
    with pytest.raises(ValueError, match="scale_range must be from 0 to 2; got 3"):
        TrainSettings(scale_range=3)


def test_evaluate_leaves_masks_and_metrics_that_agree(tmp_path, splits):
    predictor = Predictor(Oracle(splits["test"]))
    metrics = evaluate(predictor, splits["test"], Thresholds(), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == json.loads(
        json.dumps(metrics)
    )
    scores = [
        score(e.mask(), tifffile.imread(tmp_path / "out" / f"{e.stem}_pred.tif"))
        for e in splits["test"]
    ]
    assert metrics["overall"] == summarize(scores)
    assert metrics["overall"]["ap50"] > 0.7
    assert metrics["gfap"]["n_images"] == metrics["iba1"]["n_images"] == 1
    assert metrics["settings"]["flow_threshold"] == 0.4


def test_predict_goes_on_and_refuses_other_thresholds(tmp_path, splits):
    oracle = Oracle(splits["test"])
    assert predict(Predictor(oracle), splits["test"], Thresholds(), tmp_path) == 2
    next(tmp_path.glob("iba1*_pred.tif")).unlink()
    assert predict(Predictor(oracle), splits["test"], Thresholds(), tmp_path) == 1
    assert oracle.calls == 3
    with pytest.raises(SignatureMismatch, match=r"flow_threshold: 0.4 there, 0.2 now"):
        predict(Predictor(oracle), splits["test"], Thresholds(flow=0.2), tmp_path)


def test_a_sweep_runs_the_network_once_per_image_and_equals_single_evaluations(tmp_path, splits):
    examples = splits["val"] + splits["test"]
    oracle = Oracle(examples, noise=2.5)
    predictor = Predictor(oracle, tmp_path / "cache")
    selected = sweep(predictor, splits["val"], splits["test"], tmp_path / "study", "net")
    assert oracle.calls == len(examples)

    rows = read_tsv(tmp_path / "study" / "reports" / "e1_threshold_sweep_net_val.tsv")
    assert len(rows) == 15
    for row in rows:
        point = Thresholds(float(row["flow_threshold"]), float(row["cellprob_threshold"]))
        alone = evaluate(predictor, splits["val"], point)["overall"]
        assert {k: float(row[k]) for k in ("ap50", "f1", "tp", "fp", "fn")} == {
            k: alone[k] for k in ("ap50", "f1", "tp", "fp", "fn")
        }
    assert len({row["f1"] for row in rows}) > 3  # the points do differ
    best = rows[int(np.argmax([float(row["f1"]) for row in rows]))]  # argmax: the first of equals
    assert selected["flow_threshold"] == float(best["flow_threshold"])
    assert selected["cellprob_threshold"] == float(best["cellprob_threshold"])
    point = Thresholds(selected["flow_threshold"], selected["cellprob_threshold"])
    assert selected["test_f1"] == evaluate(predictor, splits["test"], point)["overall"]["f1"]

    sweep(predictor, splits["val"], splits["test"], tmp_path / "study", "other", by="ap50")
    sweep(predictor, splits["val"], splits["test"], tmp_path / "study", "net")
    table = read_tsv(tmp_path / "study" / "reports" / "e1_threshold_selected_test.tsv")
    assert [row["model_alias"] for row in table] == ["other", "net"]
    with pytest.raises(ValueError, match="by must be f1 or ap50; got 'iou'"):
        sweep(predictor, splits["val"], splits["test"], tmp_path / "study", "net", by="iou")


def test_the_first_of_equals_is_best():
    rows = [{"f1": 0.2, "n": 0}, {"f1": 0.5, "n": 1}, {"f1": 0.5, "n": 2}]
    assert first_best(rows, "f1")["n"] == 1


def test_gates_keep_what_a_loop_over_objects_keeps(tmp_path, splits):
    example = splits["test"][0]
    labels, marker = example.mask(), example.image()[..., 1]
    for chosen in (Gate(), Gate(0.3, 0.9, 90), Gate(0.0, 0.97, 1), Gate(0, 1, 10**6)):
        low, high = (
            np.percentile(marker, 100 * chosen.q_low),
            np.percentile(marker, 100 * chosen.q_high),
        )
        expected, number = np.zeros_like(labels), 0
        for label in np.unique(labels)[1:]:
            inside = labels == label
            if inside.sum() >= chosen.min_area and low <= marker[inside].mean() <= high:
                number += 1
                expected[inside] = number
        np.testing.assert_array_equal(measure(labels, marker).gated(chosen), expected)
    assert Gate(0.02, 0.98, 60).tag == "q2_98_a60"
    with pytest.raises(ValueError, match="q_low < q_high"):
        Gate(0.5, 0.5, 1)


def test_gating_chooses_on_val_and_reports_raw_beside_gated(tmp_path, splits):
    predictor = Predictor(Oracle(splits["val"] + splits["test"], 2.0))
    final = gate(
        predictor, splits["val"], splits["test"], tmp_path, "net",
        q_low=(0.0, 0.5, 1.0), q_high=(1.0, 0.6), min_area=(1, 90),
    )  # fmt: skip
    grid = read_tsv(tmp_path / "reports" / "e3_gating_val_grid_net.tsv")
    assert len(grid) == 8
    best = grid[int(np.argmax([float(row["gated_f1"]) for row in grid]))]
    assert (final["q_low"], final["q_high"], final["min_area"]) == (
        float(best["q_low"]), float(best["q_high"]), int(best["min_area"]),
    )  # fmt: skip
    raw = evaluate(predictor, splits["test"], Thresholds())["overall"]["f1"]
    assert final["test_raw_f1"] == raw
    gated = [
        score(
            e.mask(),
            tifffile.imread(tmp_path / "predictions/net/test/gated" / f"{e.stem}_pred_gated.tif"),
        )
        for e in splits["test"]
    ]
    assert final["test_gated_f1"] == summarize(gated)["f1"]
    tag = Gate(final["q_low"], final["q_high"], final["min_area"]).tag
    rows = read_tsv(tmp_path / "reports" / f"e3_gating_net_test_{tag}.tsv")
    rows = {row["group"]: row for row in rows}
    assert rows.keys() == {"overall", *MARKERS}
    delta = final["test_gated_f1"] - raw
    assert float(rows["overall"]["delta_f1"]) == pytest.approx(delta)
    with pytest.raises(ValueError, match="no gate has q_low < q_high"):
        gate(predictor, splits["val"], splits["test"], tmp_path, "net", q_low=(1,), q_high=(1,))


def test_sensitivity_maps_density_to_flow_threshold_on_a_seeded_sample(tmp_path, splits):
    examples = splits["train"]
    predictor = Predictor(Oracle(examples, 2.5), tmp_path / "cache")
    rows = sensitivity(predictor, examples, tmp_path, points_per_side=(16, 32, 64), num_tiles=2)
    generator, expected = random.Random(2024), []
    for marker in MARKERS:
        expected += generator.sample([e for e in examples if e.marker == marker], 2)
    assert sample_per_marker(examples, 2, 2024) == expected
    for pps, flow in ((16, 0.6), (32, 0.4), (64, 0.2)):
        alone = evaluate(predictor, expected, Thresholds(flow=flow))
        for group in ("overall", *MARKERS):
            row = next(r for r in rows if r["pps"] == pps and r["group"] == group)
            assert row["flow_threshold"] == flow
            assert (row["ap50"], row["tp"]) == (alone[group]["ap50"], alone[group]["tp"])
    assert (tmp_path / "reports/microsam/e4_microsam_proxy_sweep_n2_seed2024.json").exists()
    sampled = read_tsv(tmp_path / "reports/microsam/sampled_tiles_n2_seed2024.tsv")
    assert [row["image"] for row in sampled] == [str(e.image_path) for e in expected]


BRIEF = TrainSettings(epochs=2, nimg_per_epoch=5, nimg_test_per_epoch=1, min_train_masks=1)


def test_budgets_are_drawn_by_the_studys_seeds_and_go_on_after_a_kill(tmp_path, splits):
    chosen, seed = budget_sample(splits["train"], 2, 1)
    generator, expected = random.Random(2024 + 2000 + 1), []
    for marker in MARKERS:
        expected += generator.sample([e for e in splits["train"] if e.marker == marker], 2)
    assert (chosen, seed) == (expected, 4025)

    counts = {e.stem: len(np.unique(e.mask())) - 1 for e in splits["train"]}
    settings = TrainSettings(
        epochs=2, nimg_per_epoch=5, nimg_test_per_epoch=9, min_train_masks=min(counts.values()) + 1
    )
    start, folder = tiny_model(tmp_path), tmp_path / "budget"
    seen = []

    def kill(epoch):
        seen.append(epoch)
        if len(seen) == 4:
            raise Killed

    def run(progress=None, shard=(0, 1), into=folder):
        return budget_curve(
            start, splits["train"], splits["val"], splits["val"], into, budgets=(1, 9),
            repeats=2, settings=settings, progress=progress, shard=shard, keep_models=False,
        )  # fmt: skip

    with pytest.raises(Killed):
        run(kill)
    records = run(seen.append)
    assert len(seen) == 4 + 6  # one run was done, three were left
    assert run(kill) == records
    assert [(r["budget"], r["repeat"], r["seed"]) for r in records] == [
        (1, 0, 3024), (1, 1, 3025), (9, 0, 11024), (9, 1, 11025),
    ]  # fmt: skip
    for record in records:
        drawn, _ = budget_sample(splits["train"], record["budget"], record["repeat"])
        used = [e.stem for e in drawn if counts[e.stem] >= settings.min_train_masks]
        assert record["train_n_asked"] == 2 * record["budget"]
        assert (record["train_n_drawn"], record["train_n"]) == (len(drawn), len(used))
        assert record["nimg_per_epoch"] == min(5, len(used))
    assert records[-1]["train_n_drawn"] == 6 and records[-1]["train_n"] < 6
    summary = json.loads((folder / "summary.json").read_text())
    values = [r["overall_ap50"] for r in records[2:]]
    assert summary["9"]["overall_ap50"] == {
        "mean": sum(values) / 2, "min": min(values), "max": max(values),
    }  # fmt: skip
    assert not list(folder.rglob("models/*"))

    for part in range(2):
        run(shard=(part, 2), into=tmp_path / "parts")
    assert (tmp_path / "parts" / "records.tsv").read_bytes() == (
        folder / "records.tsv"
    ).read_bytes()
    with pytest.raises(ValueError, match="b1_r0 is a run of other settings"):
        budget_curve(
            start, splits["train"], splits["val"], splits["val"], folder, budgets=(1,),
            repeats=1, settings=BRIEF,
        )  # fmt: skip


def test_lomo_trains_on_the_other_markers_and_tests_on_the_one(tmp_path, splits):
    row = leave_one_marker_out(
        tiny_model(tmp_path), "gfap", *splits.values(), tmp_path / "study", BRIEF
    )
    used = json.loads((tmp_path / "study/checkpoints/lomo_excl_gfap/train.json").read_text())
    assert used["images"] == [e.stem for e in splits["train"] if e.marker == "iba1"]
    assert used["test_images"] == [e.stem for e in splits["val"] if e.marker == "iba1"]
    metrics = json.loads(
        (tmp_path / "study/predictions/lomo_excl_gfap/test_heldout/metrics.json").read_text()
    )
    assert metrics["heldout_marker"] == "gfap"
    assert metrics["per_image"].keys() == {e.stem for e in splits["test"] if e.marker == "gfap"}
    assert row["ap50"] == metrics["overall"]["ap50"] and row["n_test_images"] == 1
    with pytest.raises(ValueError, match="there is no test image of marker 'neun'"):
        leave_one_marker_out(
            tiny_model(tmp_path), "neun", *splits.values(), tmp_path / "study", BRIEF
        )


def test_the_chain_of_commands(tmp_path, data, capsys):
    study = ["--data", str(data), "--output-dir", str(tmp_path)]
    start = tiny_model(tmp_path).model
    brief = ["--epochs", "1", "--min-train-masks", "1", "--nimg-per-epoch", "2"]
    steps = {
        "train": ["--name", "net", "--model", start, *brief],
        "evaluate": ["--model", str(tmp_path / "checkpoints/net/models/net"), "--split", "val"],
        "sweep": ["--model", start, "--flow-thresholds", "0.4,0.6", "--cellprob-thresholds=-1,0"],
        "gate": ["--model", start, "--q-low", "0", "--min-area", "50,60"],
        "sensitivity": ["--model", start, "--num-tiles", "1"],
        "budget": ["--model", start, *brief, "--budgets", "1", "--repeats", "1"],
        "lomo": ["--model", start, *brief, "--heldout-markers", "iba1"],
    }
    for step, options in steps.items():
        assert main(["cellpose", step, *study, *options]) == 0, capsys.readouterr().err
    told = capsys.readouterr()
    assert "no GPU: the network runs on the CPU" in told.err or torch.cuda.is_available()
    for path in (
        "predictions/net/val/metrics.json",
        "reports/e1_threshold_sweep_tiny_0_val.tsv",
        "reports/e3_gating_test_final_tiny_0.tsv",
        "reports/microsam/e4_microsam_proxy_sweep_n1_seed2024.tsv",
        "logs/budget_curve/records.tsv",
        "reports/e6_lomo_iba1.tsv",
    ):
        assert (tmp_path / path).exists(), path
    images = ["--images", str(data / "val_cells"), "--output-dir", str(tmp_path / "masks")]
    assert main(["cellpose", "predict", "--model", start, "--zero-dapi", *images]) == 0
    assert "2 of 2 images segmented" in capsys.readouterr().out


def test_a_cpu_says_how_long_it_will_take(splits, capsys):
    told = []
    predictor = Predictor(
        Oracle(splits["train"]), announce=lambda seconds, count: told.append(count)
    )
    list(predictor.masks(splits["train"], Thresholds()))
    list(predictor.masks(splits["train"], Thresholds()))
    assert told == [6]


def test_commands_say_what_is_wrong(tmp_path, data, capsys):
    study = ["--data", str(data), "--output-dir", str(tmp_path)]
    assert main(["cellpose", "evaluate", *study, "--model", "cyto9"]) == 1
    assert "model must be a file, random, or one of" in capsys.readouterr().err
    assert main(["cellpose", "train", *study, "--scale-range", "5"]) == 2
    assert main(["cellpose", "evaluate", *study, "--name", "a/b"]) == 2
    assert "--name must be a plain name" in capsys.readouterr().err
    assert main(["cellpose", "submit", "--shards", "3", "--", "evaluate", *study]) == 2
    assert "evaluate has no --shard" in capsys.readouterr().err
    assert main(["cellpose", "submit", "--"]) == 2
    with pytest.raises(ValueError, match="a table needs at least one row"):
        write_tsv(tmp_path / "x.tsv", [])


def test_steps_are_submitted_with_the_studys_resources(tmp_path, data, capsys):
    study = ["--data", str(data), "--output-dir", str(tmp_path)]
    assert main(["cellpose", "submit", "--dry-run", "--", "train", *study]) == 0
    told = capsys.readouterr().out
    assert "fastembed.cli cellpose train" in told
    for asked in ("--partition=l40s", "--mem=65536M", "--time=12:00:00", "--gres=gpu:1"):
        assert asked in told
    options = ["--shards", "4", "--queue", "big", "--scheduler", "lsf", "--dry-run"]
    assert main(["cellpose", "submit", *options, "--", "budget", *study]) == 0
    told = capsys.readouterr().out
    assert "--shard" in told and "big" in told and "l40s" not in told


def test_a_step_runs_as_a_process_here(tmp_path, data):
    tiles = str(data.parent / "tiles")
    step = ["prepare", "--tiles", tiles, "--output-dir", str(tmp_path / "data")]
    assert main(["cellpose", "submit", "--scheduler", "local", "--", *step]) == 0
    assert (tmp_path / "data" / "donor_splits.yaml").exists()
    assert main(["cellpose", "submit", "--scheduler", "local", "--missing", "--", *step]) == 0


def nuclei(folder, real_data, count: int) -> list:
    """Quarters of quarters of a real image, as tiles of pseudo-donors; the training examples."""
    image, labels = (
        tifffile.imread(real_data / "nuclei" / name) for name in ("img2d.tif", "mask2d.tif")
    )
    (folder / "tiles").mkdir()
    for number in range(16):
        y, x = 128 * (number // 4), 128 * (number % 4)
        stem = folder / "tiles" / f"neun_{200000 + number}_t"
        for channel in "01":
            tifffile.imwrite(f"{stem}_b0c{channel}.tif", image[y : y + 128, x : x + 128])
        np.save(f"{stem}_cellbodies.npy", labels[y : y + 128, x : x + 128])
    prepare(folder / "tiles", folder / "data")
    return list_examples(folder / "data", "train")[:count]


def test_a_small_network_learns_real_nuclei(tmp_path, real_data):
    examples = nuclei(tmp_path, real_data, 4)
    network = tiny_model(tmp_path, 1, Architecture(2, 128, 1, 256, 64)).load()
    loose = Thresholds(flow=0.0)
    before = evaluate(Predictor(network), examples, loose)["overall"]["ap50"]
    settings = TrainSettings(epochs=90, learning_rate=2e-3, scale_range=0.0, min_train_masks=1)
    trained = train(network, examples, examples[:1], tmp_path / "run", "net", settings)
    network = load_network(trained.last, precision="fp32")
    after = evaluate(Predictor(network), examples, loose)["overall"]["ap50"]
    assert before < 0.02 and after > 0.2, (before, after)


@pytest.mark.timeout(600)
def test_the_full_architecture_takes_a_step_and_an_evaluation(tmp_path, real_data):
    examples = nuclei(tmp_path, real_data, 1)
    with pytest.warns(UserWarning, match="random weights"):
        network = Pretrained("random", precision="fp32").load()
    assert sum(p.numel() for p in network.model.net.parameters()) > 3e8
    one = TrainSettings(epochs=1, batch_size=1, min_train_masks=1)
    trained = train(network, examples, [], tmp_path / "run", "cpsam", one)
    metrics = evaluate(
        Predictor(load_network(trained.last, device=network.device.type)), examples, Thresholds()
    )
    assert metrics["overall"]["n_images"] == 1
    assert metrics["settings"]["precision"] == "bf16"
