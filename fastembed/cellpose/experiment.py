"""Experiments that train and evaluate several networks: label efficiency (E2), and one marker
left out at a time (E6)."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from .dataset import Example
from .evaluate import Predictor, Thresholds, evaluate
from .network import Pretrained, load_network
from .tables import write_json, write_tsv
from .train import Trained, TrainSettings, train, trainable
from .watch import Epoch

BUDGETS, REPEATS = (2, 5, 10, 20, 30), 5
_OVERALL = ("ap50", "precision", "recall", "f1")

Progress = Callable[[Epoch], None]


def budget_sample(
    examples: Sequence[Example], budget: int, repeat: int, seed: int = 2024
) -> tuple[list[Example], int]:
    """`budget` images of each marker, or all where there are fewer, and the seed that drew them.

    The seed is ``seed + 1000 * budget + repeat``; markers come in order, each sampled by the same
    `random.Random`.
    """
    run_seed = seed + 1000 * budget + repeat
    generator, chosen = random.Random(run_seed), []
    for marker in sorted({example.marker for example in examples}):
        members = [example for example in examples if example.marker == marker]
        chosen += generator.sample(members, min(budget, len(members)))
    return chosen, run_seed


def budget_curve(
    start: Pretrained,
    examples: Sequence[Example],
    val: Sequence[Example],
    eval_examples: Sequence[Example],
    folder: Path,
    *,
    eval_split: str = "val",
    budgets: Sequence[int] = BUDGETS,
    repeats: int = REPEATS,
    settings: TrainSettings,
    thresholds: Thresholds | None = None,
    shard: tuple[int, int] = (0, 1),
    keep_models: bool = True,
    progress: Progress | None = None,
) -> list[dict[str, object]]:
    """Trains on few images, several times each, and evaluates: how much annotation is enough.

    Every run is a folder ``b<budget>_r<repeat>``; a finished one is not run again, a stopped one
    goes on. ``records.tsv`` and ``summary.json`` are made anew from all finished runs.

    Args:
        start: the network that each run starts from.
        examples: what budgets are drawn from; val: for the test loss; eval_examples: for numbers.
        budgets: images **per marker**. A row says how many there really were: `train_n_drawn`
            after capping at what a marker has, `train_n` after min_train_masks.
        settings: of all runs but for their seed; nimg_per_epoch and nimg_test_per_epoch are capped
            at the number of images.
        shard: only runs i, i + n, .. of (i, n).
        keep_models: whether model files stay after a run.

    Returns:
        Rows of ``records.tsv``.
    """
    thresholds = thresholds or Thresholds()
    runs = [(budget, repeat) for budget in budgets for repeat in range(repeats)]
    for budget, repeat in runs[shard[0] :: shard[1]]:
        name = f"budget_b{budget}_r{repeat}"
        run = folder / f"b{budget}_r{repeat}"
        chosen, seed = budget_sample(examples, budget, repeat, settings.seed)
        used, _ = trainable(chosen, settings.min_train_masks)
        own = replace(
            settings,
            seed=seed,
            nimg_per_epoch=_cap(settings.nimg_per_epoch, max(len(used), 1)),
            nimg_test_per_epoch=_cap(settings.nimg_test_per_epoch, len(val)),
        )
        asked = _asked(start, chosen, own, thresholds, eval_split)
        if _finished(run, asked):
            continue
        trained, metrics = _train_and_evaluate(
            start, chosen, val, eval_examples, run, name, own, thresholds,
            run / "predictions" / name / eval_split, progress,
        )  # fmt: skip
        record = {
            "budget": budget,
            "repeat": repeat,
            "seed": seed,
            "train_n": len(trained.used),
            "train_n_drawn": len(chosen),
            "train_n_asked": budget * len({example.marker for example in examples}),
            "dropped_by_min_train_masks": ",".join(trained.dropped),
            "nimg_per_epoch": own.nimg_per_epoch or len(trained.used),
            "eval_split": eval_split,
            "model_path": str(trained.last) if keep_models else "",
            **{f"overall_{key}": metrics["overall"][key] for key in _OVERALL},
        }
        for marker in sorted({example.marker for example in eval_examples}):
            record[f"{marker}_ap50"] = metrics[marker]["ap50"]
            record[f"{marker}_recall"] = metrics[marker]["recall"]
        if not keep_models:
            for path in (trained.last, trained.best):
                if path is not None:
                    path.unlink()
        write_json(run / "record.json", {"asked": asked, "record": record})
    return collect_budget(folder)


def collect_budget(folder: Path) -> list[dict[str, object]]:
    """Writes ``records.tsv`` and ``summary.json`` from the finished runs of a folder."""
    paths = folder.glob("b*_r*/record.json")
    records = [json.loads(path.read_text())["record"] for path in paths]
    records.sort(key=lambda record: (record["budget"], record["repeat"]))
    summary: dict[str, dict] = {}
    for budget in dict.fromkeys(record["budget"] for record in records):
        members = [record for record in records if record["budget"] == budget]
        summary[str(budget)] = {
            key: _range([record[key] for record in members])
            for key in ("train_n", *(f"overall_{key}" for key in _OVERALL))
        } | {"n_runs": len(members)}
    if records:
        write_tsv(folder / "records.tsv", records)
    write_json(folder / "summary.json", summary)
    return records


def leave_one_marker_out(
    start: Pretrained,
    marker: str,
    examples: Sequence[Example],
    val: Sequence[Example],
    test: Sequence[Example],
    output: Path,
    settings: TrainSettings,
    thresholds: Thresholds | None = None,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Trains without one marker and evaluates on that marker alone.

    Leaves ``checkpoints/lomo_excl_<marker>``, ``predictions/lomo_excl_<marker>/test_heldout`` and
    ``reports/e6_lomo_<marker>.tsv``.

    Returns:
        The row of the TSV.

    Raises:
        ValueError: a split without the marker, or with nothing else.
    """
    thresholds = thresholds or Thresholds()
    name = f"lomo_excl_{marker}"
    heldout = [example for example in test if example.marker == marker]
    others, other_val = (
        [example for example in members if example.marker != marker] for members in (examples, val)
    )
    for members, what in (
        (heldout, f"test image of marker {marker!r}"),
        (others, f"training image of a marker other than {marker!r}"),
        (other_val, f"val image of a marker other than {marker!r}"),
    ):
        if not members:
            raise ValueError(f"there is no {what}")
    folder = output / "predictions" / name / "test_heldout"
    trained, metrics = _train_and_evaluate(
        start, others, other_val, heldout, output, name, settings, thresholds, folder, progress
    )
    write_json(folder / "metrics.json", {"heldout_marker": marker, **metrics})
    overall = metrics["overall"]
    row = {
        "model_name": name,
        "heldout_marker": marker,
        "train_marker_exclude": marker,
        "seed": settings.seed,
        "n_train_images": len(trained.used),
        "n_test_images": len(heldout),
        "flow_threshold": thresholds.flow,
        "cellprob_threshold": thresholds.cellprob,
        **{key: overall[key] for key in (*_OVERALL, "tp", "fp", "fn")},
        "metrics_json": str(folder / "metrics.json"),
    }
    write_tsv(output / "reports" / f"e6_lomo_{marker}.tsv", [row])
    return row


