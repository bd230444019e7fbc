"""Is memory flat? Runs `fastembed panoptic` over a generated data set and watches its RSS.

python benchmarks/memory.py [--photos 2000] [--format npy|npz] [--workers 2] [--name NAME]

Writes N photos in COCO's format to a temporary folder, embeds them by the real command in a
process of its own with a small ViT of random weights (every other part is the real one), samples
the resident memory of that process and its children, and writes photos and memory over time to
results/NAME.csv and NAME.png. Exits with 1 where memory grows by more than BOUND.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import coco

RESULTS = Path(__file__).parent / "results/memory"
# MB per 1000 photos, after the start: 35 MB over the 10,000 of results/. What remains of a photo
# are names, in the index one per segment: 1.3 KB for 11 (tracemalloc), and a step where their set
# is made larger (65,536 of them, near photo 5,800). What else grows is not known.
BOUND = 4.0
START = 0.2  # of the photos: until then buffers and allocators grow to their working size


class Sample(NamedTuple):
    """One look at the process and its children: seconds since its start, photos done, MB."""

    seconds: float
    photos: int
    rss: float
    anonymous: float


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=2000)
    parser.add_argument("--format", choices=("npy", "npz"), default="npy")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--name", help="of the results; default memory-FORMAT-PHOTOS")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fastembed-memory-") as scratch:
        folder = Path(scratch)
        segments = coco.write(folder / "coco", coco.generated(options.photos))
        listing = next((folder / "coco" / "annotations").glob("*.json")).stat().st_size
        samples = watch(folder, options.format, options.workers)
    slope, start = growth(samples, options.photos)
    name = options.name or f"memory-{options.format}-{options.photos}"
    save(samples, RESULTS / f"{name}.csv")
    title = (
        f"fastembed panoptic --format {options.format}, {options.photos} photos, "
        f"{segments} segments: {slope:+.2f} MB per 1000 photos"
    )
    plot(samples, start, slope, RESULTS / f"{name}.png", title)
    print(f"{'photos':>8} {'seconds':>8} {'RSS MB':>8} {'anonymous':>10}")
    for sample in samples[:: max(1, len(samples) // 20)] + samples[-1:]:
        print(f"{sample.photos:8} {sample.seconds:8.1f} {sample.rss:8.1f} {sample.anonymous:10.1f}")
    print(
        f"{title}, from photo {start} on; highest {max(s.rss for s in samples):.0f} MB; "
        f"the listing has {listing / 1e6:.1f} MB of JSON\nwritten: {RESULTS / name}.csv, .png"
    )
    if slope > BOUND:
        print(f"memory is not flat: the bound is {BOUND} MB per 1000 photos", file=sys.stderr)
    return int(slope > BOUND)


def watch(folder: Path, form: str, workers: int, interval: float = 0.25) -> list[Sample]:
    """Embeds the data set `folder`/coco to `folder`/out in a process of its own."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SMALL_VIT))
    (model / "preprocessor_config.json").write_text(json.dumps(INPUT))
    command = [
        sys.executable, "-m", "fastembed.cli", "panoptic", "--data_path", str(folder / "coco"),
        "--split", coco.SPLIT, "--cache_dir", str(folder / "out"), "--format", form,
        "--embedder_spec", f"transformers:{model}", "--weights", "random", "--precision", "fp32",
        "--device", "cpu", "--batch_size", "16", "--num_workers", str(workers),
    ]  # fmt: skip
    index = folder / "out" / {"npy": "inst2feat.tsv", "npz": "image_index.tsv"}[form]
    start, samples, done = time.monotonic(), [], PhotosDone(index)
    with (folder / "log").open("w+") as log:
        # One thread for so small a model: two wait for each other more than they compute.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            while process.poll() is None:
                if memory := resident(process.pid):
                    samples.append(Sample(time.monotonic() - start, done(), *memory))
                time.sleep(interval)
        finally:
            process.kill()
            process.wait()
        if process.returncode != 0:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {log.read()}")
    return samples


# As SigLIP in all but size: it is fed the same crops.
SMALL_VIT = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 32,
    "image_size": 224,
}
INPUT = {
    "size": {"height": 224, "width": 224},
    "resample": 3,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


class PhotosDone:
    """Counts the photos in an index that grows: its rows come photo by photo."""

    def __init__(self, index: Path) -> None:
        self._index = index
        self._stream = None
        self._photos: set[bytes] = set()

    def __call__(self) -> int:
        if self._stream is None and self._index.exists():
            self._stream = self._index.open("rb")
            self._stream.readline()
        if self._stream is not None:
            self._photos |= {row.partition(b"\t")[0] for row in self._stream.readlines()}
        return len(self._photos)


def resident(process: int) -> tuple[float, float] | None:
    """MB in memory of a process and its children, and those that no file backs."""
    total = anonymous = 0
    for number in [process, *_children(process)]:
        try:
            lines = Path(f"/proc/{number}/status").read_text().splitlines()
        except OSError:
            continue
        sizes = {
            line.split(":")[0]: line.split()[1]
            for line in lines
            if line.startswith(("VmRSS", "RssAnon"))
        }
        total += int(sizes.get("VmRSS", 0))
        anonymous += int(sizes.get("RssAnon", 0))
    return (total / 1024, anonymous / 1024) if total else None


def _children(process: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            found += map(int, path.read_text().split())
        except OSError:
            continue
    return found + [grandchild for child in found for grandchild in _children(child)]


def growth(samples: list[Sample], photos: int) -> tuple[float, int]:
    """MB per 1000 photos by least squares while the run is on, and the photo from which on."""
    start = int(photos * START)
    later = [s for s in samples if start <= s.photos < photos]
    if len({s.photos for s in later}) < 3:
        raise RuntimeError(f"only {len(later)} samples after photo {start}: more photos are needed")
    slope = np.polyfit([s.photos for s in later], [s.rss for s in later], 1)[0]
    return float(slope) * 1000, start


def save(samples: list[Sample], path: Path) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("seconds", "photos", "rss_mb", "anonymous_mb"))
        for sample in samples:
            writer.writerow(
                [f"{sample.seconds:.2f}", sample.photos, *(f"{v:.1f}" for v in sample[2:])]
            )


def plot(samples: list[Sample], start: int, slope: float, path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.2), layout="constrained")
    photos = np.array([s.photos for s in samples])
    for values, label, colour in (
        ([s.rss for s in samples], "resident", "tab:blue"),
        ([s.anonymous for s in samples], "of it not backed by a file", "tab:grey"),
    ):
        axes.plot(photos, values, label=label, color=colour, linewidth=1)
    later = (photos >= start) & (photos < photos.max())
    level = np.array([s.rss for s in samples])[later].mean() - slope / 1000 * photos[later].mean()
    axes.plot(photos[later], level + slope / 1000 * photos[later], "--", color="tab:red",
              label=f"fit: {slope:+.2f} MB per 1000 photos")  # fmt: skip
    axes.set(xlabel="photos done", ylabel="MB", title=title, ylim=(0, None))
    axes.title.set_size(10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
