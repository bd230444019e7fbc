"""What the metadata of OME-Zarr, N5 and plain arrays say about scales, read from parsed JSON.

World axes are z, y, x and nanometres; a translation is the centre of the first voxel, as OME
has it. Nothing here opens a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

Vector = tuple[float, float, float]

AXES = ("z", "y", "x")
_NANOMETRES = {
    "picometer": 1e-3, "pm": 1e-3,
    "angstrom": 0.1, "å": 0.1,
    "nanometer": 1.0, "nanometre": 1.0, "nm": 1.0,
    "micrometer": 1e3, "micrometre": 1e3, "micron": 1e3, "um": 1e3, "µm": 1e3, "μm": 1e3,
    "millimeter": 1e6, "millimetre": 1e6, "mm": 1e6,
    "centimeter": 1e7, "centimetre": 1e7, "cm": 1e7,
    "meter": 1e9, "metre": 1e9, "m": 1e9,
}  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """One resolution of an image.

    Attributes:
        path: of its array, below the image's; empty where the image is one array.
        voxel: edges of a voxel along z, y, x, nm.
        origin: centre of the first voxel, nm.
        dims: which dimensions of the stored array are z, y, x, counted from the last (-3, -2,
            -1 for C order); any other must have length 1.
    """

    path: str
    voxel: Vector
    origin: Vector
    dims: tuple[int, int, int] = (-3, -2, -1)


@dataclass(frozen=True)
class Multiscale:
    """An image's scales, as its metadata have them.

    Attributes:
        scales: in the metadata's order, one at least.
        missing: what must be known and is not said, such as the unit of an axis; the figures
            of `scales` are then right up to a factor, which a given resolution supplies.
    """

    scales: tuple[Scale, ...]
    missing: str = ""

    def placed(self, resolution: Vector | None, translation: Vector | None) -> Multiscale:
        """With the user's figures for the finest scale, nm; the others follow it."""
        finest = min(self.scales, key=lambda scale: math.prod(scale.voxel))
        if resolution is None:
            if translation is None or self.missing:
                return self
            resolution = finest.voxel
        factor = _each(lambda new, old: new / old, resolution, finest.voxel)
        start = translation or _each(lambda o, f: o * f, finest.origin, factor)
        if translation is None and self.missing:
            # Without a unit the metadata's translation may be in voxels or in anything.
            start = (0.0, 0.0, 0.0)
        scales = tuple(
            replace(
                scale,
                voxel=_each(lambda v, f: v * f, scale.voxel, factor),
                origin=tuple(
                    s + (o - o0) * f
                    for s, o, o0, f in zip(start, scale.origin, finest.origin, factor, strict=True)
                ),
            )
            for scale in self.scales
        )
        return Multiscale(scales)


def parse_ome(entry: Mapping, where: str) -> Multiscale:
    """A ``multiscales`` entry of OME-Zarr 0.3 to 0.5.

    Raises:
        ValueError: a part that the format demands is not there, or not of its form.
    """
    try:
        axes = [axis if isinstance(axis, Mapping) else {"name": axis} for axis in entry["axes"]]
        names = [str(axis["name"]).lower() for axis in axes]
        spatial = _spatial(names, where)
        units, missing = _units([axes[i].get("unit") for i in spatial], names, spatial)
        outer = _transform(entry.get("coordinateTransformations", ()), len(axes))
        scales = []
        for level in entry["datasets"]:
            scale, shift = _transform(level["coordinateTransformations"], len(axes))
            voxel = [scale[i] * outer[0][i] * u for i, u in zip(spatial, units, strict=True)]
            origin = [
                (shift[i] * outer[0][i] + outer[1][i]) * u
                for i, u in zip(spatial, units, strict=True)
            ]
            dims = tuple(i - len(axes) for i in spatial)
            scales.append(Scale(level["path"].strip("/"), _voxel(voxel), tuple(origin), dims))
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(f"{where}: its multiscales cannot be read: {reason}") from error
    if not scales:
        raise ValueError(f"{where}: its multiscales name no array")
    return Multiscale(tuple(scales), missing)


