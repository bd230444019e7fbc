"""Where measured verdicts and exported models are kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """FASTEMBED_CACHE, by default ~/.cache/fastembed."""
    return Path(os.environ.get("FASTEMBED_CACHE") or "~/.cache/fastembed").expanduser()
