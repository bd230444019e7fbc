"""``fastembed volumes``: sampled cubes to stored features, checked, and loaded for training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import zarr

import fastembed
from fastembed.cli import main
from fastembed.datasets import PreprocessedDINOv3Dataset, create_preprocessed_dataloader
from fastembed.engines.contract import InputContract, Resize
from fastembed.volumes import (
    Form,
    Sampling,
    TriPlane,
    VolumeFiles,
    VolumeMetadata,
    Volumes,
    check,
)
from fastembed.volumes.chunks import _place
from fastembed.volumes.recipe import Slices, stretched
from fastembed.volumes.record import Volume

SAMPLING = {
    "organelles": ("mito",),
    "base_resolution": 40,
    "min_resolution_for_raw": 10,
    "output_image_dim": 12,
    "min_unique_ids": 1,
}
FORM = Form(chunks=(4, 8, 8, 8))


class MapEngine:
    """A fixed random projection of 8 x 8 patches: enough of an engine, and easy to repeat."""

    def __init__(self, size: int = 48, patch: int = 8, dim: int = 6, batch_size: int = 10) -> None:
        self.contract = InputContract(
            size, size, 3, (0, 1, 2), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25),
            Resize("pillow-bicubic"), torch.float32,
        )  # fmt: skip
        self.batch_size, self.device = batch_size, torch.device("cpu")
        self.outputs = {"map": (dim, size // patch, size // patch)}
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn((dim, 3, patch, patch), generator=generator)
        self.rows: list[int] = []

    def settings(self) -> dict:
        return {"spec": "map", "batch_size": self.batch_size}

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(batch))
        return torch.nn.functional.conv2d(batch, self.weight, stride=self.weight.shape[-1])


@pytest.fixture(scope="module")
def sections(tmp_path_factory) -> Path:
    return make_sections(tmp_path_factory.mktemp("made") / "sections")


def make_sections(folder: Path) -> Path:
    """A data set of sections, raw and labels, and its YAML."""
    folder.mkdir()
    rng = np.random.default_rng(5)
    z, y, x = np.mgrid[:64, :80, :80]
    raw = 90 * np.sin(z / 9) + 60 * np.cos(y / 7) + x + rng.normal(0, 9, z.shape) + 120
    labels = ((z // 16) * 25 + (y // 16) * 5 + x // 16) % 7
    for name, cube in (("raw", raw.clip(0, 255)), ("labels", labels)):
        (folder / name).mkdir()
        for i, section in enumerate(cube.astype(np.uint8)):
            tifffile.imwrite(folder / name / f"{i:03d}.tif", section)
    (folder / "datasets.yaml").write_text(
        "datasets:\n"
        "  - name: made\n"
        "    raw: {path: raw, resolution: [10, 10, 10]}\n"
        "    labels: {mito: {path: labels, resolution: [10, 10, 10]}}\n"
    )
    return folder


def run(sections: Path, out: Path, indices=range(3), engine=None, form=FORM, **options):
    dtype = options.pop("dtype", "float16")
    sampling = Sampling(**{**SAMPLING, **options.pop("sampling", {})})
    source = Volumes.from_yaml(sections / "datasets.yaml", indices, sampling)
    sink = VolumeFiles(out, form, voxel=sampling.base_resolution, threads=2)
    recipe = TriPlane(dtype=dtype, upsample=options.pop("upsample", "bilinear"))
    index = VolumeMetadata(sink)
    return fastembed.extract(source, recipe, engine or MapEngine(), sink, index,
                             workers=1, **options)  # fmt: skip


@pytest.fixture(scope="module")
def finished(sections, tmp_path_factory) -> Path:
    """Three volumes, finished. Not to be changed."""
    out = tmp_path_factory.mktemp("finished")
    assert run(sections, out).embedded == 3
    return out


def stored(folder: Path) -> dict[str, bytes]:
    """All arrays' files."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".zarr" in str(path.relative_to(folder).parent)
    }


# What is computed ------------------------------------------------------------------------


