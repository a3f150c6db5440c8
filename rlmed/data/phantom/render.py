"""Render the generated bodies by the physics of each modality.

CT and MRI show a plane through the body, on which every ellipsoid is a quadratic form in the image
coordinates, without building a volume. X-rays sum the exact length of each ray inside each
ellipsoid. So an image takes a few milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rlmed.data.phantom.anatomy import (
    CM_PER_UNIT,
    LESION_CENTRE,
    NO_LESION,
    RADII,
    TISSUES,
    UNIT,
    Shape,
    Study,
    Tissue,
    sample_body,
    sample_lesion,
)

Array = npt.NDArray[np.float64]
Image = npt.NDArray[np.float32]


class Timing(NamedTuple):
    """Timing of an MRI sequence in ms, and the signal shown as white."""

    tr: float
    te: float
    ti: float
    """Inversion time; 0 for a plain spin echo."""
    white: float


SEQUENCES = {
    "T1-weighted": Timing(500, 12, 0, 0.72),
    "T2-weighted": Timing(4000, 100, 0, 0.70),
    "FLAIR": Timing(9000, 100, 1730, 0.46),
    "proton-density": Timing(2500, 20, 0, 0.90),
}
"""Usual values at 1.5 T; FLAIR's inversion time nulls cerebrospinal fluid."""

WINDOWS = {
    "brain window": (40.0, 80.0),
    "bone window": (300.0, 1500.0),
    "soft-tissue window": (40.0, 400.0),
    "lung window": (-500.0, 1500.0),
}
"""Centre and width of the displayed range in Hounsfield units."""

CT_NOISE = 3.0
"""Standard deviation at the rim of the body in Hounsfield units."""
MRI_NOISE = 0.018
"""Standard deviation in each of the two receiver channels, relative to white."""
MU_WATER = 0.206
"""Linear attenuation of water at 60 keV in 1/cm (NIST XCOM)."""
XRAY_PHOTONS = 2.0e5
"""Photons per pixel in air."""
XRAY_DETAIL = 1.5
"""Added share of the difference from the local mean, as radiography shows thick and thin parts."""
XRAY_LESION_GAIN = {"cyst": 14.0, "mass": 7.0, "hemorrhage": 14.0, "calcification": 1.6}
"""X-rays exaggerate a lesion's contrast to soft tissue by this: most would be invisible."""


def spin_echo(tissue: Tissue, tr: float, te: float, ti: float = 0.0) -> float:
    """Return the MRI signal of a tissue relative to fully relaxed water; times in ms.

    Spin echo: PD (1 - exp(-TR/T1)) exp(-TE/T2). With an inversion pulse (ti > 0), as magnitude:
    PD |1 - 2 exp(-TI/T1) + exp(-TR/T1)| exp(-TE/T2).
    """
    recovered = 1 - np.exp(-tr / tissue.t1)
    if ti > 0:
        recovered = abs(1 - 2 * np.exp(-ti / tissue.t1) + np.exp(-tr / tissue.t1))
    return float(tissue.pd * recovered * np.exp(-te / tissue.t2))


class Frames(NamedTuple):
    """A view in the frame of each of n shapes, where the shape is the unit ball at 0.

    Each [n, 3].
    """

    right: Array
    down: Array
    depth: Array
    origin: Array


class View(NamedTuple):
    """Position of an image in the body: points `origin + u * right + v * down` along `depth`."""

    origin: Array
    right: Array
    down: Array
    depth: Array


def _view(study: Study, rng: np.random.Generator) -> View:
    """Return a study's view with a small random shift, scale and rotation, each vector [3]."""
    x, y, z = np.eye(3)
    quarter = np.sqrt(0.5)
    views = {
        "frontal view": (x, -z, y),
        "lateral view": (y, -z, x),
        "axial view": (x, y, z),
        "oblique view": (quarter * (x + y), -z, quarter * (y - x)),
    }
    plane = study.technique if study.modality == "X-ray" else "axial view"
    if study.modality != "X-ray" and study.region == "knee":
        # a coronal section: in an axial one, a knee is one round bone like any other
        plane = "frontal view"
    right, down, depth = views[plane]
    angle, zoom = rng.normal(0, 0.04), 1 + 0.03 * rng.uniform(-1, 1, 2)
    shift = rng.uniform(-0.035, 0.035, 2)
    turned_right = (np.cos(angle) * right + np.sin(angle) * down) * zoom[0]
    turned_down = (np.cos(angle) * down - np.sin(angle) * right) * zoom[1]
    origin = shift[0] * right + shift[1] * down + rng.uniform(-0.04, 0.04) * depth
    return View(origin, turned_right, turned_down, depth)


