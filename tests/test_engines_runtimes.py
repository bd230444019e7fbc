"""Every runtime against the torch engine, exported folders, and what can go wrong with them."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import DEVICE
from torch import Tensor

from fastembed.cli import main
from fastembed.engines import load_engine
from fastembed.engines.assemble import assemble
from fastembed.engines.models import dino
from fastembed.engines.models.zoo import build
from fastembed.engines.precision import resolve_precision
from fastembed.engines.runtimes import folder, onnx_runtime, tensorrt_runtime
from fastembed.engines.runtimes.cuda import fit_batch
from fastembed.engines.runtimes.export import export_onnx
from fastembed.signature import FILE_NAME

# float32 by another library: summation orders differ, nothing else.
MAX_RELATIVE = 2e-5
OUTPUTS = ("cls", "pooled", "tokens", "map", "map@1")
# Two channels fed as RGB images, and a height that is not the width.
TINY = {
    "weights": "random",
    "output": OUTPUTS,
    "size": (64, 96),
    "channels": 2,
    "channel_mode": "replicate",
    "channel_pool": "concat",
    "precision": "fp32",
}
PLANES = (6, 64, 96)
CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM weights", "ignore:building a tensorrt")
needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA device")


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory):
    """A model that costs little, and a cache of our own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dino.DINOV3, "tiny16", dino.DinoArch(64, 3, 2, 256))
        patch.setenv("FASTEMBED_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """The tiny model as the command line exports it."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    path = tmp_path_factory.mktemp("exported") / "tiny"
    command = [
        "export", "dinov3:tiny16", "--weights", "random", "--runtime", "onnx", "--out", str(path),
        "--output", ",".join(OUTPUTS), "--size", "64x96", "--channels", "2",
        "--channel-mode", "replicate", "--channel-pool", "concat", "--precision", "fp32",
        "--batch-size", "3", "--device", "cpu",
    ]  # fmt: skip
    assert main(command) == 0
    return path


@pytest.fixture(params=["torch", "onnx", "tensorrt"])
def load(request):
    """load(batch_size=3) -> the tiny engine of one runtime, on the GPU where there is one."""
    runtime = request.param
    if runtime == "tensorrt":
        _need_tensorrt()
        if DEVICE.type != "cuda":
            pytest.skip("no CUDA device")
    if runtime == "torch":
        return lambda **options: load_engine(
            "dinov3:tiny16", **{**TINY, "batch_size": 3, **options}
        )
    path = request.getfixturevalue("exported")
    return lambda **options: load_engine(str(path), runtime=runtime, **options)


def _need_tensorrt():
    try:
        return tensorrt_runtime.package()
    except ImportError as error:
        pytest.skip(str(error))


def images(count: int, seed: int = 0, shape: tuple[int, ...] = PLANES) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator)


# --- every runtime ----------------------------------------------------------------------------


def test_float32_follows_the_torch_engine(load):
    engine = load()
    reference = load_engine("dinov3:tiny16", **TINY, batch_size=3, device="cpu")
    x = images(3)
    ours, theirs = engine(x), reference(x)
    assert list(ours) == list(theirs) == list(OUTPUTS)
    for name, expected in theirs.items():
        result = ours[name].cpu()
        assert result.dtype == torch.float32
        assert result.shape == expected.shape == (3, *engine.outputs[name])
        flat, wanted = result.flatten(1).double(), expected.flatten(1).double()
        assert torch.cosine_similarity(flat, wanted).min() >= 0.999999
        assert (result - expected).abs().max() <= MAX_RELATIVE * expected.abs().max()
    assert ours["map"].shape == (3, 128, 4, 6)
    assert engine.dim == 128 and engine.contract == reference.contract


def test_a_sample_has_the_same_bits_in_any_company(load):
    engine = load(batch_size=7)
    x = images(7)
    whole = {name: value.clone() for name, value in engine(x).items()}
    assert len(torch.unique(whole["cls"], dim=0)) == 7
    for position in (1, 4):
        for name, value in engine(x.roll(position, 0)).items():
            assert torch.equal(value.roll(-position, 0), whole[name])
    for start, stop in ((0, 1), (3, 4), (2, 7)):
        for name, value in engine(x[start:stop]).items():
            assert torch.equal(value, whole[name][start:stop])
    strided = x.to(memory_format=torch.channels_last)
    assert torch.equal(engine(strided)["map"], whole["map"])


