"""Where volumes are: local paths and the addresses that TensorStore reads from."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit


def shown(url: str) -> str:
    """`url` without a user, a password or a query: what messages and files may have."""
    local = local_path(url)
    if local is not None:
        return str(local)
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def kvstore(url: str) -> dict:
    """TensorStore's JSON of the folder `url`."""
    local = local_path(url)
    if local is not None:
        return {"driver": "file", "path": f"{local}/"}
    parts = urlsplit(url)
    path = unquote(parts.path).strip("/") + "/"
    if parts.scheme == "s3":
        store = {"driver": "s3", "bucket": parts.netloc, "path": path}
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3", os.environ.get("AWS_ENDPOINT_URL"))
        region = os.environ.get("AWS_REGION", os.environ.get("AWS_DEFAULT_REGION"))
        if endpoint:
            store |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
        return store
    if parts.scheme == "gs":
        return {"driver": "gcs", "bucket": parts.netloc, "path": path}
    query = f"?{parts.query}" if parts.query else ""
    base = f"{parts.scheme}://{parts.netloc}{query}"
    return {"driver": "http", "base_url": base, "path": f"/{path}"}


def normal(path: str) -> str:
    """An address, or an absolute local path.

    Raises:
        ValueError: a scheme that volumes are not read from.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", path)
    if scheme is None:
        return str(Path(path).expanduser().absolute())
    if scheme[1].lower() not in ("file", "http", "https", "s3", "gs"):
        raise ValueError(
            f"a volume's path must be local, file, http, https, s3 or gs; got {shown(path)}"
        )
    return path


def local_path(url: str) -> Path | None:
    """The file or folder, where `url` is one of this machine."""
    if "://" not in url:
        return Path(url)
    parts = urlsplit(url)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def join(url: str, path: str) -> str:
    """What lies at `path` below `url`; a query stays at the end."""
    if not path:
        return url
    if "://" not in url:
        return str(Path(url) / path)
    parts = urlsplit(url)
    return parts._replace(path=f"{parts.path.rstrip('/')}/{path}").geturl()