def _lesion(study: Study, view: View, rng: np.random.Generator) -> list[Shape]:
    """Return the shapes of the study's lesion, in its image quadrant; empty without a lesion."""
    if study.lesion == NO_LESION:
        return []
    vertical, horizontal = study.quadrant.split()
    reach = np.array(LESION_CENTRE[study.region])
    u = np.linalg.norm(view.right * reach) * (1 if horizontal == "right" else -1)
    v = np.linalg.norm(view.down * reach) * (1 if vertical == "lower" else -1)
    radius = rng.uniform(*RADII[study.size]) * UNIT
    room = max(0.02, 0.26 - radius) * 0.4
    du, dv = rng.uniform(-room, room, 2)
    centre = view.origin + (u + du) * view.right + (v + dv) * view.down
    return sample_lesion(study.lesion, centre, radius, rng)


def _frames(shapes: Sequence[Shape], radii: Array, view: View) -> Frames:
    """Return the view's vectors in each shape's frame, in units of `radii` [n, 3]."""
    axes = np.stack([_rotation(s.tilt, s.turn) for s in shapes])
    to_ball = axes.transpose(0, 2, 1) / radii[:, :, None]
    origin = np.einsum("nij,nj->ni", to_ball, view.origin - np.array([s.centre for s in shapes]))
    right, down, depth = (np.einsum("nij,j->ni", to_ball, axis) for axis in (view.right, view.down, view.depth))
    return Frames(right, down, depth, origin)


def _rotation(tilt: float, turn: float) -> Array:
    """Return the matrix [3, 3] of a rotation about x by `tilt`, then about z by `turn`."""
    ca, sa, cb, sb = np.cos(tilt), np.sin(tilt), np.cos(turn), np.sin(turn)
    return np.array([[cb, -sb * ca, sb * sa], [sb, cb * ca, -cb * sa], [0, sa, ca]])


@lru_cache(maxsize=4)
def _monomials(size: int) -> Image:
    """Return the pixels' u², uv, v², u, v and 1, float32 [6, size * size]; read-only."""
    u, v = _grid(size)
    return np.stack([u * u, u * v, v * v, u, v, np.ones_like(u)])


@lru_cache(maxsize=4)
def _grid(size: int) -> tuple[Image, Image]:
    """Return the pixel centres' u (right) and v (down), each float32 [size * size]; read-only."""
    line = ((np.arange(size) + 0.5) * 2 / size - 1).astype(np.float32)
    v, u = np.meshgrid(line, line, indexing="ij")
    return u.ravel(), v.ravel()


def _quadratic(frames: Frames, size: int) -> Image:
    """Return pixels' squared distances from shape centres in their radii, float32 [n, pixels]."""
    right, down, _, origin = frames
    terms = [(right, right), (2 * right, down), (down, down), (2 * right, origin), (2 * down, origin), (origin, origin)]
    factors = np.stack([(a * b).sum(1) for a, b in terms], 1).astype(np.float32)
    return factors @ _monomials(size)


def _cover(shapes: Sequence[Shape], radii: Array, view: View, size: int) -> Image:
    """Return the share of pixels that ellipsoids of `radii` [n, 3] cover, float32 [n, pixels]."""
    sharpness = (radii.min(1)[:, None] * size / 2).astype(np.float32)
    # the distance, 1 on the surface, becomes the share in place: new arrays take half of the time
    cover = _quadratic(_frames(shapes, radii, view), size)
    np.sqrt(np.maximum(cover, 0, out=cover), out=cover)
    np.multiply(np.subtract(1, cover, out=cover), sharpness, out=cover)
    return np.clip(np.add(cover, 0.5, out=cover), 0, 1, out=cover)