def parse_plain(attributes: Mapping, axes: Sequence[str] | None, where: str) -> Multiscale:
    """One zarr array: `axes` are its dimension names, if it has any; else z, y, x come last.

    Attributes ``resolution`` or ``voxel_size`` are voxel edges, ``units`` (nm by default) one
    or three units, and ``offset`` the first voxel's corner, all along z, y, x: as funlib and
    gunpowder write them.
    """
    dims = (-3, -2, -1)
    names = [str(name).lower() for name in axes or ()]
    if set(AXES) <= set(names):
        dims = tuple(i - len(names) for i in _spatial(names, where))
    given = attributes.get("resolution", attributes.get("voxel_size"))
    if given is None:
        missing = "its attributes have no resolution"
        return Multiscale((Scale("", (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), dims),), missing)
    try:
        units = attributes.get("units", "nm")
        factors, missing = _units([units] * 3 if isinstance(units, str) else units, AXES, (0, 1, 2))
        voxel = _voxel([_number(v) * f for v, f in zip(given, factors, strict=True)])
        corner = attributes.get("offset", (0, 0, 0))
        origin = tuple(
            _number(c) * f + v / 2 for c, f, v in zip(corner, factors, voxel, strict=True)
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: its resolution cannot be read: {error}") from error
    if "offset" not in attributes:
        origin = (0.0, 0.0, 0.0)
    return Multiscale((Scale("", voxel, origin, dims),), missing)


def parse_n5(group: Mapping, levels: Mapping[str, Mapping], where: str) -> Multiscale:
    """An N5 group's scales, or one array's (`levels` has one entry, at ``""``).

    `levels` are the attributes of the arrays by path. The conventions, first match: the array's
    ``transform`` (axes, scale, translate, units); ``multiscales`` of the group with the same
    ``transform`` per array; ``pixelResolution`` (with a unit) or ``resolution`` (nm) along
    x, y, z, of the array or the group, times the array's ``downsamplingFactors`` or the group's
    ``scales`` or ``downsamplingFactors``. A factor f moves the first voxel's centre by
    (f - 1) / 2 voxels of the finest scale.
    """
    listed = {
        str(entry.get("path", "")).strip("/"): entry.get("transform")
        for entry in (group.get("multiscales") or [{}])[0].get("datasets", ())
    }
    factors = group.get("scales", group.get("downsamplingFactors"))
    scales, missing = [], ""
    for number, (path, attributes) in enumerate(levels.items()):
        try:
            transform = attributes.get("transform", listed.get(path))
            if transform is not None:
                scale, absent = _n5_transform(path, transform, where)
            else:
                step = attributes.get("downsamplingFactors")
                if step is None and factors is not None and isinstance(factors[0], Sequence):
                    step = factors[number]
                scale, absent = _n5_resolution(path, attributes, group, step)
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            place = f"{where}/{path}".rstrip("/")
            raise ValueError(
                f"{place}: its scale cannot be read: {type(error).__name__}: {error}"
            ) from error
        scales.append(scale)
        missing = missing or absent
    return Multiscale(tuple(scales), missing)


def _n5_transform(path: str, transform: Mapping, where: str) -> tuple[Scale, str]:
    names = [str(name).lower() for name in transform["axes"]]
    spatial = _spatial(names, where)
    given = transform.get("units", [None] * len(names))
    units, missing = _units([given[i] for i in spatial], names, spatial)
    shift = transform.get("translate", [0] * len(names))
    voxel = [_number(transform["scale"][i]) * u for i, u in zip(spatial, units, strict=True)]
    origin = tuple(_number(shift[i]) * u for i, u in zip(spatial, units, strict=True))
    return Scale(path, _voxel(voxel), origin, (-1, -2, -3)), missing


def _n5_resolution(
    path: str, attributes: Mapping, group: Mapping, step: Sequence | None
) -> tuple[Scale, str]:
    step = [_number(f) for f in (step or (1, 1, 1))][::-1]
    unit, resolution, missing = None, None, ""
    for place in (attributes, group):
        pixel = place.get("pixelResolution")
        if isinstance(pixel, Mapping):
            resolution, unit = pixel["dimensions"], pixel.get("unit")
        elif pixel is not None:
            resolution = pixel
        elif "resolution" in place:
            resolution, unit = place["resolution"], "nm"
        if resolution is not None:
            break
    if resolution is None:
        resolution, unit = (1, 1, 1), "nm"
        missing = "its attributes have no transform, pixelResolution or resolution"
    factors, absent = _units([unit] * 3, AXES, (0, 1, 2))
    finest = [_number(r) * f for r, f in zip(list(resolution)[::-1], factors, strict=True)]
    voxel = _voxel([r * f for r, f in zip(finest, step, strict=True)])
    origin = tuple(r * (f - 1) / 2 for r, f in zip(finest, step, strict=True))
    return Scale(path, voxel, origin, (-1, -2, -3)), missing or absent


def _spatial(names: Sequence[str], where: str) -> tuple[int, int, int]:
    if any(names.count(axis) != 1 for axis in AXES):
        raise ValueError(f"{where} must have the axes z, y and x; it has {list(names)}")
    return tuple(names.index(axis) for axis in AXES)


def _units(
    given: Sequence[str | None], names: Sequence[str], spatial: Sequence[int]
) -> tuple[list[float], str]:
    """Nanometres in each unit, and which axis says none."""
    factors, missing = [], ""
    for unit, i in zip(given, spatial, strict=True):
        if unit is None or str(unit).lower() in ("", "pixel", "px", "voxel"):
            missing = missing or f"its axis {names[i]} has no unit of length"
            factors.append(1.0)
        elif str(unit).lower() in _NANOMETRES:
            factors.append(_NANOMETRES[str(unit).lower()])
        else:
            raise ValueError(f"the unit of axis {names[i]} must be one of length; got {unit!r}")
    return factors, missing


def _transform(steps: Sequence[Mapping], ndim: int) -> tuple[list[float], list[float]]:
    """A scale and then a translation, as OME allows them."""
    scale, shift = [1.0] * ndim, [0.0] * ndim
    for step in steps:
        kind = step["type"]
        if kind == "identity":
            continue
        if kind not in ("scale", "translation"):
            raise ValueError(f"a transformation must be a scale or a translation; got {kind!r}")
        values = [_number(value) for value in step[kind]]
        if len(values) != ndim:
            raise ValueError(f"a {kind} must have {ndim} values, one per axis; got {values}")
        if kind == "scale":
            scale = [a * b for a, b in zip(scale, values, strict=True)]
            shift = [a * b for a, b in zip(shift, values, strict=True)]
        else:
            shift = [a + b for a, b in zip(shift, values, strict=True)]
    return scale, shift


def _voxel(values: Sequence[float]) -> Vector:
    if len(values) != 3 or not all(value > 0 for value in values):
        raise ValueError(f"voxel edges must be three numbers > 0; got {list(values)}")
    return tuple(values)


def _number(value: object) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"figures must be finite; got {value}")
    return number


def _each(function, *vectors: Sequence[float]) -> Vector:
    return tuple(function(*values) for values in zip(*vectors, strict=True))
