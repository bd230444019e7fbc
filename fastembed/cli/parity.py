"""``fastembed parity``: each model against its upstream implementation."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .options import Formatter

EXIT_MISSED = 1


def add(commands) -> None:
    parser = commands.add_parser(
        "parity",
        help="models against their upstream implementations, figure by figure",
        formatter_class=Formatter,
        description=(
            "Runs each model here and in the library that it comes from, from image files to\n"
            "embeddings, with the same seeded random weights, and prints how far they are apart.\n"
            "Exit status 1 if a figure misses its gate."
        ),
        epilog=(
            "examples:\n"
            "  fastembed parity dinov3:vits16 openai:ViT-B/32\n"
            "  fastembed parity --runtime torch,onnx --out parity\n"
        ),
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "spec", nargs="*", metavar="SPEC", help="KIND:NAME; by default the list of a release"
    )
    parser.add_argument(
        "--runtime", default="torch", metavar="A,B", help="torch, onnx, tensorrt; default torch"
    )
    parser.add_argument("--precision", default="fp32,bf16", metavar="A,B", help="default fp32,bf16")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu or cuda; default cpu")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the weights; default 0"
    )
    parser.add_argument("--out", type=Path, metavar="NAME", help="also write NAME.md and NAME.json")


def run(arguments: argparse.Namespace) -> int:
    from ..engines import parity

    rows = []
    for spec in arguments.spec or parity.MODELS:
        for row in parity.measure(
            spec,
            arguments.runtime.split(","),
            arguments.precision.split(","),
            device=arguments.device,
            seed=arguments.seed,
        ):
            rows.append(row)
            print(
                f"{row.spec} {row.runtime} {row.precision} against {row.upstream}: "
                f"input {row.input_levels:.2g} levels, cosine {row.cosine:.7f}, "
                f"relative {row.relative:.1e}, "
                f"{'same bits' if row.same_bits else 'BITS DIFFER'} in any batch"
                + (f"; MISSED: {row.failed}" if row.failed else ""),
                flush=True,
            )
    if arguments.out:
        machine = parity.environment(arguments.device)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        report = arguments.out.with_suffix(".md")
        report.write_text(parity.markdown(rows, machine))
        content = json.dumps(parity.as_json(rows, machine), indent=1)
        arguments.out.with_suffix(".json").write_text(content + "\n")
        print(f"wrote {report} and {report.with_suffix('.json').name}", file=sys.stderr)
    return EXIT_MISSED if any(row.failed for row in rows) else 0
