"""What SECURITY.md promises: files from elsewhere run no code, and nothing is written elsewhere."""

from __future__ import annotations

import ast
import json
import os
import pickle
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyEngine
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from fastembed import (
    ImageFolder,
    MapFiles,
    MultiCrop,
    NpyPerSample,
    Percentile,
    TensorCsv,
    Tsv,
    cli,
    extract,
)
from fastembed.database import identifier
from fastembed.records import Item, Maps
from fastembed.sources import CocoPanoptic
from fastembed.staging import StagedFiles

ROOT = Path(__file__).resolve().parents[1]

# The source ---------------------------------------------------------------------------------

# What is allowed all the same: file, what, and why.
ALLOWED = {
    ("fastembed/engines/models/dcp.py", "pickle"): "an Unpickler that knows a list of classes only",
    ("fastembed/cluster/elastic.py", "pickle"): "Dask's protocol, to its own workers over TLS",
    ("fastembed/cluster/elastic.py", "cloudpickle"): "the same",
    ("fastembed/engines/models/openclip.py", "torch.jit.load"): "OpenAI's own format; SECURITY.md",
}

CODE_IN_DATA = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal",
    "xml", "lxml",  # entities that grow, and files that they read
}  # fmt: skip
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput",
    "subprocess.getstatusoutput", "yaml.load", "yaml.load_all", "yaml.unsafe_load",
    "yaml.full_load", "torch.jit.load", "torch.hub.load", "tempfile.mktemp",
    "shutil.unpack_archive",
}  # fmt: skip
REQUIRED = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "np.fromfile": ("allow_pickle", False),
}
EXECUTES = ("execute", "executemany", "copy_expert", "SQL", "_execute", "mogrify")


def findings(source: str, name: str) -> set[tuple[str, str, int]]:
    """(file, what, line) of all that must not stand in a source."""
    found = set()
    for node in ast.walk(ast.parse(source, name)):
        for what in _wrong(node):
            if (name, what) not in ALLOWED:
                found.add((name, what, node.lineno))
    return found


def _wrong(node: ast.AST):
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [] if node.level else [node.module]
        yield from CODE_IN_DATA & {module.partition(".")[0] for module in names}
    if not isinstance(node, ast.Call):
        return
    called = ast.unparse(node.func)
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if called in FORBIDDEN:
        yield called
    if called in REQUIRED:
        option, value = REQUIRED[called]
        if getattr(given.get(option), "value", None) is not value:
            yield f"{called} without {option}={value}"
    for option, harmless in (("shell", False), ("trust_remote_code", False)):
        if option in given and getattr(given[option], "value", None) is not harmless:
            yield f"{option}=True"
    if called.endswith((".extractall", ".extract")) and called != "fastembed.extract":
        yield "extractall"
    # SQL that is put together of anything but constants. Names of tables are quoted by
    # psycopg2.sql, values are parameters.
    if called.rpartition(".")[2] in EXECUTES:
        for argument in node.args[:2]:
            if any(map(_is_composed, ast.walk(argument))):
                yield "composed SQL"


def _is_composed(node: ast.AST) -> bool:
    if isinstance(node, ast.JoinedStr):
        return True
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
        return True
    # "..".format(..), but not sql.SQL("..").format(..)
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "format"
        and isinstance(node.func.value, ast.Constant)
    )


def sources() -> list[Path]:
    paths = [ROOT / "setup.py"]
    for folder in ("fastembed", "kernels"):
        paths += sorted((ROOT / folder).rglob("*.py"))
    return paths


def test_the_source_has_nothing_that_runs_data():
    assert len(sources()) > 100
    found = {
        finding
        for path in sources()
        for finding in findings(path.read_text(), path.relative_to(ROOT).as_posix())
    }
    assert not found, sorted(found)