def _train_and_evaluate(
    start: Pretrained,
    examples: Sequence[Example],
    val: Sequence[Example],
    eval_examples: Sequence[Example],
    folder: Path,
    name: str,
    settings: TrainSettings,
    thresholds: Thresholds,
    predictions: Path,
    progress: Progress | None,
) -> tuple[Trained, dict]:
    checkpoints = folder / "checkpoints" / name
    # The first network is gone before the second comes: two may be one too many for a GPU.
    trained = train(start.load(), examples, val, checkpoints, name, settings, progress)
    network = load_network(trained.last, device=start.device)
    predictor = Predictor(network, zero_dapi=settings.zero_dapi)
    return trained, evaluate(predictor, eval_examples, thresholds, predictions)


def _asked(
    start: Pretrained,
    examples: Sequence[Example],
    settings: TrainSettings,
    thresholds: Thresholds,
    eval_split: str,
) -> dict[str, object]:
    """What a finished run was asked for; one that was asked for something else is not finished."""
    return {
        "model": start.model,
        "images": [example.stem for example in examples],
        "settings": {k: v for k, v in vars(settings).items() if k != "checkpoint_every"},
        "thresholds": vars(thresholds),
        "eval_split": eval_split,
    }


def _finished(run: Path, asked: dict) -> bool:
    path = run / "record.json"
    if not path.exists():
        return False
    there = json.loads(path.read_text())["asked"]
    if there != json.loads(json.dumps(asked)):
        differing = [key for key in asked if there.get(key) != json.loads(json.dumps(asked[key]))]
        raise ValueError(f"{run} is a run of other {', '.join(differing)}: use another --exp-name")
    return True


def _cap(wanted: int | None, there: int) -> int | None:
    return None if wanted is None else min(wanted, there)


def _range(values: Sequence[float]) -> dict[str, float]:
    return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}