def plain_features(raw: np.ndarray, dim: int, forward, mean, std) -> torch.Tensor:
    """The spec in plain torch, in float32 to the end: [C, dim, dim, dim]."""
    total = 0
    for axis in range(3):
        stack = torch.from_numpy(np.moveaxis(raw, axis, 0).astype(np.float32))
        if len(stack) / dim > 2.0:
            stack = torch.nn.functional.interpolate(
                stack[None, None], (dim, *stack.shape[1:]), mode="trilinear", align_corners=False
            )[0, 0]
        picked = stack[torch.from_numpy(np.linspace(0, len(stack) - 1, dim).astype(int))]
        maps = []
        for image in picked:
            low, high = image.min(), image.max()
            levels = ((image - low) / (high - low + 1e-8) * 255).to(torch.uint8)
            rgb = levels[None].expand(3, -1, -1).float() / 255
            rgb = (rgb - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
            maps.append(forward(rgb[None])[0])
        grown = torch.nn.functional.interpolate(
            torch.stack(maps), (dim, dim), mode="bilinear", align_corners=False
        )
        # [slice, C, row, column] to [C, z, y, x]: the slices' axis goes where it came from.
        total = total + grown.movedim(1, 0).movedim(1, axis + 1)
    return total / 3


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_features_are_those_of_a_plain_implementation(sections, tmp_path, ratio):
    """Within 1e-5 before the cast, whether slices are picked (up to 2) or interpolated (4)."""
    sampling = {"min_resolution_for_raw": 40 / ratio}
    engine = MapEngine(size=12 * ratio, patch=4)
    run(sections, tmp_path, [4], engine, dtype="float32", sampling=sampling)
    source = Volumes.from_yaml(
        sections / "datasets.yaml", [4], Sampling(**{**SAMPLING, **sampling})
    )
    (item,) = source.items()
    volume = source.read(item)
    assert volume.raw.shape == (12 * ratio,) * 3
    ours = torch.from_numpy(np.asarray(zarr.open(tmp_path / "volume_000004_features.zarr")))
    theirs = plain_features(
        volume.raw, 12, MapEngine(size=12 * ratio, patch=4), engine.contract.mean,
        engine.contract.std,
    )  # fmt: skip
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    gt = np.asarray(zarr.open(tmp_path / "volume_000004_gt.zarr"))
    assert (gt == volume.gt).all() and gt.dtype == np.uint8 and gt.any()


def test_float16_is_float32_rounded_once(sections, tmp_path):
    run(sections, tmp_path / "a", [1], dtype="float32")
    run(sections, tmp_path / "b", [1], dtype="float16")
    full = np.asarray(zarr.open(tmp_path / "a/volume_000001_features.zarr"))
    half = np.asarray(zarr.open(tmp_path / "b/volume_000001_features.zarr"))
    assert (full.astype(np.float16) == half).all()


def test_dinov3_agrees_with_transformers_own_forward(sections, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.DINOv3ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        num_register_tokens=4, image_size=48,
    )  # fmt: skip
    torch.manual_seed(3)
    model = transformers.DINOv3ViTModel(config).eval()
    for parameter in model.parameters():  # some start at 0 and would hide what they do
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "model")
    transformers.DINOv3ViTImageProcessor(
        image_mean=[0.430, 0.411, 0.296], image_std=[0.213, 0.156, 0.143]
    ).save_pretrained(tmp_path / "model")
    engine = fastembed.load_engine(
        f"transformers:{tmp_path / 'model'}", output="map", size=48, precision="fp32",
        batch_size=5, device="cpu",
    )  # fmt: skip
    assert engine.contract.mean == (0.430, 0.411, 0.296)  # of the checkpoint, not of the family
    run(sections, tmp_path / "out", [0], engine, dtype="float32")

    @torch.inference_mode()
    def forward(batch):
        tokens = model(batch).last_hidden_state
        return tokens[:, 5:].transpose(1, 2).unflatten(2, (3, 3))  # the class token, 4 registers

    source = Volumes.from_yaml(sections / "datasets.yaml", [0], Sampling(**SAMPLING))
    raw = source.read(next(source.items())).raw
    theirs = plain_features(raw, 12, forward, [0.430, 0.411, 0.296], [0.213, 0.156, 0.143])
    ours = torch.from_numpy(np.asarray(zarr.open(tmp_path / "out/volume_000000_features.zarr")))
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_stretched_is_the_formula(dtype):
    rng = np.random.default_rng(0)
    for high in (3, 200, 30_000):
        image = rng.integers(1, min(high, np.iinfo(np.int16).max), (60, 70))
        image = image.clip(0, 255 if dtype == np.uint8 else None).astype(dtype)
        x = image.astype(np.float32)
        wanted = ((x - x.min()) / (x.max() - x.min() + np.float32(1e-8)) * 255).astype(np.uint8)
        assert (stretched(image) == wanted).all()
    assert not stretched(np.full((5, 5), 9, dtype)).any()  # flat


