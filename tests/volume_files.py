"""Small volumes on disk in every layout, written without the library's own reader.

Their content is a function of the world: whoever reads them at the right place finds it again.
"""

from __future__ import annotations

import itertools
import json
import struct
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import zarr

NM = "nanometer"


def brightness(z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Linear in the world, so that means and linear interpolation keep it: nm -> float32."""
    return (z + 2 * y + 4 * x).astype(np.float32)


def centres(corner, voxel, shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """World positions of the voxels' centres, broadcastable: nm."""
    axes = [c + (np.arange(n) + 0.5) * v for c, v, n in zip(corner, voxel, shape, strict=True)]
    return axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None, :]


def paint(function, corner, voxel, shape) -> np.ndarray:
    return np.broadcast_to(function(*centres(corner, voxel, shape)), shape)


class Pyramid:
    """Scales of `function` with corners in one place: voxel * 2**i, [n / 2**i] each."""

    def __init__(self, function, corner=(0, 0, 0), voxel=(32, 32, 32), shape=(32, 32, 32), depth=3):
        self.levels = []
        for i in range(depth):
            edge = tuple(v * 2**i for v in voxel)
            length = tuple(n // 2**i for n in shape)
            first = [float(c + e / 2) for c, e in zip(corner, edge, strict=True)]
            content = np.ascontiguousarray(paint(function, corner, edge, length))
            self.levels.append((f"s{i}", [float(e) for e in edge], first, content))

    def ome(self, path: Path, zarr_format: int = 2, chunk=8, axes="zyx", unit=NM, unknown=None):
        """OME-Zarr 0.4 (zarr v2) or 0.5 (zarr v3); further axes of length 1 may come first."""
        extra = len(axes) - 3
        order = [axes[extra:].index(a) for a in "zyx"]
        back = [order.index(i) for i in range(3)]
        group = zarr.open_group(path, mode="w", zarr_format=zarr_format)
        entries = []
        for name, voxel, first, content in self.levels:
            stored = content.transpose(back)[(None,) * extra]
            chunks = (1,) * extra + (chunk,) * 3
            group.create_array(name, data=stored, chunks=chunks, fill_value=0)
            if unknown is not None:
                encoding = {"absent": 0, "unknown": unknown}
                note = {"annotation": {"annotation_type": {"encoding": encoding}}}
                group[name].attrs["cellmap"] = note
            steps = [
                {"type": "scale", "scale": [1] * extra + [voxel[i] for i in back]},
                {"type": "translation", "translation": [0] * extra + [first[i] for i in back]},
            ]
            entries.append({"path": name, "coordinateTransformations": steps})
        described = [{"name": a, "type": "space", **({"unit": unit} if unit else {})} for a in axes]
        multiscales = [{"axes": described, "datasets": entries}]
        if zarr_format == 2:
            group.attrs["multiscales"] = [{"version": "0.4", **multiscales[0]}]
        else:
            group.attrs["ome"] = {"version": "0.5", "multiscales": multiscales}
        return path

    def plain(self, path: Path, zarr_format: int = 2, **attributes) -> Path:
        """The finest scale alone."""
        array = zarr.create_array(
            path, data=self.levels[0][3], chunks=(8, 8, 8), zarr_format=zarr_format
        )
        array.attrs.update(attributes)
        return path

    def n5(self, path: Path, style: str) -> Path:
        """An N5 group, its scales described as one of the tools does."""
        finest = self.levels[0]
        group: dict = {"n5": "2.0.0"}
        if style == "cosem":
            group["multiscales"] = [
                {
                    "datasets": [
                        {"path": row[0], "transform": _transform(row)} for row in self.levels
                    ]
                }
            ]
        elif style == "viewer":
            group["pixelResolution"] = {
                "unit": "um",
                "dimensions": [v / 1e3 for v in finest[1]][::-1],
            }
            group["scales"] = [[2**i] * 3 for i in range(len(self.levels))]
        elif style == "paintera":
            group["resolution"] = finest[1][::-1]
        for i, (name, *_, content) in enumerate(self.levels):
            attributes: dict = {}
            if style == "paintera":
                attributes["downsamplingFactors"] = [2**i] * 3
            elif style == "transform":
                attributes["transform"] = _transform(self.levels[i])
            write_n5(path / name, content, attributes)
        (path / "attributes.json").write_text(json.dumps(group))
        return path


def _transform(row) -> dict:
    _, voxel, first, _ = row
    return {"axes": ["z", "y", "x"], "scale": voxel, "translate": first, "units": ["nm"] * 3}


def write_n5(path: Path, content: np.ndarray, attributes: dict, chunk: int = 8) -> None:
    """One array of raw N5 blocks: big-endian, x fastest, by the format's description."""
    path.mkdir(parents=True)
    header = {
        "dimensions": content.shape[::-1],
        "blockSize": [chunk] * 3,
        "dataType": content.dtype.name,
        "compression": {"type": "raw"},
    }
    (path / "attributes.json").write_text(json.dumps(header | attributes))
    for at in itertools.product(*(range(0, n, chunk) for n in content.shape)):
        block = content[tuple(slice(i, i + chunk) for i in at)]
        place = path.joinpath(*(str(i // chunk) for i in at[::-1]))
        place.parent.mkdir(parents=True, exist_ok=True)
        sizes = struct.pack(">HHIII", 0, 3, *block.shape[::-1])
        place.write_bytes(sizes + block.astype(content.dtype.newbyteorder(">")).tobytes())


class Server:
    """A folder over HTTP that counts requests, and fails on demand.

    Attributes:
        requests: paths that were asked for, in order.
        failures: how many more requests fail.
        how: ``503``, ``403``, or ``cut``: an answer that breaks off.
        only: in the paths of the requests that fail.
    """

    def __init__(self, folder: Path) -> None:
        self.requests: list[str] = []
        self.failures = 0
        self.how = "503"
        self.only = ""
        outer, lock = self, threading.Lock()

        class Handler(SimpleHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def __init__(self, *arguments):
                super().__init__(*arguments, directory=str(folder))

            def log_message(self, *arguments):
                pass

            def end_headers(self):
                self.send_header("ETag", '"1"')  # S3's clients want one
                super().end_headers()

            def do_GET(self):
                with lock:
                    outer.requests.append(self.path)
                    fail = outer.failures > 0 and outer.only in self.path
                    outer.failures -= fail
                if not fail:
                    super().do_GET()
                elif outer.how != "cut":
                    self.send_error(int(outer.how))
                else:
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    self.wfile.write(b"{")
                    self.close_connection = True

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def fail(self, times: int, how: str = "503", only: str = "") -> None:
        self.failures, self.how, self.only = times, how, only

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