def render_slice(shapes: Sequence[Shape], values: Sequence[float], outside: float, view: View, size: int) -> Image:
    """Render a plane through the body, float32 [size, size].

    A pixel has the value of the last shape that covers it, else `outside`. Edges are blended over
    one pixel: a pixel on a border shows the mean of both sides (partial volume).
    """
    image = np.full(size * size, outside, np.float32)
    radii = np.array([s.radii for s in shapes])
    cover = _cover(shapes, radii, view, size)
    hollow = [i for i, shape in enumerate(shapes) if shape.hole is not None]
    if hollow:
        cover[hollow] *= 1 - _cover([shapes[i] for i in hollow], np.array([shapes[i].hole for i in hollow]), view, size)
    for part, value in zip(cover, values, strict=True):
        image += part * (np.float32(value) - image)
    return image.reshape(size, size)


def _spans(shapes: Sequence[Shape], radii: Array, view: View, size: int) -> tuple[Image, Image]:
    """Return where rays along `view.depth` enter and leave each ellipsoid, as float32 [n, pixels].

    With the ray at p + t d, |p + t d|^2 = 1 has the roots (-p·d ± sqrt((p·d)^2 - d·d (p·p - 1))) /
    d·d. Both are clipped to the field of view, 1.1 on either side; if the ray misses, entry equals
    exit.
    """
    u, v = _grid(size)
    frames = _frames(shapes, radii, view)
    a = (frames.depth * frames.depth).sum(1).astype(np.float32)[:, None]
    factors = np.stack([(frames.depth * w).sum(1) for w in (frames.right, frames.down, frames.origin)], 1)
    middle = (factors.astype(np.float32) / -a) @ np.stack([u, v, np.ones_like(u)])
    half = np.sqrt(np.maximum(middle * middle - (_quadratic(frames, size) - 1) / a, 0))
    return np.clip(middle - half, -1.1, 1.1), np.clip(middle + half, -1.1, 1.1)


def render_rays(shapes: Sequence[Shape], excess: Sequence[float], view: View, size: int) -> Image:
    """Sum over shapes `excess[i]` times the length of pixel rays in shape i, float32 [size, size].

    If `excess` is a shape's attenuation minus that of its surrounding tissue, this is the integral
    of the attenuation.
    """
    enter, leave = _spans(shapes, np.array([s.radii for s in shapes]), view, size)
    length = leave - enter
    hollow = [i for i, shape in enumerate(shapes) if shape.hole is not None]
    if hollow:
        hole_enter, hole_leave = _spans(
            [shapes[i] for i in hollow], np.array([shapes[i].hole for i in hollow]), view, size
        )
        shared = np.minimum(leave[hollow], hole_leave) - np.maximum(enter[hollow], hole_enter)
        length[hollow] -= np.maximum(shared, 0)
    return (np.array(excess, np.float32) @ length).reshape(size, size)


def _smooth_field(rng: np.random.Generator, size: int) -> Image:
    """Return a slowly varying random field with values of about ±1, [size, size]."""
    u, v = _grid(size)
    waves = rng.normal(0, 0.5, 4).astype(np.float32)
    field: Image = waves[0] * u + waves[1] * v + waves[2] * u * v + waves[3] * (u * u - v * v)
    return field.reshape(size, size)


def _render_mri(study: Study, body: list[Shape], view: View, rng: np.random.Generator, size: int) -> Image:
    """Return spin-echo signal, uneven coils and Rician noise included, over white, [size, size]."""
    tr, te, ti, white = SEQUENCES[study.technique]
    jitter = dict(zip(TISSUES, rng.normal(1, 0.03, len(TISSUES)), strict=True))
    signal = {name: jitter[name] * spin_echo(tissue, tr, te, ti) / white for name, tissue in TISSUES.items()}
    image = render_slice(body, [signal[s.tissue] for s in body], 0.0, view, size)
    image = image * (1 + 0.05 * _smooth_field(rng, size))
    real, imaginary = rng.standard_normal((2, size, size), np.float32) * np.float32(MRI_NOISE)
    magnitude: Image = np.hypot(image + real, imaginary)
    return magnitude


def _render_ct(study: Study, body: list[Shape], view: View, rng: np.random.Generator, size: int) -> Image:
    """Return windowed Hounsfield units, 0 to 1, [size, size]; photon noise grows to the middle."""
    jitter = dict(zip(TISSUES, rng.normal(0, 2.0, len(TISSUES)), strict=True))
    image = render_slice(body, [TISSUES[s.tissue].hu + jitter[s.tissue] for s in body], -1000.0, view, size)
    u, v = _grid(size)
    # fewer photons pass through the middle of the body, so its Poisson noise is stronger; the many
    # sums of a reconstruction make it Gaussian
    spread = CT_NOISE * (1 + 0.5 * np.exp(-2 * (u * u + v * v))).reshape(size, size)
    noisy: Image = image + rng.standard_normal((size, size), np.float32) * spread
    centre, width = WINDOWS[study.technique]
    return (noisy - centre) / width + 0.5