def test_slices_run_in_full_batches(sections, tmp_path):
    engine = MapEngine(batch_size=10)
    run(sections, tmp_path, range(2), engine)
    assert engine.rows == [10] * 7 + [2]  # 2 volumes of 3 x 12 slices


def test_a_voxel_that_is_no_number_is_refused():
    raw = np.zeros((8, 8, 8), np.float32)
    raw[1, 2, 3] = np.nan
    volume = Volume(raw, np.zeros((4, 4, 4), np.uint8), None, {})
    with pytest.raises(ValueError, match="not finite"):
        TriPlane().prepare(volume, "", MapEngine(8).contract)


def test_slices_of_another_size_are_resized_as_the_model_does():
    """The slow way: through `model_input`, which has its own tests against the libraries."""
    raw = np.random.default_rng(1).integers(0, 255, (8, 8, 8)).astype(np.uint8)
    volume = Volume(raw, np.zeros((8, 8, 8), np.uint8), None, {})
    contract = MapEngine(16).contract
    out = torch.empty((1, 3, 16, 16))
    Slices(volume, ("xz",), contract).fill(3, out)
    levels = stretched(raw[:, 3])
    wanted = fastembed.model_input(np.stack([levels] * 3, axis=-1), contract)
    assert torch.equal(out[0], wanted)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"orientations": ("xy", "xy")}, "each at most once"),
        ({"orientations": ()}, "orientations must be of xy, xz, yz"),
        ({"orientations": ("zz",)}, "orientations must be of"),
        ({"upsample": "cubic"}, "upsample must be one of bilinear, nearest; got 'cubic'"),
        ({"dtype": "int8"}, "dtype must be one of"),
    ],
)
def test_recipes_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        TriPlane(**options)


def test_the_recipe_comes_back_from_json():
    recipe = TriPlane(("yz", "xy"), "nearest", "float32")
    assert TriPlane.from_settings(json.loads(json.dumps(recipe.settings()))) == recipe


# What is stored --------------------------------------------------------------------------


def test_files_and_metadata_of_a_volume(finished):
    names = {path.name for path in finished.iterdir() if not path.name.startswith(".")}
    assert names == {"fastembed.json"} | {
        f"volume_00000{i}_{kind}" for i in range(3)
        for kind in ("features.zarr", "gt.zarr", "mask.zarr", "metadata.json")
    }  # fmt: skip
    metadata = json.loads((finished / "volume_000001_metadata.json").read_text())
    features = zarr.open(finished / "volume_000001_features.zarr", mode="r")
    assert (features.shape, features.dtype, features.chunks) == (
        (6, 12, 12, 12), np.float16, (4, 8, 8, 8),
    )  # fmt: skip
    assert features.metadata.zarr_format == 2 and not features.compressors
    assert metadata["volume_index"] == 1 and metadata["volume_name"] == "volume_000001"
    assert metadata["shapes"] == {
        "features": [6, 12, 12, 12], "raw": [48, 48, 48], "gt": [12, 12, 12], "mask": [12, 12, 12],
    }  # fmt: skip
    assert metadata["configuration"]["chunks"] == [4, 8, 8, 8]
    assert metadata["configuration"]["compression"] == "none"
    assert metadata["source_dataset"]["index"] == 0
    assert set(metadata["source_dataset"]["paths"]) == {"raw", "mito"}
    timing = metadata["timing"]
    assert timing["total_seconds"] == pytest.approx(
        timing["feature_extraction_seconds"] + timing["tensorstore_write_seconds"]
    )
    assert min(timing.values()) > 0
    on_disk = sum(p.stat().st_size for p in (finished / "volume_000001_features.zarr").iterdir())
    assert metadata["storage"]["features_gb"] == pytest.approx(on_disk / 1e9)
    gt = np.asarray(zarr.open(finished / "volume_000001_gt.zarr", mode="r"))
    mask = np.asarray(zarr.open(finished / "volume_000001_mask.zarr", mode="r"))
    assert metadata["statistics"] == {
        "num_classes": len(np.unique(gt)),
        "unique_classes": np.unique(gt).tolist(),
        "valid_gt_fraction": pytest.approx(mask.mean()),
    }