def test_results_outlive_the_next_call(load):
    engine = load()
    first = engine(images(3))["cls"]
    kept = first.clone()
    engine(images(3, seed=1))
    assert torch.equal(first, kept)


def test_batches_are_checked(load):
    engine = load()
    with pytest.raises(ValueError, match=r"1 <= B <= 3, got \[4, 6, 64, 96\]"):
        engine(images(4))
    with pytest.raises(ValueError, match=r"got \[1, 6, 96, 64\]"):
        engine(images(1, shape=(6, 96, 64)))
    with pytest.raises(TypeError, match=r"must be torch\.float32, got torch\.float16"):
        engine(images(1).half())


def test_settings_tell_runtimes_apart(load):
    engine = load()
    settings = json.loads(json.dumps(engine.settings()))
    assert settings == engine.settings() and settings["runtime"] == engine.runtime
    assert load(batch_size=2).settings() != settings
    torch_settings = load_engine("dinov3:tiny16", **TINY, batch_size=3).settings()
    differing = {k for k in settings if settings[k] != torch_settings.get(k)}
    expected = {"torch": set(), "onnx": {"runtime"}, "tensorrt": {"runtime", "plan"}}
    assert differing == expected[engine.runtime]


# --- folders ----------------------------------------------------------------------------------


def test_a_folder_needs_neither_model_code_nor_weights(exported, monkeypatch):
    spec = load_engine("dinov3:tiny16", **TINY, batch_size=3, runtime="onnx", device="cpu")
    for module in ("timm", "transformers", "onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, module, None)
    engine = load_engine(str(exported), device="cpu")
    assert engine.runtime == "onnx" and engine.spec == "dinov3:tiny16" and engine.batch_size == 3
    assert engine.settings() == spec.settings() and engine.patch_size == 16
    for name, value in spec(images(2)).items():
        assert torch.equal(engine(images(2))[name], value)


def test_a_folder_says_what_it_is(exported):
    manifest = json.loads((exported / FILE_NAME).read_text())
    assert manifest["engine"]["spec"] == "dinov3:tiny16"
    assert manifest["engine"]["facts"]["weights_id"] == "random:0"
    assert manifest["engine"]["outputs"]["tokens"] == [29, 128]
    assert manifest["opset"] == 22 and manifest["versions"]["onnx"] is not None
    assert sorted(manifest["files"]) == ["model.onnx", "model.onnx.data"]
    # Neither leftovers of the writing, nor the paths of the machine it was written on.
    assert sorted(f.name for f in exported.iterdir()) == [FILE_NAME, *manifest["files"]]
    assert sys.prefix.encode() not in (exported / "model.onnx").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "random"}, "fixes weights; got 'random'"),
        ({"size": 64}, r"fixes size as \(64, 96\); got \(64, 64\)"),
        ({"output": "map"}, "fixes output as .*got"),
        ({"channels": 5}, "fixes channels as 2; got 5"),
        ({"precision": "bf16"}, "fixes precision as 'fp32'"),
        ({"runtime": "torch"}, "runtime must be one of onnx, tensorrt, got 'torch'"),
    ],
)
def test_a_folder_fixes_its_model(exported, options, message):
    with pytest.raises(ValueError, match=message):
        load_engine(str(exported), device="cpu", **options)
    same = {**TINY, "weights": None, "output": list(OUTPUTS)}
    assert load_engine(str(exported), device="cpu", **same).dim == 128


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--size", "64x96x3"], "must look like 448 or 224x448; got 64x96x3"),
        (["--runtime", "torch"], "invalid choice: 'torch'"),
    ],
)
def test_the_command_explains_its_options(options, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["export", "dinov3:tiny16", "--out", "x", "--runtime", "onnx", *options])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_the_command_takes_no_folder(exported, tmp_path, capsys):
    command = ["export", str(exported), "--runtime", "onnx", "--out", str(tmp_path / "x")]
    assert main(command) == 2
    assert "export takes a model as KIND:NAME" in capsys.readouterr().err


