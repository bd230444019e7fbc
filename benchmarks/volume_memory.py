"""Peak memory of ``fastembed volumes preprocess``, against its bound: the output + 1 GB.

    python benchmarks/volume_memory.py [--model-id dinov3:vits16] [--dim 128] [--out CSV]

Makes a synthetic volume, runs the real command on it in a process of its own, and reads how much
memory that had at most, less what the same process has after loading the model.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np

RUN = """
import json, resource, sys
import fastembed.engines as engines
import fastembed.cli as cli
load, before = engines.load_engine, []
def load_engine(*arguments, **options):
    import torch
    engine = load(*arguments, **options)
    engine(torch.zeros(engine.batch_size, *engine.contract.shape, dtype=engine.contract.dtype))
    before.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return engine
engines.load_engine = load_engine
status = cli.main(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"status": status, "model_kib": before[0], "peak_kib": peak}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-id", default="dinov3:vits16")
    parser.add_argument("--dim", type=int, default=128, help="output voxels along each axis")
    parser.add_argument("--ratio", type=int, default=4, help="raw voxels per output voxel")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(Path(folder), arguments)
    print("\n".join(f"{name:>16}  {value}" for name, value in row.items()))
    if arguments.out:
        new = not arguments.out.exists()
        with arguments.out.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, row.keys())
            if new:
                writer.writeheader()
            writer.writerow(row)
    return 0 if row["volume_gb"] <= row["bound_gb"] else 1


def measure(folder: Path, arguments: argparse.Namespace) -> dict:
    write_volume(folder, arguments.dim * arguments.ratio)
    report = folder / "report.json"
    command = [
        "volumes", "preprocess", "--volume-index", "0", "--output-dir", str(folder / "out"),
        "--datasets", str(folder / "datasets.yaml"), "--organelles", "made",
        "--model-id", arguments.model_id, "--weights", "random",
        "--output-image-dim", str(arguments.dim), "--base-resolution", str(8 * arguments.ratio),
        "--min-resolution-for-raw", "8", "--no-gt-extension", "--report", str(report),
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", RUN, *command], stdout=subprocess.PIPE, text=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    if figures["status"]:
        raise SystemExit(done.stdout)
    metadata = json.loads((folder / "out/volume_000000_metadata.json").read_text())
    output = np.prod(metadata["shapes"]["features"]) * 2 / 1e9
    run = json.loads(report.read_text())
    return {
        "model": arguments.model_id,
        "shape": "x".join(map(str, metadata["shapes"]["features"])),
        "output_gb": round(float(output), 3),
        "model_gb": round(figures["model_kib"] * 1024 / 1e9, 3),
        "peak_gb": round(figures["peak_kib"] * 1024 / 1e9, 3),
        "volume_gb": round((figures["peak_kib"] - figures["model_kib"]) * 1024 / 1e9, 3),
        "bound_gb": round(float(output) + 1, 3),
        "seconds": round(run["seconds"], 1),
        "engine_share": round(run["stages"]["engine"]["seconds"] / run["seconds"], 3),
        "date": date.today().isoformat(),
    }


def write_volume(folder: Path, side: int) -> None:
    """OME-Zarr of 8 nm voxels: blobs in noise, and labels of the blobs."""
    import zarr

    rng = np.random.default_rng(0)
    for name in ("raw", "labels"):
        group = zarr.open_group(folder / f"{name}.zarr", mode="w", zarr_format=2)
        chunks = (min(64, side),) * 3
        array = group.create_array("s0", shape=(side,) * 3, chunks=chunks, dtype="u1")
        for start in range(0, side, chunks[0]):
            z, y, x = np.ogrid[start : start + chunks[0], :side, :side]
            blobs = np.sin(z / 23) + np.sin(y / 31) + np.sin(x / 17)
            if name == "labels":
                cells = (z // 64 * 9 + y // 64 * 3 + x // 64) % 200 + 1
                array[start : start + chunks[0]] = np.where(blobs > 1, cells, 0)
            else:
                noise = rng.integers(0, 40, blobs.shape)
                array[start : start + chunks[0]] = blobs * 30 + 90 + noise
        axes = [{"name": a, "type": "space", "unit": "nanometer"} for a in "zyx"]
        scale = {"type": "scale", "scale": [8.0, 8.0, 8.0]}
        levels = [{"path": "s0", "coordinateTransformations": [scale]}]
        group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": levels}]
    (folder / "datasets.yaml").write_text(
        "datasets:\n  - {name: made, raw: raw.zarr, labels: {made: labels.zarr}}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