@pytest.mark.parametrize(
    "form",
    [
        Form((4, 8, 8, 8), compression=True),
        Form((2, 4, 4, 4), shards=(4, 8, 8, 8)),
        Form((2, 4, 4, 4), shards=(4, 8, 8, 8), compression=True),
        Form((256, 64, 64, 64)),
        Form((256, 32, 32, 32), shards=(256, 64, 64, 64)),
        Form((4, 8, 8, 8), layout="ome-zarr"),
        Form((2, 4, 4, 4), shards=(4, 8, 8, 8), layout="ome-zarr"),
    ],
)
def test_every_form_holds_the_same_numbers(sections, finished, tmp_path, form):
    run(sections, tmp_path, form=form)
    metadata = json.loads((tmp_path / "volume_000002_metadata.json").read_text())
    array = zarr.open(metadata["paths"]["features"], mode="r")
    assert array.metadata.zarr_format == (3 if form.shards else 2)
    plain = np.asarray(zarr.open(finished / "volume_000002_features.zarr", mode="r"))
    assert (np.asarray(array) == plain).all()
    ours, theirs = PreprocessedDINOv3Dataset(tmp_path)[2], PreprocessedDINOv3Dataset(finished)[2]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert check(tmp_path, verify=3).well
    if form.layout == "ome-zarr":
        group = zarr.open_group(tmp_path / "volume_000002.ome.zarr", mode="r")
        ome = group.attrs["ome"] if form.shards else group.attrs
        (multiscale,) = ome["multiscales"]
        assert [axis["name"] for axis in multiscale["axes"]] == ["c", "z", "y", "x"]
        (transform,) = multiscale["datasets"][0]["coordinateTransformations"]
        assert transform == {"type": "scale", "scale": [1.0, 40.0, 40.0, 40.0]}
        assert (np.asarray(group[multiscale["datasets"][0]["path"]]) == plain).all()
        assert (np.asarray(group["labels/gt/0"]) == ours[1].numpy()).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"chunks": (1, 2, 3)}, "chunks must be four numbers"),
        ({"chunks": (0, 8, 8, 8)}, "chunks must be four numbers >= 1"),
        ({"shards": (4, 8, 8, 12)}, "shards must hold whole chunks"),
        ({"layout": "hdf5"}, "layout must be one of files, ome-zarr; got 'hdf5'"),
    ],
)
def test_forms_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Form(**{"chunks": (4, 8, 8, 8), **options})


# Going on --------------------------------------------------------------------------------


def test_a_finished_volume_is_skipped_and_others_are_added(sections, finished, tmp_path):
    run(sections, tmp_path, [1])
    before = (tmp_path / "volume_000001_metadata.json").stat().st_mtime_ns
    report = run(sections, tmp_path, range(3))
    assert (report.embedded, report.already_done) == (2, 1)
    assert (tmp_path / "volume_000001_metadata.json").stat().st_mtime_ns == before
    assert stored(tmp_path) == stored(finished)  # whatever ran before, and in which order


@pytest.mark.parametrize(
    "change", [{"dtype": "float32"}, {"sampling": {"augment": False}}, {"form": Form((6, 6, 6, 6))}]
)
def test_other_settings_are_refused(sections, tmp_path, change):
    run(sections, tmp_path, [0])
    with pytest.raises(ValueError, match="other settings"):
        run(sections, tmp_path, [1], **change)


def test_a_volume_that_fails_is_recorded_and_the_rest_is_done(sections, tmp_path):
    source = Volumes.from_yaml(sections / "datasets.yaml", [0, 1], Sampling(**SAMPLING))
    read = source.read

    def failing(item, *arguments):
        if item.name == "volume_000000":
            raise OSError(5, "Input/output error", "chunk 1.2.3")
        return read(item, *arguments)

    source.read = failing
    sink = VolumeFiles(tmp_path, FORM)
    report = fastembed.extract(
        source, TriPlane(), MapEngine(), sink, VolumeMetadata(sink), name="volume_0-1"
    )
    assert (report.embedded, report.failed) == (1, 1)
    (line,) = (tmp_path / "failures-volume_0-1.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["key"] == "volume_000000" and "chunk 1.2.3" in record["reason"]


def test_two_processes_do_not_write_one_volume(sections, tmp_path):
    first, second = VolumeFiles(tmp_path, FORM), VolumeFiles(tmp_path, FORM)
    first.open()
    first._lock("volume_000000")
    with pytest.raises(ValueError, match="volume_000000 is being written by another process"):
        second._lock("volume_000000")


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_volumes_job import *
from fastembed.volumes import sink
at = {at}
write, count = sink.checksum, 0
def checksum(array):
    global count
    count += 1
    if count == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(array)
sink.checksum = checksum
run(Path({sections!r}), Path({out!r}))
"""


@pytest.mark.parametrize("at", [1, 17, 25, 53])  # a volume has 16 chunks, gt and mask
def test_a_killed_run_goes_on_to_the_same_bytes(sections, finished, tmp_path, at):
    script = KILLED.format(
        tests=str(Path(__file__).parent), sections=str(sections), out=str(tmp_path), at=at
    )
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    there = sorted(path.name for path in tmp_path.glob("*_metadata.json"))
    assert len(there) <= (at - 1) // 18  # only those that were written whole
    report = run(sections, tmp_path)
    assert report.embedded == 3 - len(there)
    assert stored(tmp_path) == stored(finished)
    assert check(tmp_path, range(3), verify=3).well


FULL = """
import resource, signal, sys
sys.path.insert(0, {tests!r})
from test_volumes_job import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit is then an error
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))  # a chunk has 4096 bytes
try:
    run(Path({sections!r}), Path({out!r}), [0])
