"""What kind of output a folder holds, and whether its settings file is what was written."""

from __future__ import annotations

import json
import re
from pathlib import Path

from .. import commands, signature
from ..database import DBConfig
from ..indexes import ImageTsv, MapTsv, Postgres, SegmentTsv, Tsv
from ..staging import write_bytes_atomically
from .cache import Cache
from .findings import SETTINGS, Finding
from .kinds import MapsOf, Photos, Samples, Segments

_RECIPES = {"multicrop": Samples, "segmentcrops": Segments}
_BY_INDEX = {SegmentTsv: Segments, ImageTsv: Photos, MapTsv: MapsOf, Tsv: Samples}


class NotRecognised(ValueError):
    """The folder holds no outputs that are known."""


def recognise(folder: Path, database: DBConfig | None = None) -> tuple[Cache, list[Finding]]:
    """The folder as its kind, and what is wrong with its settings and its record of commands.

    Args:
        folder: of an extraction, of volumes or of an inference.
        database: where its rows are, if they are not in the folder.

    Raises:
        FileNotFoundError: there is no such folder.
        NotRecognised: nothing in it says what it holds.
        ImportError: the package that this kind needs is not installed.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    findings: list[Finding] = []
    settings = _settings(folder, findings)
    try:
        record = commands.read(folder)
    except ValueError as error:
        record = commands.Record()
        findings.append(Finding(SETTINGS, commands.FILE_NAME, str(error)))
    if settings is None and record.settings is not None:
        settings = record.settings["settings"]
    return _cache(folder, settings or {}, database, record), findings


def restore_settings(folder: Path) -> bool:
    """Puts the copy of the settings that stands in the record of commands in place of a damaged
    settings file; whether there was a sound one."""
    try:
        copy = commands.read(folder).settings
        sound = copy is not None and _is_signed(copy)
    except (ValueError, KeyError, TypeError):
        return False
    if sound:
        write_bytes_atomically(folder / signature.FILE_NAME, _text(copy))
    return sound


def _is_signed(content: dict) -> bool:
    return signature.signature(content["settings"]) == content["signature"]


def _text(content: dict) -> bytes:
    """As `signature.claim` writes it."""
    return (json.dumps(content, indent=2) + "\n").encode()


def _settings(folder: Path, findings: list[Finding]) -> dict | None:
    """What the settings file says; None, and a finding, where it is not what was written."""
    path = folder / signature.FILE_NAME
    try:
        data = path.read_bytes()
        content = json.loads(data)
        if data == _text(content) and _is_signed(content):
            return content["settings"]
        reason = "it is not what was written: its signature is not that of its settings"
    except FileNotFoundError:
        reason = "it is not there"
    except (ValueError, KeyError, TypeError) as error:
        reason = f"it is damaged: {error!r}"
    findings.append(Finding(SETTINGS, path.name, reason))
    return None


def _cache(
    folder: Path, settings: dict, database: DBConfig | None, record: commands.Record
) -> Cache:
    output = settings.get("output", {})
    form = output.get("form")
    dtype = output.get("dtype", "")
    if settings.get("job") == "cellpose infer" or (folder / "tiles").is_dir():
        from .cellpose import TilesOf

        return TilesOf(folder, settings)
    if isinstance(form, dict) or any(folder.glob("volume_*_metadata.json*")):
        from .volumes import VolumesOf

        return VolumesOf(folder)
    if form == "zarr" or _holds_store(folder):
        from .store import StoreOf

        return StoreOf(folder)
    kind = {"npz": Photos, "maps": MapsOf}.get(form)
    if form == "npy":
        kind = _RECIPES.get(settings.get("recipe", {}).get("recipe"))
    if kind is None:
        there = [k for index, k in _BY_INDEX.items() if (folder / index.file_name).exists()]
        kind = there[0] if there else None
    if kind is None and any(folder.glob("emb_*.npy")):
        kind = Samples
    if kind is None:
        raise NotRecognised(
            f"{folder} holds nothing that is known: no {signature.FILE_NAME}, no index, no store"
        )
    index = kind.index_type(folder)
    if kind is MapsOf:
        outputs = str(settings.get("engine", {}).get("output", "map")).split(",")
        layers = tuple(f"_layer{o.partition('@')[2]}.npy" for o in outputs if "@" in o)
        return MapsOf(folder, index, dtype, layers)
    if kind is Samples and not index.path.exists():
        if database is not None:
            index = Postgres(database, folder)
        elif not _wrote_rows_here(record):
            index = None
    return kind(folder, index, dtype)


def _holds_store(folder: Path) -> bool:
    return (folder / "embeddings.zarr").exists() or any(folder.glob("staged-*.log"))


def _wrote_rows_here(record: commands.Record) -> bool:
    """Whether a recorded command kept its rows in the folder: it named no database."""
    return any(
        not any(re.match(r"--db\b", word) for word in command.argv)
        and any(word.startswith("--manifest") for word in command.argv)
        for command in record.commands
    )
