"""The settings signature of an output folder: numbers of two kinds never mix in one."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path

from .staging import no_link, remove_stale_temporaries, temporary_of

FILE_NAME = "fastembed.json"

# Raised whenever a change to the library changes the bits of an output.
SEMANTICS_VERSION = 2


class SignatureMismatch(ValueError):
    """The folder holds outputs of other settings."""


def claim(folder: Path, settings: dict) -> None:
    """Writes the settings into a new folder, or checks those that are there.

    Raises:
        SignatureMismatch: the folder's settings differ; the message names which.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"semantics_version": SEMANTICS_VERSION, **settings}
    target = folder / FILE_NAME
    remove_stale_temporaries(folder)
    # With the thread: shards may run as threads of one process.
    temporary = temporary_of(folder / f"{FILE_NAME}.{threading.get_ident()}")
    with open(temporary, "w", encoding="utf-8", opener=no_link) as stream:
        json.dump({"signature": signature(settings), "settings": settings}, stream, indent=2)
        stream.write("\n")
    try:
        # A link, since it fails where a rename would replace: shards may start together.
        os.link(temporary, target)
    except FileExistsError:
        _check(target, settings)
    finally:
        temporary.unlink()


def signature(settings: dict) -> str:
    """SHA-256 of the settings in canonical JSON."""
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def read(folder: Path) -> dict:
    """The settings of a folder's outputs.

    Raises:
        FileNotFoundError: there are none. SignatureMismatch: the file is damaged.
    """
    path = folder / FILE_NAME
    try:
        return json.loads(path.read_text())["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise SignatureMismatch(f"{path} is not a settings file of fastembed: {error}") from error


def differences(there: dict, now: dict) -> list[str]:
    """A line for each setting that is not the same."""
    # Through JSON, so that tuples and lists compare equal.
    old, new = _flatten(there), _flatten(json.loads(json.dumps(now)))
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return [f"  {name}: {old.get(name)!r} there, {new.get(name)!r} now" for name in names]


def _check(path: Path, settings: dict) -> None:
    if lines := differences(read(path.parent), settings):
        raise SignatureMismatch(
            f"{path.parent} holds outputs made with other settings:\n" + "\n".join(lines) + "\n"
            "Use another output folder, or --overwrite to remove them and start afresh."
        )


def _flatten(settings: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