except (OSError, ValueError) as error:
    print("stopped:", error)
"""


def test_no_room_on_the_disk_stops_the_run_and_leaves_nothing_that_counts(sections, tmp_path):
    script = FULL.format(
        tests=str(Path(__file__).parent), sections=str(sections), out=str(tmp_path)
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)
    assert b"stopped:" in done.stdout and b"File too large" in done.stdout, done.stderr[-2000:]
    assert not list(tmp_path.glob("*_metadata.json"))
    assert run(sections, tmp_path, [0]).embedded == 1
    assert check(tmp_path, verify=1).well


# Checking --------------------------------------------------------------------------------


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """The finished volumes, to be damaged."""
    out = tmp_path / "copy"
    subprocess.run(["cp", "-r", finished, out], check=True)
    return out


def test_check_counts(finished):
    findings = check(finished, range(5))
    assert (findings.completed, findings.missing, findings.broken) == ([0, 1, 2], [3, 4], {})
    assert not findings.well and check(finished).well
    assert findings.timing["total_seconds"]["max"] >= findings.timing["total_seconds"]["mean"] > 0
    assert findings.storage_gb["total_gb"] == pytest.approx(
        sum(findings.storage_gb[f"{kind}_gb"] for kind in ("features", "gt", "mask"))
    )
    assert list(findings.sources.values()) == [3]
    assert [c["volumes"] for c in findings.configurations] == [3]


def flip_a_byte(folder: Path) -> None:
    path = folder / "volume_000001_features.zarr/0.0.0.0"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)


def cut_a_chunk(folder: Path) -> None:
    path = folder / "volume_000001_features.zarr/0.0.0.0"
    path.write_bytes(path.read_bytes()[:-3])


def lose_a_chunk(folder: Path) -> None:
    (folder / "volume_000001_features.zarr/0.0.0.0").unlink()


@pytest.mark.parametrize(
    "damage, what",
    [(flip_a_byte, "checksum differs"), (cut_a_chunk, "truncated"), (lose_a_chunk, "No such file")],
)
def test_check_finds_a_damaged_chunk(copy, damage, what):
    damage(copy)
    assert check(copy).well  # without --verify nothing is read
    findings = check(copy, verify=3)
    assert list(findings.broken) == [1] and findings.verified == [0, 1, 2]
    (fault,) = findings.broken[1]
    assert what in fault and "features chunk 0.0.0.0" in fault
    assert check(copy, verify=[0, 2]).verified == [0, 2]


def test_check_finds_metadata_without_arrays_and_metadata_that_are_none(copy):
    subprocess.run(["rm", "-r", copy / "volume_000000_gt.zarr"], check=True)
    (copy / "volume_000002_metadata.json").write_text("{")
    findings = check(copy)
    assert findings.broken[0] == ["gt: there is no volume_000000_gt.zarr"]
    assert "is not the metadata of a volume" in findings.broken[2][0]
    assert findings.completed == [0, 1, 2]


def test_check_samples_evenly(finished):
    assert check(finished, verify=2).verified == [0, 1]
    assert check(finished, verify=1).verified == [0]


def test_check_on_the_command_line(copy, capsys):
    logs = copy / "logs"
    logs.mkdir()
    (logs / "volume_000003.err").write_text("Traceback\nValueError: no crop does\n")
    assert main(["volumes", "check", "--output-dir", str(copy), "--num-volumes", "4"]) == 3
    text = capsys.readouterr().out
    assert "missing         1  3" in text and "3: ValueError: no crop does" in text
    assert main(["volumes", "check", "--output-dir", str(copy), "--verify", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings["well"] and findings["verified"] == [0, 1, 2]
    options = ["--verify", "--sample-size", "1", "--indices", "0-2"]
    assert main(["volumes", "check", "--output-dir", str(copy), *options]) == 0
    assert "all is well" in capsys.readouterr().out
    assert main(["volumes", "check", "--output-dir", str(copy), "--sample-size", "2"]) == 2


# Loading ---------------------------------------------------------------------------------


def arrays(folder: Path, index: int) -> tuple[np.ndarray, ...]:
    name = f"volume_{index:06d}"
    return tuple(
        np.asarray(zarr.open(folder / f"{name}_{kind}.zarr", mode="r"))
        for kind in ("features", "gt", "mask")
    )


def test_the_data_set_as_the_spec_uses_it(finished):
    dataset = PreprocessedDINOv3Dataset(preprocessed_dir=finished, num_threads=8)
    assert len(dataset) == 3
    features, gt, mask = dataset[1]
    assert (features.dtype, gt.dtype, mask.dtype) == (torch.float16, torch.int64, torch.bool)
    for ours, theirs in zip((features, gt, mask), arrays(finished, 1), strict=True):
        assert (ours.numpy() == theirs).all()
    with_metadata = PreprocessedDINOv3Dataset(finished, return_metadata=True)
    metadata = with_metadata[0][3]
    assert metadata["volume_index"] == 0 and "raw" in metadata["source_dataset"]["paths"]
    assert torch.equal(dataset[-1][0], dataset[2][0])
    with pytest.raises(IndexError):
        dataset[3]


@pytest.mark.parametrize("workers, context", [(0, None), (2, "fork"), (2, "spawn")])
def test_the_loader_as_the_spec_uses_it(finished, workers, context):
    PreprocessedDINOv3Dataset(finished)[0]  # what the parent has read must not hurt its children
    loader = create_preprocessed_dataloader(
        preprocessed_dir=str(finished), batch_size=2, shuffle=False, num_threads=2,
        num_workers=workers,
    )  # fmt: skip
    if context:
        loader.multiprocessing_context = context
    batches = list(loader)
    assert [len(features) for features, _, _ in batches] == [2, 1]
    seen = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    for index in range(3):
        for ours, theirs in zip(seen, arrays(finished, index), strict=True):
            assert (ours[index].numpy() == theirs).all()


def test_memory_is_used_again_only_when_nobody_holds_it(finished):
    dataset = PreprocessedDINOv3Dataset(finished)
    first = dataset.fetch([0])()[0]
    view, address = first[0, 2, 3], first.data_ptr()
    kept = view.clone()
    del first
    second = dataset.fetch([1])()[0]  # a view of the first is still held
    assert second.data_ptr() != address and torch.equal(view, kept)
    del view
    assert dataset.fetch([2])()[0].data_ptr() == address
    held = [dataset.fetch([i % 3])()[0] for i in range(7)]
    assert len({features.data_ptr() for features in held}) == 7
    for i, features in enumerate(held):
        assert (features[0].numpy() == arrays(finished, i % 3)[0]).all()


@pytest.mark.parametrize("offset", [0, 1, 8])
@pytest.mark.parametrize("dtype", [np.float16, np.uint8, np.float32])
def test_blocks_are_placed_and_nothing_beside_them(offset, dtype):
    """The native way, where it is built, and NumPy's; rows aligned for it and not."""
    rng = np.random.default_rng(0)
    block = rng.integers(1, 100, (3, 4, 5, 64)).astype(dtype)
    for cut in (np.s_[:, :, :, :], np.s_[1:, :2, 3:, 8:40], np.s_[:, :, :, 3:8]):
        piece = block[cut]
        whole = np.zeros((4, 6, 7, 96 + offset), dtype)
        wanted = whole.copy()
        place = (*(slice(1, 1 + n) for n in piece.shape[:3]),
                 slice(16 + offset, 16 + offset + piece.shape[3]))  # fmt: skip
        _place(piece, whole[place])
        wanted[place] = piece
        assert (whole == wanted).all()