@pytest.fixture
def copy(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def _edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / FILE_NAME).unlink(), FileNotFoundError, "no engine folder"),
        (lambda f: (f / FILE_NAME).write_text("{"), ValueError, "does not describe an engine"),
        (lambda f: (f / FILE_NAME).write_text("[]"), ValueError, "does not describe an engine"),
        # What the pipeline leaves in an output folder has the same name.
        (
            lambda f: (f / FILE_NAME).write_text('{"signature": "", "settings": {}}'),
            ValueError,
            "does not describe an engine .KeyError: 'format'",
        ),
        (lambda f: _edit(f / FILE_NAME, format=9), ValueError, "format 9, not 1"),
        (lambda f: _edit(f / FILE_NAME, engine={}), ValueError, "KeyError: 'contract'"),
        (lambda f: (f / "model.onnx.data").unlink(), FileNotFoundError, r"no model\.onnx\.data"),
        (lambda f: (f / "model.onnx").write_bytes(b"no"), ValueError, "not the file that was exp"),
        (lambda f: _flip(f / "model.onnx.data"), ValueError, "not the file that was exported"),
    ],
)
def test_damaged_folders(copy, damage, error, message):
    damage(copy)
    with pytest.raises(error, match=message):
        load_engine(str(copy), device="cpu")


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_what_is_no_folder_and_no_spec():
    with pytest.raises(FileNotFoundError, match="neither KIND:NAME nor an engine folder"):
        load_engine("missing/engine")


def test_foreign_graphs_are_named(exported, tmp_path):
    contract = load_engine(str(exported), device="cpu").contract
    other = tmp_path / "other.onnx"
    other.write_bytes(b"no graph at all")
    with pytest.raises(ValueError, match=r"cannot load .*other\.onnx"):
        onnx_runtime.prepare(other, contract, {"cls": (128,)}, 2, CPU)
    with pytest.raises(ValueError, match="not a graph of this engine: it gives cls, pooled"):
        graph = exported / "model.onnx"
        onnx_runtime.prepare(graph, contract, {"cls": (128,)}, 2, CPU)


# --- the cache --------------------------------------------------------------------------------


@pytest.fixture
def cache(exported, tmp_path, monkeypatch) -> list:
    """A fresh cache whose exports only copy; gives the list of them."""
    made = []

    def fake(features, contract, path):
        made.append(path)
        for name in ("model.onnx", "model.onnx.data"):
            shutil.copy(exported / name, path.parent)

    monkeypatch.setenv("FASTEMBED_CACHE", str(tmp_path))
    monkeypatch.setattr(folder, "export_onnx", fake)
    return made


def _cached(**options):
    options = {**TINY, "runtime": "onnx", "batch_size": 2, "device": "cpu", **options}
    return load_engine("dinov3:tiny16", **options)


def test_a_model_is_exported_once_per_settings(cache, tmp_path, monkeypatch):
    _cached()
    _cached()
    _cached(batch_size=3)  # one graph for all batch sizes
    assert len(cache) == 1
    _cached(seed=1)
    _cached(normalize="none")
    assert len(cache) == 3
    monkeypatch.setattr(folder, "installed", lambda package: "0")
    _cached()
    assert len(cache) == 4
    engines = list((tmp_path / "engines").iterdir())
    assert len(engines) == 4 and not any(path.name.startswith(".") for path in engines)


def test_a_damaged_cache_is_made_anew(cache, tmp_path):
    _cached()
    (home,) = (tmp_path / "engines").iterdir()
    _flip(home / "model.onnx.data")
    with pytest.warns(UserWarning, match="not the file that was exported.*makes it anew"):
        _cached()
    assert len(cache) == 2 and _cached()(images(1))


