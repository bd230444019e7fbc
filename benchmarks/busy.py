"""Is the engine ever idle? Runs three real commands with a ViT-B and asks their reports.

python benchmarks/busy.py [--samples 128] [--device cpu] --name MACHINE

`multichannel` (five channels of 1080 x 1080, four crops), `panoptic` and `maps` (photos in COCO's
sizes) on generated data, with random weights and at their defaults, each in a process of its own.
Writes results/jobs/MACHINE-busy.csv. Exits with 1 where the engine computed for less than BOUND of
the time from its first batch to its last.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import coco
from conftest import machine

from fastembed import testing

RESULTS = Path(__file__).parent / "results/jobs"
BOUND = 0.95
COLUMNS = (
    "job", "model", "samples", "vectors", "seconds", "engine_busy", "engine_of_all", "bottleneck",
    "plan", "device", "versions", "date",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=128, help="per job; default 128")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", required=True, help="of the CSV: the machine")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fastembed-busy-") as scratch:
        rows = [
            {"job": name, "model": command[-1], **run(command, options.device, Path(scratch))}
            for name, command in jobs(Path(scratch), options.samples).items()
        ]
    target = RESULTS / f"{options.name}-busy.csv"
    with target.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(f"{row['job']:>14} {row['model']:<30} engine busy {float(row['engine_busy']):.1%}")
    return int(any(float(row["engine_busy"]) < BOUND for row in rows))


def jobs(folder: Path, samples: int) -> dict[str, list[str]]:
    """The commands, each with its model last."""
    coco.write(folder / "coco", coco.generated(samples))
    with (folder / "tensors.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("tensor_path", "text_id"))
        for i in range(samples):
            if i < 16:  # more would be the same work
                np.save(folder / f"{i}.npy", testing.microscopy("uint16", 1080, 1080, i, 5))
            (folder / f"{i}_.npy").symlink_to(folder / f"{i % 16}.npy")
            writer.writerow((f"{i}_.npy", i))
    photos = folder / "coco" / coco.SPLIT
    return {
        "multichannel": [
            "multichannel", "--manifest", str(folder / "tensors.csv"),
            "--output-dir", str(folder / "a"), "--model", "dinov3:vitb16",
        ],
        "panoptic": [
            "panoptic", "--data_path", str(folder / "coco"), "--split", coco.SPLIT,
            "--cache_dir", str(folder / "b"), "--embedder_spec", "openclip:timm/ViT-B-16-SigLIP",
        ],
        "maps": [
            "maps", "--input", str(photos), "--output", str(folder / "c"),
            "--size", "224", "--model", "dinov3:vitb16",
        ],
    }  # fmt: skip


def run(command: list[str], device: str, folder: Path) -> dict[str, object]:
    report = folder / "report.json"
    words = ["--weights", "random", "--device", device, "--report", str(report)]
    subprocess.run([sys.executable, "-m", "fastembed.cli", *command, *words], check=True)
    told = json.loads(report.read_text())
    return {
        "samples": told["embedded"],
        "vectors": told["vectors"],
        "seconds": round(told["seconds"], 2),
        "engine_busy": round(told["engine_busy"], 4),
        "engine_of_all": round(told["engine_seconds"] / told["seconds"], 4),
        "bottleneck": told["bottleneck"],
        "plan": told["plan"],
        **machine(),
    }


if __name__ == "__main__":
    sys.exit(main())