def test_exceptions_are_still_needed():
    for (name, what), reason in ALLOWED.items():
        assert reason
        tree = ast.parse((ROOT / name).read_text())
        assert any(what in _wrong(node) for node in ast.walk(tree)), (name, what)


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p)", "numpy.load(p, 'r')",
        "np.load(p, allow_pickle=True)", "eval(t)", "exec(t)", "os.system(t)", "import pickle",
        "from pickle import loads", "import xml.etree.ElementTree as E", "yaml.load(s, L)",
        "subprocess.run(t, shell=True)", "subprocess.Popen(t, shell=flag)", "archive.extractall()",
        "cursor.execute(f'DROP {t}')", "cursor.execute('DROP %s' % t)", "sql.SQL(f'{t}')",
        "cursor.execute('DROP {}'.format(t))", "self._execute(cursor, f'DROP {t}')",
        "AutoModel.from_pretrained(n, trust_remote_code=True)", "torch.jit.load(p)",
    ],
)  # fmt: skip
def test_the_search_finds(code):
    assert findings(code, "x.py")


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(p, weights_only=True)", "np.load(p, allow_pickle=False)", "yaml.safe_load(s)",
        "subprocess.run([t])", "cursor.execute('SELECT %s', (t,))", "model.eval()",
        "cursor.execute(sql.SQL('DROP {}').format(sql.Identifier(t)))", "re.compile(t)",
    ],
)  # fmt: skip
def test_the_search_lets_pass(code):
    assert not findings(code, "x.py")


# Files that carry code ------------------------------------------------------------------------


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.fixture
def trace(tmp_path) -> Path:
    trace = tmp_path / "the bomb went off"
    pickle.loads(pickle.dumps(Bomb(trace)))
    assert trace.exists()
    trace.unlink()
    return trace


def embed(plates, out: Path, **options):
    return extract(
        TensorCsv(plates.manifest), MultiCrop(Percentile(), n_crops=1), TinyEngine(),
        NpyPerSample(out), Tsv(out), **options,
    )  # fmt: skip


def test_arrays_of_objects(plates, tmp_path, trace):
    plates.fill(2)
    bomb = np.array([[[Bomb(trace)]]], dtype=object)
    np.save(tmp_path / "bomb.npy", bomb, allow_pickle=True)
    plates.add("bomb.npy", (tmp_path / "bomb.npy").read_bytes())
    plates.add("pickle.npy", pickle.dumps(Bomb(trace)))
    report = embed(plates, tmp_path / "out")
    assert (report.embedded, report.failed) == (2, 2)
    assert not trace.exists()

    from fastembed.datasets import EmbeddingTextDataset

    for name in ("bomb.npy", "pickle.npy"):
        with pytest.raises(ValueError):
            EmbeddingTextDataset([(str(plates.folder / name), "text")])[0]
    assert not trace.exists()


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.bin"])
def test_weights_that_carry_code(name, tmp_path, trace):
    from fastembed.engines.models.weights import read_weights

    for content in ({"a": torch.zeros(2), "b": Bomb(trace)}, Bomb(trace)):
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match="not a readable PyTorch weight file"):
            read_weights(tmp_path / name)
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(ValueError):
        read_weights(tmp_path / name)
    assert not trace.exists()


def test_weights_of_cellpose_that_carry_code(tmp_path, trace):
    pytest.importorskip("cellpose", reason="cellpose is not installed")
    from fastembed.cellpose.network import load_network

    torch.save({"W2": Bomb(trace), "encoder.cls_token": torch.zeros(1)}, tmp_path / "model")
    with pytest.raises(ValueError, match="not a model file"):
        load_network(tmp_path / "model", device="cpu")
    assert not trace.exists()


def test_distributed_checkpoints_that_carry_code(tmp_path, trace):
    from fastembed.engines.models.weights import read_weights

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(ValueError, match="no tensor's description"):
        read_weights(tmp_path)
    assert not trace.exists()


def test_yaml_that_carries_code(tmp_path, trace):
    from fastembed.engines import load_engine

    path = tmp_path / "config.yaml"
    path.write_text(f"student: !!python/object/apply:os.mknod [{str(trace)!r}]\n")
    with pytest.raises(Exception, match="could not determine a constructor"):
        load_engine(f"dinov3:{path}", weights="random")
    assert not trace.exists()