def test_two_processes_may_export_the_same_model(exported, cache, tmp_path, monkeypatch):
    slow = folder.export_onnx

    def overtaken(features, contract, path):
        monkeypatch.setattr(folder, "export_onnx", slow)
        _cached()  # the other process, done first
        slow(features, contract, path)

    monkeypatch.setattr(folder, "export_onnx", overtaken)
    assert _cached()(images(1))
    (home,) = (tmp_path / "engines").iterdir()
    assert len(cache) == 2 and (home / FILE_NAME).is_file()


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(features, contract, path):
        path.write_bytes(b"half a graph")
        raise RuntimeError("disk full")

    monkeypatch.setenv("FASTEMBED_CACHE", str(tmp_path))
    monkeypatch.setattr(folder, "export_onnx", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        _cached()
    assert not list((tmp_path / "engines").iterdir())


def test_a_named_folder_is_used_again_and_never_overwritten(cache, tmp_path):
    home = tmp_path / "home"
    _cached(folder=home)
    _cached(folder=home)
    assert len(cache) == 1 and (home / FILE_NAME).is_file()
    with pytest.raises(ValueError, match="holds another engine"):
        _cached(folder=home, seed=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("results")
    with pytest.raises(FileNotFoundError, match="no engine folder"):
        _cached(folder=tmp_path / "mine")
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


# --- what is missing or does not fit ----------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "extra"),
    [(["onnxruntime"], r"vision\[onnx\]"), (["onnxscript"], r"vision\[onnx\]")],
)
def test_missing_packages_name_the_extra(missing, extra, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTEMBED_CACHE", str(tmp_path))
    for module in missing:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=extra):
        _cached()


def test_missing_tensorrt_names_the_extra(monkeypatch):
    monkeypatch.delenv("FASTEMBED_TENSORRT", raising=False)
    for module in tensorrt_runtime.LIBRARIES:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"vision\[tensorrt\]"):
        tensorrt_runtime.package()
    monkeypatch.setenv("FASTEMBED_TENSORRT", "tensorflow")
    with pytest.raises(ValueError, match="must be one of tensorrt, tensorrt_rtx, got 'tensorflow'"):
        tensorrt_runtime.package()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "tensorrt", "device": "cpu"}, "tensorrt' needs a CUDA device, got 'cpu'"),
        ({"runtime": "onnx", "device": "cpu", "precision": "bf16"}, "bf16.*ONNX Runtime on a CPU"),
        ({"runtime": "onnx", "device": "cpu", "precision": "fp16"}, "fp16.*CPU"),
        ({"runtime": "onnx", "device": "cpu", "compile": True}, "compile=True is for runtime='to"),
        ({"device": "cpu", "cuda_graph": True}, "cuda_graph=True .* got 'torch' on cpu"),
        ({"device": "cpu", "provider": "cpu"}, "provider is for runtime='onnx', on cpu one of cpu"),
        (
            {"runtime": "onnx", "device": "cpu", "provider": "tensorrt"},
            "on cpu one of cpu; got 'tensorrt'",
        ),
        ({"device": "cpu", "folder": "x"}, "folder is for runtime='onnx' or 'tensorrt'"),
    ],
)
def test_requests_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        load_engine("dinov3:tiny16", **{**TINY, **options})


@pytest.mark.skipif(DEVICE.type == "cuda", reason="for a machine without a CUDA device")
def test_a_provider_that_does_not_start_is_an_error(exported):
    ort = pytest.importorskip("onnxruntime")
    with pytest.raises(RuntimeError, match="CUDAExecutionProvider"):
        onnx_runtime._session(ort, exported / "model.onnx", "CUDAExecutionProvider", {}, 2)


