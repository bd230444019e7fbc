"""Memory does not grow with the number of photos."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]

RUN = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
import coco
from test_panoptic_job import RgbEngine
from fastembed import CocoPanoptic, NpyPerPart, SegmentCrops, SegmentTsv, extract

def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * {page} / 1e6

class Watched(RgbEngine):
    def __call__(self, batch):
        result = super().__call__(batch)
        self.fed.clear()
        if self.calls % 4 == 0:
            print(resident(), flush=True)
        return result

folder = Path(sys.argv[1])
source = CocoPanoptic(folder / "coco", coco.SPLIT)
engine = Watched(batch_size=16, size=224)
sink, index = NpyPerPart(folder / "out"), SegmentTsv(folder / "out")
report = extract(source, SegmentCrops(), engine, sink, index, workers=2)
sys.exit(report.failed)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_is_flat_over_200_photos(tmp_path):
    """Of 200 photos with 20 MB of pixels decoded each 10; benchmarks/memory.py does 10,000."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import coco
    finally:
        sys.path.pop(0)
    # A few pictures many times over: making them takes longer than embedding them.
    pictures = list(coco.generated(5))
    segments = coco.write(tmp_path / "coco", (pictures[i % 5] for i in range(200)))
    paths = [str(ROOT / "tests"), str(ROOT / "benchmarks")]  # each has a conftest
    script = RUN.format(paths=paths, page=os.sysconf("SC_PAGE_SIZE"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True,
        env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sizes = np.array([float(line) for line in done.stdout.split()])
    assert len(sizes) == -(-segments // 16) // 4
    # Half of the run decodes 100 photos: 90 MB of pixels, 120 MB of ids, 660 MB of model input.
    early, late = np.median(sizes[len(sizes) // 4 : len(sizes) // 2]), np.median(sizes[-5:])
    assert late - early < 10, sizes.round(1).tolist()