def test_table_names_are_quoted(database, connection):
    with connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE victim(x INTEGER)")
    from fastembed import Postgres

    index = Postgres(database, "/out", table='a"; DROP TABLE victim; --')
    assert index.open() == set()
    index.commit([Item("k", "", "emb_'; DROP TABLE victim; --", {"text_id": 1})])
    assert index.open() == {"emb_'; DROP TABLE victim; --"}
    index.close()
    with connection, connection.cursor() as cursor:
        cursor.execute("SELECT to_regclass('victim') IS NOT NULL")
        assert cursor.fetchone() == (True,)
        assert identifier('a".b').as_string(cursor) == '"a"""."b"'


# Outputs stay in their folder -------------------------------------------------------------------


def tree(folder: Path) -> dict[str, bytes | str | None]:
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink()
        else path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }  # fmt: skip


def test_manifests_name_inputs_only(plates, tmp_path):
    """Whatever path a row has: its output is a hash in the output folder."""
    plates.fill(1)
    content = (plates.folder / plates.rows[0][0]).read_bytes()
    (tmp_path / "elsewhere.npy").write_bytes(content)
    loop = plates.folder / "loop.npy"
    loop.symlink_to("loop.npy")
    rows = [
        "../elsewhere.npy", str(tmp_path / "elsewhere.npy"), "a/../../elsewhere.npy",
        "/etc/passwd", "loop.npy", "../../../../../../../../dev/zero", ".", "", "x\ty\n.npy",
    ]  # fmt: skip
    (plates.folder / "a").mkdir()
    plates.manifest.write_text(
        "tensor_path,text_id\n" + "".join(f'"{row}",1\n' for row in rows), newline=""
    )
    out = tmp_path / "deep" / "out"
    before = tree(tmp_path)
    report = embed(plates, out)
    assert (report.embedded, report.failed) == (3, len(rows) - 3)
    after = tree(tmp_path)
    new = after.keys() - before.keys()
    assert all(name == "deep" or name.startswith("deep/out") for name in new)
    assert all(after[name] == content for name, content in before.items())
    names = [path.name for path in out.glob("*.npy")]
    assert len(names) == 3 and all(len(name) == len("emb_.npy") + 40 for name in names)


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../x", "/x", "a//x", "", ".", "..", ".hidden", "a/.x", "a\0x", "a/", "../../etc/x"],
)
def test_names_that_leave_a_folder_are_no_names(name):
    with pytest.raises(ValueError, match="name must be"):
        Item("key", "path", name)


def coco(folder: Path, images: list[dict], annotations: list[dict]) -> Path:
    for name in ("val", "panoptic_val"):
        (folder / name).mkdir(parents=True)
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1}]}
    (folder / "panoptic_val.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "name",
    ["../../etc/1.jpg", "/etc/1.jpg", "a/../../1.jpg", "..\\1.jpg", "1.jpg\0", "", ".."],
)
def test_coco_lists_that_leave_their_folder(name, tmp_path):
    segments = [{"id": 1, "category_id": 1}]
    good = {"image_id": 1, "file_name": "000000000001.png", "segments_info": segments}
    for images, rows in (
        ([{"id": 1, "file_name": name}], [good]),
        ([{"id": 1, "file_name": "000000000001.jpg"}], [{**good, "file_name": name}]),
    ):
        folder = coco(tmp_path / str(len(os.listdir(tmp_path))), images, rows)
        (item,) = CocoPanoptic(folder, "val").items()
        assert item.defect and not item.parts
    with pytest.raises(ValueError, match="split"):
        CocoPanoptic(folder, "../val")