@pytest.mark.parametrize("runtime", ["torch", "onnx", "tensorrt"])
def test_auto_precision(runtime, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    chosen = {}
    for capability in ((7, 5), (8, 0)):
        chosen[capability] = resolve_precision("auto", torch.device("cuda"), runtime)
    assert list(chosen.values()) == {
        "torch": ["fp32", "bf16"], "onnx": ["fp16", "fp16"], "tensorrt": ["fp16", "bf16"],
    }[runtime]  # fmt: skip


def test_a_batch_that_does_not_fit_is_halved_once(exported):
    contract = load_engine(str(exported), device="cpu").contract
    tried = []

    def prepare(fits: int):
        def make(batch_size: int):
            tried.append(batch_size)
            if batch_size > fits:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nand more")
            return lambda batch: (batch,)

        return make

    assert fit_batch(prepare(8), contract, 8, CPU)[1] == 8
    with pytest.warns(UserWarning, match=r"batch of 8 does not fit.*batch_size=4.*CUDA out of"):
        assert fit_batch(prepare(4), contract, 8, CPU)[1] == 4
    with (
        pytest.warns(UserWarning, match="batch_size=4"),
        pytest.raises(torch.OutOfMemoryError),
    ):
        fit_batch(prepare(3), contract, 8, CPU)
    assert tried == [8, 8, 4, 8, 4]


# --- published architectures, and TensorRT as far as it goes without a GPU ---------------------


def _features(spec: str, precision: str, output):
    options = {"output": output, "channels": 3, "channel_mode": "inflate", "channel_pool": "mean"}
    backbone = build(spec, "random", None, 0)
    return assemble(spec, backbone, normalize="model", precision=precision, **options)[:2]


@pytest.mark.parametrize("spec", ["dinov3:vits16", "transformers:google/siglip-base-patch16-224"])
def test_published_architectures_in_fp16(spec, tmp_path):
    pytest.importorskip("onnxscript")
    if spec.startswith("transformers"):
        pytest.importorskip("transformers")
    path = tmp_path / "model.onnx"
    features, contract = _features(spec, "fp16", "pooled")
    x = images(2, shape=contract.shape)
    with torch.inference_mode():
        (expected,) = features(x)
    export_onnx(features, contract, path)
    # On a CPU its kernels go through float32, so it is offered to nobody, but the graph runs.
    run = onnx_runtime.prepare(path, contract, {"pooled": expected.shape[1:]}, 2, CPU)
    assert torch.cosine_similarity(run(x.half())[0], expected).min() >= 0.999
    plan = _build(path, batch_size=4)
    assert len(plan) > 1.9 * sum(p.numel() for p in features.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tensorrt_builds_in(precision, exported, tmp_path):
    path = exported / "model.onnx"
    if precision != "fp32":
        path = tmp_path / "model.onnx"
        export_onnx(*_features("dinov3:tiny16", precision, ("cls", "map@-1")), path)
    timings = tmp_path / "timings" / "device.bin"
    assert _build(path, batch_size=2, timing_cache=timings)
    assert _build(path, batch_size=2, timing_cache=timings)


def _build(path: Path, batch_size: int, **options) -> bytes:
    trt = _need_tensorrt()
    if DEVICE.type != "cuda":
        if not hasattr(trt, "ComputeCapability"):
            pytest.skip("no CUDA device, and only tensorrt_rtx builds without one")
        options["compute_capability"] = "SM89"
    return tensorrt_runtime.build(trt, path, batch_size, **options)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="for a machine without a CUDA device")
def test_export_for_a_gpu_that_is_elsewhere(tmp_path, capsys):
    command = ["export", "dinov3:tiny16", "--weights", "random", "--size", "32"]
    command += ["--runtime", "tensorrt", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "name --precision fp16 or bf16" in capsys.readouterr().err
    assert main([*command, "--precision", "bf16"]) == 0
    assert "built at the first load" in capsys.readouterr().out
    made = folder.EngineFolder(tmp_path / "out")
    assert made.description.runtime == "tensorrt" and made.description.precision == "bf16"
    assert made.references()[0].shape == (4, 64)
    assert len(_build(made.onnx, 2)) > 1000


def test_tensorrt_refuses_what_is_no_graph(tmp_path):
    trt = _need_tensorrt()
    (tmp_path / "model.onnx").write_bytes(b"no graph at all")
    with pytest.raises(ValueError, match=r"cannot read .*model\.onnx"):
        tensorrt_runtime.build(trt, tmp_path / "model.onnx", 2)


def test_plans_are_kept_by_what_they_are_good_for(copy):
    library = ModuleType("tensorrt")
    library.__version__ = "10.9"
    home = folder.EngineFolder(copy)
    key = tensorrt_runtime.plan_key(library, "NVIDIA L4", 128)
    home.keep_plan(key, b"a plan")
    home = folder.EngineFolder(copy)
    assert home.plan(key) == b"a plan" and home.plans() == ["NVIDIA L4, tensorrt 10.9, batch 128"]
    for change in ({"device": "NVIDIA H200"}, {"version": "10.10"}, {"batch_size": 64}):
        assert home.plan({**key, **change}) is None
    (plan,) = copy.glob("*.plan")
    _flip(plan)
    with pytest.warns(UserWarning, match="missing or damaged, and is built again"):
        assert home.plan(key) is None


def test_a_plan_is_built_where_none_fits(copy, monkeypatch):
    """What prepare decides, with a library and a GPU that are not there."""
    library, built = ModuleType("tensorrt"), []
    library.__version__ = "10.9"
    card = {"name": "NVIDIA L4"}
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card["name"])
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(tensorrt_runtime, "package", lambda: library)
    monkeypatch.setattr(tensorrt_runtime, "on_stream", lambda run, stream: run)
    monkeypatch.setattr(tensorrt_runtime, "_bound", lambda trt, engine, *rest: engine)
    # A plan made by another build of this library, whatever its key says.
    monkeypatch.setattr(tensorrt_runtime, "_load", lambda trt, p: None if p == b"alien" else p)

    def build(trt, model, batch_size, timing_cache):
        built.append((card["name"], batch_size))
        return f"plan {len(built)}".encode()

    monkeypatch.setattr(tensorrt_runtime, "build", build)

    def prepare(batch_size: int):
        home = folder.EngineFolder(copy)
        return tensorrt_runtime.prepare(home, batch_size, torch.device("cuda", 0))

    with pytest.warns(
        UserWarning, match=r"building a tensorrt 10\.9 engine .* NVIDIA L4, batch 8;"
    ):
        first = prepare(8)
    assert first[0] == b"plan 1" and first == prepare(8) and len(built) == 1
    card["name"] = "NVIDIA H200"
    with pytest.warns(UserWarning, match="for NVIDIA H200.*holds one for NVIDIA L4, tensorrt 10.9"):
        assert prepare(8) != first
    with pytest.warns(UserWarning, match="building a tensorrt"):
        prepare(4)
    assert built == [("NVIDIA L4", 8), ("NVIDIA H200", 8), ("NVIDIA H200", 4)]
    folder.EngineFolder(copy).keep_plan(
        tensorrt_runtime.plan_key(library, "NVIDIA L4", 8), b"alien"
    )
    card["name"] = "NVIDIA L4"
    with pytest.warns(UserWarning, match="building a tensorrt"):
        assert prepare(8)[0] == b"plan 4" and prepare(8)[0] == b"plan 4"


def test_tensorrt_says_why_a_plan_does_not_load():
    trt = _need_tensorrt()
    with pytest.warns(UserWarning, match=f"{trt.__name__} cannot load an engine .+"):
        assert tensorrt_runtime._load(trt, b"no plan at all" * 10) is None


# --- only on a GPU ----------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("load", ["torch", "tensorrt"], indirect=True)
def test_a_cuda_graph_has_the_same_bits(load):
    x = images(3)
    plain, graph = load(), load(cuda_graph=True)
    for name, value in plain(x).items():
        assert torch.equal(graph(x)[name], value)


@needs_cuda
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_calls_from_several_streams_do_not_meet(load, cuda_graph):
    engine = load()
    if cuda_graph:
        if engine.runtime == "onnx":
            pytest.skip("cuda_graph is not for onnx")
        engine = load(cuda_graph=True)
    batches = [images(3, seed) for seed in range(6)]
    expected = [engine(x)["map"].cpu() for x in batches]
    streams, results = [torch.cuda.Stream(), torch.cuda.Stream()], []
    for i, x in enumerate(x.cuda() for x in batches):
        streams[i % 2].wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(streams[i % 2]):
            results.append(engine(x)["map"].to("cpu", non_blocking=True))
    torch.cuda.synchronize()
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted)


@needs_cuda
def test_a_compiled_model_follows_the_plain_one():
    options = {**TINY, "batch_size": 3, "output": "cls"}
    plain = load_engine("dinov3:tiny16", **options)
    compiled = load_engine("dinov3:tiny16", **options, compile=True)
    assert compiled.settings() != plain.settings()
    torch.testing.assert_close(compiled(images(3)), plain(images(3)), rtol=1e-3, atol=1e-4)


@needs_cuda
def test_a_plan_is_built_once(copy):
    _need_tensorrt()
    with pytest.warns(UserWarning, match="building a tensorrt"):
        first = load_engine(str(copy), runtime="tensorrt")
    (plan,) = copy.glob("*.plan")
    before = plan.stat().st_mtime_ns
    again = load_engine(str(copy), runtime="tensorrt")
    assert plan.stat().st_mtime_ns == before and again.settings() == first.settings()
    assert torch.equal(again(images(3))["map"], first(images(3))["map"])