def test_choosing_shuffling_and_dropping(finished):
    loader = create_preprocessed_dataloader(finished, 2, volume_indices=[2, 0], shuffle=False,
                                            return_metadata=True)  # fmt: skip
    ((_, _, _, metadata),) = list(loader)
    assert [m["volume_index"] for m in metadata] == [2, 0]
    assert len(list(create_preprocessed_dataloader(finished, 2, drop_last=True))) == 1
    orders = {
        tuple(m[0]["volume_index"] for *_, m in create_preprocessed_dataloader(
            finished, 1, return_metadata=True, seed=seed))
        for seed in range(20)
    }  # fmt: skip
    assert len(orders) > 1 and all(sorted(order) == [0, 1, 2] for order in orders)


def test_the_next_batch_is_read_while_one_is_used(finished):
    loader = create_preprocessed_dataloader(finished, 1, shuffle=False)
    started = []
    fetch = loader.dataset.fetch
    loader.dataset.fetch = lambda indices, pin=False: started.append(indices) or fetch(indices, pin)
    batches = iter(loader)
    next(batches)
    assert started == [[0], [1]]


def test_patches_read_only_their_chunks(finished, monkeypatch):
    dataset = PreprocessedDINOv3Dataset(finished, patch_size=(3, 4, 5))
    whole = arrays(finished, 0)
    opened = []
    open_ = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *rest, **more: opened.append(path) or open_(path, *rest, **more)
    )
    monkeypatch.setattr(dataset, "_part", lambda: (slice(0, 3), slice(4, 8), slice(2, 7)))
    features, gt, _ = dataset[0]
    assert features.shape == (6, 3, 4, 5)
    assert (features.numpy() == whole[0][:, :3, 4:8, 2:7]).all()
    assert (gt.numpy() == whole[1][:3, 4:8, 2:7]).all()
    chunks = sorted(Path(path).name for path in opened if "features" in str(path))
    assert chunks == ["0.0.0.0", "1.0.0.0"]  # of eight
    monkeypatch.undo()
    torch.manual_seed(0)
    places = {tuple(p.start for p in dataset._part()) for _ in range(50)}
    assert len(places) > 20  # drawn anew each time
    assert all(0 <= z <= 9 and 0 <= y <= 8 and 0 <= x <= 7 for z, y, x in places)