@pytest.mark.parametrize("number", ["../../etc/x", "/etc/x", None, 1e300, [], {}])
def test_coco_ids_are_no_paths(number, tmp_path):
    """An output is named by digits of the photo's file name, whatever the ids are."""
    annotation = {
        "image_id": number, "file_name": "000000000001.png",
        "segments_info": [{"id": number, "category_id": 1}],
    }  # fmt: skip
    photo = {"id": number, "file_name": "000000000001.jpg"}
    try:
        items = list(CocoPanoptic(coco(tmp_path, [photo], [annotation]), "val").items())
    except ValueError as error:
        assert "must be a panoptic annotation" in str(error)
    else:
        assert [item.defect != "" for item in items] == [True]
        assert all("/" not in item.name for item in items)


def test_links_in_the_place_of_outputs(plates, tmp_path):
    """Whoever may write into the output folder gets no file of ours written elsewhere."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    plates.fill(3)
    plates.add("missing.npy", None)
    out, clean = tmp_path / "out", tmp_path / "clean"
    out.mkdir()
    embed(plates, clean)
    for name in (path.name for path in clean.glob("emb_*.npy")):
        (out / name).symlink_to(victim)
    (out / "failures.jsonl").symlink_to(victim)
    report = embed(plates, out)
    assert report.embedded == 3 and report.failed == 1
    assert victim.read_bytes() == b"precious"
    assert not any(path.is_symlink() for path in out.iterdir())
    assert tree(out).keys() == tree(clean).keys()


@pytest.mark.parametrize(
    "name",
    [
        "image_embeddings.tsv", ".image_embeddings.tsv.tmp", ".image_embeddings.tsv.lock",
        ".fastembed-runs.lock", "fastembed.json",
    ],
)  # fmt: skip
def test_links_in_the_place_of_our_own_files(name, plates, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    plates.fill(1)
    out = tmp_path / "out"
    out.mkdir()
    (out / name).symlink_to(victim)
    with pytest.raises((OSError, ValueError)):
        embed(plates, out)
    assert victim.read_bytes() == b"precious"


def test_links_in_the_place_of_temporary_files(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    out = tmp_path / "out"
    out.mkdir()
    files = StagedFiles(out)
    monkeypatch.setattr("fastembed.staging.temporary_of", lambda path: out / "temporary")
    (out / "temporary").symlink_to(victim)
    with pytest.raises(OSError):
        files.write("emb_x.npy", b"new")
    assert victim.read_bytes() == b"precious"


def test_linked_folders_below_the_output(tmp_path):
    """A map's name may have folders. One that is a link out of the output folder is refused."""
    outside = tmp_path / "outside"
    outside.mkdir()
    out = tmp_path / "out"
    (out / "inside").mkdir(parents=True)
    (out / "a").symlink_to(outside)
    (out / "b").symlink_to("inside")
    (out / "loop").symlink_to("loop")
    sink = MapFiles(out)

    def write(name: str) -> None:
        maps = {"map": np.zeros((2, 1, 1), np.float32)}
        sink.open()
        sink.write(Maps(Item(name, name, name), maps, np.ones((1, 1), np.uint8), {}))
        sink.flush()

    for name in ("a/x", "a/new/x", "loop/x"):
        with pytest.raises(OSError):
            write(name)
    assert list(outside.iterdir()) == []
    write("b/x")
    write("c/d/x")
    assert (out / "inside" / "x.npy").exists() and (out / "c" / "d" / "x.npy").exists()
    assert not list(out.rglob("*.tmp"))


def test_links_in_the_place_of_volumes(tmp_path):
    pytest.importorskip("tensorstore", reason="tensorstore is not installed")
    from fastembed.volumes.sink import VolumeFiles

    outside = tmp_path / "outside"
    (outside / "features").mkdir(parents=True)
    (outside / "features" / "0").write_bytes(b"precious")
    out = tmp_path / "out"
    out.mkdir()
    (out / "volume_000001.ome.zarr").symlink_to(outside)
    (out / "volume_000001_features.zarr").symlink_to(outside)
    VolumeFiles(out).remove("volume_000001")
    assert (outside / "features" / "0").read_bytes() == b"precious"
    assert list(out.iterdir()) == []


