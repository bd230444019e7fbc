"""Where measured verdicts and exported models are kept between runs."""

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def cache_folder() -> Path:
    """FASTEMBED_CACHE, by default ~/.cache/fastembed."""
    return Path(os.environ.get("FASTEMBED_CACHE") or "~/.cache/fastembed").expanduser()


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
