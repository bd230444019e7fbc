"""Fetch published weights, or say what could not be fetched and what to do instead."""

from __future__ import annotations

from pathlib import Path

_INSTEAD = "pass weights=PATH for a local copy, or weights='random' for plumbing"


def fetch_file(repo: str, filename: str) -> Path:
    """The local path of one file of a hub repository; RuntimeError says why there is none."""
    return Path(_fetch(repo, filename, lambda hub: hub.hf_hub_download(repo, filename)))


def fetch_model(repo: str) -> Path:
    """The local folder of a hub repository's configurations and safetensors."""
    patterns = ["config.json", "preprocessor_config.json", "*.safetensors"]
    return Path(
        _fetch(
            repo, "its weights", lambda hub: hub.snapshot_download(repo, allow_patterns=patterns)
        )
    )


def _fetch(repo: str, what: str, download) -> str:
    import huggingface_hub as hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return download(hub)
    except GatedRepoError as error:
        raise RuntimeError(
            f"{repo} is gated: accept its licence at https://huggingface.co/{repo}, then log in "
            "with "
            f"`hf auth login` or set HF_TOKEN; or {_INSTEAD}"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"the hub has no repository {repo!r} (or it is private); {_INSTEAD}"
        ) from error
    except Exception as error:
        raise RuntimeError(
            f"could not fetch {what} of {repo} from the hub ({type(error).__name__}: {error}); "
            f"{_INSTEAD}"
        ) from error