def test_loops_in_a_folder_of_images(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "sub" / "a.png")
    (folder / "sub" / "up").symlink_to("..")
    (folder / "self.png").symlink_to("self.png")
    source = ImageFolder(folder, recursive=True)
    assert sorted(source.paths.values()) == ["self.png", "sub/a.png"]
    assert source.linked_folders == ["sub/up"]
    (broken,) = [item for item in source.items() if item.path == "self.png"]
    with pytest.raises(OSError):
        source.read(broken)


def test_a_record_cannot_have_others_written(plates, tmp_path, capsys):
    """`verify --repair` gives recorded commands again; the record comes with the folder."""
    plates.fill(1)
    out, other = tmp_path / "out", tmp_path / "other"
    command = ["multichannel", f"--manifest={plates.manifest}", "--model=dinov3:vits16",
               "--weights=random", "--img-size=32"]  # fmt: skip
    assert cli.main([*command, f"--output-dir={out}"]) == 0
    path = out / "fastembed-runs.json"
    record = json.loads(path.read_text())
    next(out.glob("emb_*.npy")).unlink()
    for words in (
        [f"--output-dir={other}"], [f"--output-dir={out}", f"--report={other}"],
        [f"--output-dir={out}", f"--profile={other}"], [f"--output-dir={out}", "--overwrite"],
    ):  # fmt: skip
        record["commands"] = [{**record["commands"][0], "argv": [*command, *words]}]
        path.write_text(json.dumps(record))
        capsys.readouterr()
        assert cli.main(["verify", str(out), "--repair"]) == 1
        assert "record" in capsys.readouterr().err
        assert not other.exists()


# Modes ------------------------------------------------------------------------------------------

RUN = """
import os, sys
from pathlib import Path
from conftest import TinyEngine
from fastembed import *
from fastembed.engines.runtimes.folder import _appearing
for umask in sys.argv[2:]:
    os.umask(int(umask, 8))
    out = Path(umask)
    report = extract(TensorCsv(sys.argv[1]), MultiCrop(Percentile(), n_crops=1), TinyEngine(),
                     NpyPerSample(out), Tsv(out))
    report.save(out / "report.json")
    with _appearing(out / "engine") as folder:
        (folder / "fastembed.json").write_text("{}")
"""


def test_the_umask_is_obeyed(plates, tmp_path):
    """Nothing is open to the world; what a group shares it can go on writing."""
    plates.fill(2)
    subprocess.run(
        [sys.executable, "-c", RUN, plates.manifest, "002", "077"], check=True, timeout=240,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}, cwd=tmp_path,
    )  # fmt: skip
    for umask in ("002", "077"):
        paths = [tmp_path / umask, *(tmp_path / umask).rglob("*")]
        assert len(paths) > 6
        for path in paths:
            mode = stat.S_IMODE(path.stat().st_mode)
            allowed = (0o777 if path.is_dir() else 0o666) & ~int(umask, 8)
            assert mode == allowed, f"{path}: {mode:o}"


# Versions -----------------------------------------------------------------------------------------


def test_the_lock_holds_what_the_tests_need():
    """Each requirement of the extra `test`, at a version that satisfies it: else `make lock`."""
    locked = {}
    for line in (ROOT / "requirements-ci.lock").read_text().splitlines():
        if not line.startswith("#"):
            requirement = Requirement(line)
            (pin,) = requirement.specifier
            assert pin.operator == "==" and not requirement.url, line
            locked[canonicalize_name(requirement.name)] = pin.version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras, own = project["optional-dependencies"], canonicalize_name(project["name"])
    todo = [*project["dependencies"], f"{own}[test]"]
    seen = set()
    while todo:
        requirement = Requirement(todo.pop())
        name = canonicalize_name(requirement.name)
        if requirement in seen or (requirement.marker and not requirement.marker.evaluate()):
            continue
        seen.add(requirement)
        if name == own:
            todo += [line for extra in requirement.extras for line in extras[extra]]
        else:
            assert name in locked, f"{name} is not locked: make lock"
            assert requirement.specifier.contains(locked[name], prereleases=True), requirement
    assert len(seen) > 30
