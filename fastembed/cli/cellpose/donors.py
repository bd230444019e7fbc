"""``fastembed cellpose donors``: tile counts and a clinical table to correlations."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

from ..options import Formatter, UsageError, positive
from .infer import FOLDER
from .options import add_output, names

TABLE = "tile_counts.tsv"
_LISTS = {
    "donors_not_in_clinical": "donors of tiles with no row in the clinical table",
    "donors_in_clinical_but_for_leading_zeros": "of them with a row but for leading zeros",
    "clinical_donors_missing_tiles": "donors of the clinical table without tiles",
    "outcomes_not_in_clinical": "outcomes that the clinical table does not have",
}


def add(commands) -> None:
    parser = commands.add_parser(
        "donors",
        help="donor ratios and densities against clinical outcomes",
        formatter_class=Formatter,
        description=(
            "Sums tiles to donors and correlates their ratios and densities with clinical\n"
            "outcomes: Spearman, false discovery rate (Benjamini-Hochberg) over all tests and by\n"
            "family, confidence intervals over donors, stability by tile bootstrap, sensitivity\n"
            "to the percentile of positivity, and a paired test of two models.\n"
            "Leaves e5_spearman.tsv, e5_bootstrap_stability.tsv, e5_summary.json and, where there\n"
            "is something to put in, e5_comparison.tsv, e5_threshold_sensitivity.tsv and\n"
            "e5_threshold_sensitivity_bootstrap.tsv."
        ),
        epilog=(
            "examples:\n"
            "  fastembed cellpose donors --output-dir study --clinical ROSMAP_clinical_n69.csv\n"
            "  fastembed cellpose donors --output-dir study --clinical donors.tsv \\\n"
            "      --counts mine=tile_counts.tsv --outcomes age,mmse\n"
            "\n"
            "Figures of the study itself: leave the seed, the draws and the generator as they are."
        ),
    )
    parser.set_defaults(run=run)
    group = parser.add_argument_group("input")
    group.add_argument(
        "--counts",
        action="append",
        default=[],
        metavar="NAME=TSV",
        help="a model's tile_counts.tsv; repeatable; default all that infer left in the study's "
        "folder",
    )
    group.add_argument(
        "--compare",
        nargs=2,
        metavar=("FIRST", "SECOND"),
        help="models of the paired test; default baseline and finetuned, else the first two",
    )
    group.add_argument("--clinical", required=True, type=Path, metavar="CSV|TSV")
    group.add_argument(
        "--donor-column", metavar="NAME", help="default projid, else the first column"
    )
    group.add_argument(
        "--outcomes",
        type=lambda text: tuple(text.split(",")),
        metavar="LIST",
        help="columns of numbers, by commas; default those there are of "
        "braaksc,ceradsc,cogdx,dcfdx_lv,plaq_d,plaq_n,nft,gpath",
    )
    group.add_argument("--markers", type=names, metavar="LIST", help="by commas; default all")
    add_output(parser, "gets downstream/e5_*")
    group = parser.add_argument_group("tests")
    group.add_argument(
        "--metrics",
        type=names,
        metavar="LIST",
        default=("ratio", "pos_density_mpx", "total_density_mpx"),
        help="default ratio,pos_density_mpx,total_density_mpx",
    )
    group.add_argument("--alpha", type=float, default=0.05, help="of the FDR; default 0.05")
    group.add_argument(
        "--family",
        type=names,
        default=("model", "metric"),
        metavar="LIST",
        help="tests that agree in these columns are a family of fdr_family; default model,metric",
    )
    group.add_argument(
        "--draws",
        type=positive,
        default=200,
        metavar="N",
        help="of tile bootstrap; default 200",
    )
    group.add_argument(
        "--sensitivity-draws", type=positive, default=100, metavar="N", help="default 100"
    )
    group.add_argument(
        "--interval-draws",
        type=positive,
        default=2000,
        metavar="N",
        help="of the confidence intervals, over donors; default 2000",
    )
    group.add_argument(
        "--swaps", type=positive, default=9999, metavar="N", help="of the paired test; default 9999"
    )
    group.add_argument("--seed", type=int, default=2024, help="default 2024")
    group.add_argument(
        "--generator",
        choices=("python-choice", "python-choices", "splitmix64"),
        default="python-choice",
        help="of the tile bootstrap; default python-choice, the study's",
    )


def run(arguments: argparse.Namespace) -> int:
    from ...cellpose.clinical import read_clinical, read_tile_counts
    from ...cellpose.donors import Analysis, Settings, analyse

    paths = _models(arguments)
    table = read_clinical(arguments.clinical, arguments.outcomes, arguments.donor_column)
    analysis = analyse(
        {name: read_tile_counts(path) for name, path in paths.items()},
        table,
        Settings(
            metrics=arguments.metrics,
            draws=arguments.draws,
            sensitivity_draws=arguments.sensitivity_draws,
            seed=arguments.seed,
            generator=arguments.generator,
            alpha=arguments.alpha,
            family=arguments.family,
            interval_draws=arguments.interval_draws,
            swaps=arguments.swaps,
        ),
        markers=arguments.markers,
        compare=arguments.compare and tuple(arguments.compare),
    )
    inputs = {name: _origin(path) for name, path in paths.items()}
    clinical = _origin(arguments.clinical)
    analysis = Analysis(
        analysis.tables, {**analysis.summary, "tile_counts": inputs, "clinical": clinical}
    )
    folder = arguments.output_dir / "downstream"
    analysis.save(folder)
    _tell(analysis.summary, folder)
    return 0


def _models(arguments: argparse.Namespace) -> dict[str, Path]:
    named = []
    for text in arguments.counts:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise UsageError(f"--counts must look like NAME=tile_counts.tsv; got {text}")
        named.append((name, Path(path)))
    folder = arguments.output_dir / FOLDER
    found = [(path.parent.name, path) for path in sorted(folder.glob(f"*/{TABLE}"))]
    models = dict(named or found)
    if not models:
        raise UsageError(f"no tile counts: run infer, which leaves {folder}/NAME, or name --counts")
    if len(models) < len(named):
        raise UsageError(f"a model's name must come once; got {', '.join(n for n, _ in named)}")
    first = [name for name in (arguments.compare or ("baseline", "finetuned")) if name in models]
    return {name: models[name] for name in [*first, *(n for n in models if n not in first)]}


def _origin(path: Path) -> dict[str, object]:
    """What a number can be traced to; of `infer`'s tables also whether all tiles are in."""
    origin: dict[str, object] = {
        "path": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    beside = path.with_name("infer.json")
    if beside.exists():
        state = json.loads(beside.read_text())
        origin |= {"n_tiles_in_folder": state["n_tiles"], "tiles_missing": state["missing"]}
    return origin


def _tell(summary: dict, folder: Path) -> None:
    for name, state in summary["models"].items():
        print(
            f"{name}: {state['n_tiles_used']} of {state['n_tiles']} tiles, "
            f"{state['n_donors_used']} donors, {summary['n_pass_fdr'][name]} tests pass FDR"
        )
        _warn(", ".join(f"{n} tiles: {why}" for why, n in state["dropped_tiles"].items() if n))
        if missing := summary["tile_counts"][name].get("tiles_missing"):
            _warn(f"{name}: infer has not done {len(missing)} tiles, such as {missing[0]}")
    for key, text in _LISTS.items():
        if summary[key]:
            _warn(f"{text}: {', '.join(summary[key])}")
    for reason, count in summary["tests_without_rho"].items():
        _warn(f"{count} tests without rho: {reason}")
    print(f"{summary['n_tests']} tests of {summary['n_corr_rows']}; tables in {folder}")


def _warn(text: str) -> None:
    if text:
        print(f"fastembed: note: {text}", file=sys.stderr)