def _blur(image: Image, radius: int) -> Image:
    """Return means over squares of 2 * radius + 1 pixels, edge pixels repeated, [size, size]."""
    width = 2 * radius + 1
    for axis in (0, 1):
        padded = np.pad(image, [(radius + 1, radius) if i == axis else (0, 0) for i in (0, 1)], mode="edge")
        total = padded.cumsum(axis, dtype=np.float64)
        image = (total.take(range(width, total.shape[axis]), axis) - total.take(range(image.shape[axis]), axis)) / width
    return image.astype(np.float32)


def _render_xray(
    study: Study, body: list[Shape], lesion: list[Shape], view: View, rng: np.random.Generator, size: int
) -> Image:
    """Return log Beer–Lambert attenuation with Poisson noise, stretched to 0 to 1, [size, size]."""
    per_unit = MU_WATER * CM_PER_UNIT[study.region] / 1000
    excess = [per_unit * (TISSUES[s.tissue].hu - TISSUES[s.inside].hu) for s in body]
    if lesion:
        gain = XRAY_LESION_GAIN[study.lesion]
        excess += [gain * per_unit * (TISSUES[s.tissue].hu - TISSUES[s.inside].hu) for s in lesion]
    depth = np.maximum(render_rays([*body, *lesion], excess, view, size), 0)
    photons = np.maximum(rng.poisson(XRAY_PHOTONS * np.exp(-depth)), 1)
    measured: Image = np.log(XRAY_PHOTONS / photons).astype(np.float32)
    detail = measured - _blur(measured, size // 8)
    white = float(np.percentile(measured, 96)) / 0.72
    return ((measured + XRAY_DETAIL * detail) / white).astype(np.float32)


def render(study: Study, rng: np.random.Generator, size: int = 112) -> npt.NDArray[np.uint8]:
    """Render a grey image of the study, uint8 [size, size]; same study and `rng` state, same bytes.

    Raises:
        ValueError: if `size` is below 28, where a small lesion is less than 3 pixels wide.
    """
    return _render(study, rng, size)[0]


Box = tuple[int, int, int, int]
"""Left, top, right and bottom edge in pixels: (0, 0, 1, 1) is the first pixel."""


def render_with_box(
    study: Study, rng: np.random.Generator, size: int = 112
) -> tuple[npt.NDArray[np.uint8], Box | None]:
    """Render the image as `render` does, and return it with its lesion's box; None without one.

    The box is the smallest that holds every pixel in which the lesion was drawn: those that it
    covers in part in a slice, those whose ray meets it in an X-ray.

    Raises:
        ValueError: as `render` does.
    """
    image, view, lesion = _render(study, rng, size)
    if not lesion:
        return image, None
    drawn = _drawn(lesion, view, size, through=study.modality == "X-ray")
    columns, rows = np.flatnonzero(drawn.any(0)), np.flatnonzero(drawn.any(1))
    return image, (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def _drawn(lesion: Sequence[Shape], view: View, size: int, *, through: bool) -> npt.NDArray[np.bool_]:
    """Return which pixels the shapes touch, in the plane or `through` the body, [size, size]."""
    radii = np.array([shape.radii for shape in lesion])
    if through:
        enter, leave = _spans(lesion, radii, view, size)
        touched = leave > enter
    else:
        touched = _cover(lesion, radii, view, size) > 0
    return touched.any(0).reshape(size, size)


def _render(study: Study, rng: np.random.Generator, size: int) -> tuple[npt.NDArray[np.uint8], View, list[Shape]]:
    """Return a study's image, its view and the shapes of its lesion."""
    if size < 28:
        raise ValueError(f"render got size={size}; lesions cannot be seen below 28 pixels, use 112 or more")
    view = _view(study, rng)
    lesion = _lesion(study, view, rng)
    body = sample_body(study.region, rng)
    if study.modality == "X-ray":
        image = _render_xray(study, body, lesion, view, rng, size)
    elif study.modality == "CT":
        image = _render_ct(study, [*body, *lesion], view, rng, size)
    else:
        image = _render_mri(study, [*body, *lesion], view, rng, size)
    return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8), view, lesion