def test_volumes_without_masks(sections, tmp_path):
    run(sections, tmp_path, [0, 1], sampling={"gt_extension": False})
    assert not list(tmp_path.glob("*mask*"))
    features, gt, mask = next(iter(create_preprocessed_dataloader(tmp_path, 2)))
    assert mask is None and features.shape == (2, 6, 12, 12, 12) and gt.shape == (2, 12, 12, 12)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"volume_indices": [0, 7]}, FileNotFoundError, "no finished volume_000007"),
        ({"patch_size": 13}, ValueError, r"patch_size must be within \[12, 12, 12\]"),
        ({"num_threads": 0}, ValueError, "num_threads must be at least 1; got 0"),
    ],
)
def test_loaders_that_make_no_sense(finished, options, error, message):
    with pytest.raises(error, match=message):
        PreprocessedDINOv3Dataset(finished, **options)


def test_an_empty_folder_has_no_volumes(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no finished volume$"):
        PreprocessedDINOv3Dataset(tmp_path)


def test_a_lost_chunk_is_an_error_not_zeros(copy):
    lose_a_chunk(copy)
    with pytest.raises(FileNotFoundError):
        PreprocessedDINOv3Dataset(copy)[1]


def test_a_fork_after_tensorstore_says_so_instead_of_dying(sections, tmp_path):
    run(sections, tmp_path, [0], form=Form((4, 8, 8, 8), compression=True))
    dataset = PreprocessedDINOv3Dataset(tmp_path)
    dataset[0]
    loader = torch.utils.data.DataLoader(
        dataset, num_workers=1, multiprocessing_context="fork", batch_size=None
    )
    with pytest.raises(RuntimeError, match="multiprocessing_context='spawn'"):
        list(loader)


def losses_of_training(folder: Path, steps: int, rate: float) -> list[float]:
    """A 3D convolution as a head, for some steps on all volumes of a folder."""
    torch.manual_seed(0)
    head = optimizer = None
    losses = []
    for _ in range(steps):
        for features, gt, mask in create_preprocessed_dataloader(folder, 3, shuffle=False):
            if head is None:
                head = torch.nn.Conv3d(features.shape[1], 2, 3, padding=1)
                optimizer = torch.optim.AdamW(head.parameters(), lr=rate)
            loss = torch.nn.functional.cross_entropy(head(features.float()), gt, reduction="none")
            loss = loss[mask].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def test_a_few_steps_of_training(finished):
    losses = losses_of_training(finished, 8, rate=0.003)
    assert losses[-1] < 0.9 * losses[0], losses


# The command -----------------------------------------------------------------------------


def options_of(sections: Path, out: Path) -> list[str]:
    return [
        "--output-dir", str(out), "--datasets", str(sections / "datasets.yaml"),
        "--organelles", "mito", "--model-id", "dinov3:vits16", "--weights", "random",
        "--base-resolution", "40", "--min-resolution-for-raw", "10", "--output-image-dim", "8",
        "--min-unique-ids", "1", "--chunks", "128,8,8,8", "--batch-size", "8",
    ]  # fmt: skip


def test_preprocess_submit_and_check_here(sections, tmp_path, capfd):
    """Two processes, one volume damaged, then only that one again."""
    out = tmp_path / "out put"
    common = [*options_of(sections, out), "--scheduler", "local"]
    submit = ["volumes", "submit", "--indices", "0-1", *common]
    assert main([*submit, "--dry-run"]) == 0
    planned = capfd.readouterr().out
    assert "volumes preprocess" in planned and "--organelles mito" in planned
    assert "--chunks=128,8,8,8" in planned and not out.exists()
    assert main(submit) == 0, capfd.readouterr().err
    assert main(["volumes", "check", "--output-dir", str(out), "--verify"]) == 0
    assert (out / "logs/volume_000001.out").exists() and (out / "logs/volume_000001.err").exists()
    capfd.readouterr()
    assert main([*submit, "--missing"]) == 0
    assert "0 of 2 volumes to submit again" in capfd.readouterr().err
    flipped = out / "volume_000001_features.zarr/2.0.0.0"
    content = bytearray(flipped.read_bytes())
    content[100] ^= 255
    flipped.write_bytes(content)
    before = (out / "volume_000000_metadata.json").stat().st_mtime_ns
    assert main([*submit, "--missing", "--verify"]) == 0
    assert "1 of 2 volumes to submit again, 1 of them damaged (1)" in capfd.readouterr().err
    assert main(["volumes", "check", "--output-dir", str(out), "--verify"]) == 0
    assert (out / "volume_000000_metadata.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "options, message",
    [
        (["--volume-index", "0"], "name the data by --data-root or by --datasets"),
        (["--volume-index", "0", "--datasets", "d", "--orientations", "xy,ab"], "orientations"),
        (["--volume-index", "0", "--datasets", "d", "--shards", "3,3,3,3"], "whole chunks"),
        (["--volume-index", "0", "--datasets", "d", "--crop-filter", "3"], "--data-root"),
        (["--volume-index", "0", "--datasets", "d", "--base-resolution", "0"], "base_resolution"),
    ],
)
def test_options_that_make_no_sense(tmp_path, capsys, options, message):
    assert main(["volumes", "preprocess", "--output-dir", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


def test_bench_prints_what_the_spec_shows(finished, capsys):
    options = ["--batch-size", "2", "--num-batches", "4", "--num-threads", "2"]
    assert main(["volumes", "bench", "--preprocessed-dir", str(finished), *options]) == 0
    text = capsys.readouterr().out
    assert "Features shape: [2, 6, 12, 12, 12]" in text
    for word in ("First batch (cold load)", "Warm loads (cached)", "Median", "Plain read", "GB/s"):
        assert word in text


def test_the_real_sections_end_to_end(real_data, tmp_path, capsys):
    """Raw and labels of an electron microscope: preprocess, check --verify, a loader."""
    em = real_data / "em_vnc"
    (tmp_path / "datasets.yaml").write_text(
        "datasets:\n"
        "  - name: vnc\n"
        f"    raw: {{path: {em / 'raw'}, resolution: [50, 4.6, 4.6]}}\n"
        f"    labels: {{any: {{path: {em / 'labels'}, resolution: [50, 4.6, 4.6]}}}}\n"
    )
    out = tmp_path / "out"
    options = [
        "volumes", "preprocess", "--volume-index", "0-1", "--output-dir", str(out),
        "--datasets", str(tmp_path / "datasets.yaml"), "--organelles", "any",
        "--model-id", "dinov3:vits16", "--weights", "random", "--base-resolution", "36.8",
        "--min-resolution-for-raw", "9.2", "--output-image-dim", "16", "--chunks", "128,16,16,16",
    ]  # fmt: skip
    assert main(options) == 0
    assert main(["volumes", "check", "--output-dir", str(out), "--num-volumes", "2",
                 "--verify"]) == 0  # fmt: skip
    assert "2 sound" in capsys.readouterr().out
    features, gt, mask = next(iter(create_preprocessed_dataloader(out, batch_size=2)))
    assert features.shape == (2, 384, 16, 16, 16) and gt.any() and mask.all()
    losses = losses_of_training(out, 15, rate=0.0003)
    assert losses[-1] < 0.9 * losses[0], losses
