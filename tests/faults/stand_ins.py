"""What stands in for a real model in the forked runs, and what goes wrong in them on demand."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from conftest import TinyEngine

import fastembed
from fastembed import cli, engines, pipeline
from fastembed.engines import Resize
from fastembed.ops import triplane_accumulate
from fastembed.runlock import RunLock

BACKLOG_BYTES = 1 << 13  # so that small runs, too, have several commits


class RgbEngine(TinyEngine):
    """Fed as SigLIP is."""

    def __init__(self, batch_size: int = 8, size: int = 32) -> None:
        super().__init__(batch_size, size, channels=3)
        self.contract = dataclasses.replace(
            self.contract, mean=(0.5,) * 3, std=(0.5,) * 3, resize=Resize("pillow-bicubic")
        )


class MapEngine(RgbEngine):
    """The mean levels of 8 x 8 patches, as maps."""

    spec, precision, weights_id, facts = "tiny", "fp32", "none", {"patch_size": 8}

    def __init__(self, outputs=("map",), size: int | None = None) -> None:
        super().__init__(size=size or 32)
        size = self.contract.size
        self.outputs = dict.fromkeys(outputs, (3, size // 8, size // 8))

    def settings(self) -> dict:
        return {"spec": self.spec, "output": ",".join(self.outputs)}

    def __call__(self, batch: torch.Tensor):
        means = torch.nn.functional.avg_pool2d(batch * 255, 8)
        results = {output: means + i for i, output in enumerate(self.outputs)}
        return results if len(results) > 1 else means


def load_engine(spec: str, output="cls", **options):
    """As `fastembed.load_engine`, of a tiny engine that suits the output."""
    if not isinstance(output, str):
        return MapEngine(output)
    if output == "map":
        return MapEngine(size=options["size"])
    return RgbEngine() if output == "pooled" else TinyEngine()


def segment(image: np.ndarray) -> np.ndarray:
    """Connected regions of bright marker."""
    from scipy import ndimage

    return ndimage.label(image[..., 1] > 1200)[0]


def install() -> None:
    """Imports all that commands need, and puts the stand-ins in their places."""
    torch.set_num_threads(1)
    import pandas
    import PIL.Image
    import psycopg2
    import pyarrow.parquet
    import tensorstore

    import fastembed.cellpose.infer
    import fastembed.cli.cellpose.infer
    import fastembed.store
    import fastembed.volumes

    PIL.Image.init()
    del pandas, psycopg2, pyarrow, tensorstore
    engines.load_engine = load_engine
    for name, value in (("_BACKLOG_BYTES", BACKLOG_BYTES), ("_COMMIT_SECONDS", 0.1)):
        getattr(pipeline.run, name)  # AttributeError where it is called something else now
        setattr(pipeline.run, name, value)
    # Compiled here, where it is not native, and not in every child.
    plane = torch.zeros((2, 1, 2, 2))
    triplane_accumulate(dict.fromkeys(("xy", "xz", "yz"), plane), (2, 2, 2))
    parser = cli.build_parser()
    cli.build_parser = lambda: parser
    fastembed.cli.cellpose.infer.network_of = lambda arguments: None
    fastembed.cellpose.infer.network_segmenter = lambda network, thresholds: (
        segment, {"segmenter": "threshold"},
    )  # fmt: skip


# What a request can ask for before its command runs ---------------------------------------


def slow_engine(seconds: float) -> None:
    """Batches take that long; the run says at its end how many it has embedded."""
    embed, batches, command = TinyEngine.__call__, [], cli.main

    def slowly(self, batch):
        time.sleep(seconds)
        result = embed(self, batch)
        batches.append(len(batch))
        return result

    def told(argv):
        try:
            return command(argv)
        finally:
            print(f"rows embedded: {sum(batches)}", flush=True)

    TinyEngine.__call__ = slowly
    cli.main = told


def impatient(seconds: float = 0.2) -> None:
    """A run waits that long for another that holds its output."""
    RunLock.__init__.__defaults__ = (*RunLock.__init__.__defaults__[:-1], seconds)


def failing(place: str, count: int) -> None:
    """From its call number `count` on, what `place` names raises an error that nobody expects."""
    owner, name = {
        "list": (fastembed.TensorCsv, "items"),
        "read": (fastembed.TensorCsv, "read"),
        "prepare": (fastembed.MultiCrop, "prepare"),
        "engine": (TinyEngine, "__call__"),
        "pool": (fastembed.MultiCrop, "embed"),
        "write": (fastembed.NpyPerSample, "write"),
        "flush": (fastembed.NpyPerSample, "flush"),
        "commit": (fastembed.Tsv, "commit"),
        "close": (fastembed.Tsv, "close"),
        "append": (fastembed.store.journal.LogWriter, "append"),
        "merge": (fastembed.store.writer, "merge"),
        "start of a thread": (threading.Thread, "start"),
    }[place]
    function, lock, calls = getattr(owner, name), threading.Lock(), []

    def fails(*arguments, **options):
        with lock:
            calls.append(1)
            number = len(calls)
        if place == "list":
            return _ending(function(*arguments, **options), count)
        if number >= count:
            raise RuntimeError(f"made to fail: {place}")
        return function(*arguments, **options)

    setattr(owner, name, fails)


def _ending(items, count: int):
    for number, item in enumerate(items, start=1):
        if number >= count:
            raise RuntimeError("made to fail: list")
        yield item
