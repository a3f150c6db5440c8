"""Anatomy of the generated images: a table of tissues and four bodies built from ellipsoids.

Coordinates: x runs to the image's right, y to the patient's back, z to the patient's head. The
image spans [-1, 1] on both axes, so one unit is half the field of view (56 pixels at 112x112).

Relaxation times are for 1.5 T in ms: Gold et al., AJR 183:343 (2004) for the knee; de Bazelaire et
al., Radiology 230:652 (2004) for the abdomen and the vertebrae; Stanisz et al., Magn Reson Med
54:507 (2005) for muscle, heart and blood; the BrainWeb phantom (Collins et al., IEEE TMI 17:463,
1998) for the brain. Proton densities are relative to water. Hounsfield units are textbook values
for unenhanced CT, except that a mass takes up contrast. Lesion values follow the usual reading: a
cyst is fluid, a subacute hematoma has a short T1 (methemoglobin) and a ring of hemosiderin, calcium
gives no MRI signal and attenuates strongly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Vector = tuple[float, float, float]

MODALITIES = ("MRI", "CT", "X-ray")
TECHNIQUES = {
    "MRI": ("T1-weighted", "T2-weighted", "FLAIR", "proton-density"),
    "CT": ("brain window", "bone window", "soft-tissue window", "lung window"),
    "X-ray": ("frontal view", "lateral view", "axial view", "oblique view"),
}
REGIONS = ("head", "chest", "abdomen", "knee")
NO_LESION = "no lesion"
LESIONS = (NO_LESION, "cyst", "mass", "hemorrhage", "calcification")
SIZES = (NO_LESION, "small", "medium", "large")
QUADRANTS = ("upper left", "upper right", "lower left", "lower right")

RADII = {"small": (5.5, 6.5), "medium": (9.0, 10.0), "large": (14.0, 16.0)}
"""Range of the lesion radius in 1/112 of the image side: pixels of a 112x112 image."""
UNIT = 1 / 56
"""Length of 1/112 of the image side in body units."""


@dataclass(frozen=True, slots=True)
class Study:
    """The content of one generated image.

    Example:
        >>> Study("MRI", "FLAIR", "head", "cyst", "small", "upper left").region
        'head'
    """

    modality: str
    """One of `MODALITIES`."""
    technique: str
    """One of `TECHNIQUES[modality]`: MRI weighting, CT display window or X-ray view."""
    region: str
    """One of `REGIONS`."""
    lesion: str
    """One of `LESIONS`."""
    size: str
    """One of `SIZES`; "no lesion" if and only if `lesion` is."""
    quadrant: str
    """One of `QUADRANTS` as seen in the image; "no lesion" if and only if `lesion` is."""

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown value or a partly described lesion."""
        if self.modality not in TECHNIQUES:
            raise ValueError(f"Invalid Study.modality={self.modality!r}; expected one of {MODALITIES}")
        checks = (
            ("technique", self.technique, TECHNIQUES[self.modality]),
            ("region", self.region, REGIONS),
            ("lesion", self.lesion, LESIONS),
            ("size", self.size, SIZES),
            ("quadrant", self.quadrant, (NO_LESION, *QUADRANTS)),
        )
        for name, value, known in checks:
            if value not in known:
                raise ValueError(f"Invalid Study.{name}={value!r}; for {self.modality} expected one of {known}")
        absent = [value == NO_LESION for value in (self.lesion, self.size, self.quadrant)]
        if any(absent) and not all(absent):
            raise ValueError(
                f"Study has lesion {self.lesion!r}, size {self.size!r}, quadrant {self.quadrant!r}; "
                f"set all three to {NO_LESION!r} or none"
            )


class Tissue(NamedTuple):
    """Magnetic and X-ray properties of one tissue."""

    t1: float
    """Longitudinal relaxation time in ms."""
    t2: float
    """Transverse relaxation time in ms."""
    pd: float
    """Proton density relative to water."""
    hu: float
    """Attenuation in Hounsfield units."""


TISSUES: dict[str, Tissue] = {
    "air": Tissue(1000, 1, 0.00, -1000),
    "lung": Tissue(1200, 30, 0.20, -820),
    "fat": Tissue(288, 165, 0.90, -100),
    "muscle": Tissue(1008, 44, 0.90, 55),
    "cortical bone": Tissue(1000, 1, 0.05, 1200),
    "vertebra": Tissue(549, 49, 0.60, 220),
    "marrow": Tissue(288, 165, 0.80, 60),
    "white matter": Tissue(500, 70, 0.77, 27),
    "grey matter": Tissue(833, 83, 0.86, 38),
    "cerebrospinal fluid": Tissue(2569, 329, 1.00, 6),
    "liver": Tissue(586, 46, 0.80, 62),
    "spleen": Tissue(1057, 79, 0.85, 50),
    "kidney": Tissue(966, 87, 0.85, 33),
    "bowel": Tissue(900, 70, 0.80, 35),
    "heart": Tissue(1030, 40, 0.90, 48),
    "blood": Tissue(1441, 290, 0.90, 42),
    "bile": Tissue(2200, 600, 1.00, 10),
    "cartilage": Tissue(1066, 42, 0.80, 95),
    "synovial fluid": Tissue(2850, 1210, 1.00, 12),
    "capsule": Tissue(1000, 60, 0.85, 50),
    "cyst fluid": Tissue(3000, 600, 1.00, 6),
    "mass rim": Tissue(1000, 140, 0.95, 125),
    "mass core": Tissue(1600, 190, 0.95, 15),
    "mass nodule": Tissue(1000, 25, 0.60, 160),
    "clot": Tissue(260, 65, 0.90, 68),
    "hemosiderin": Tissue(900, 6, 0.50, 10),
    "calcium": Tissue(1000, 1, 0.05, 650),
}

CM_PER_UNIT = {"head": 10.5, "chest": 19.0, "abdomen": 19.0, "knee": 8.0}
"""Half the field of view in cm, to integrate attenuation along a ray."""

LESION_CENTRE: dict[str, Vector] = {
    "head": (0.30, 0.36, 0.34),
    "chest": (0.42, 0.31, 0.36),
    "abdomen": (0.42, 0.31, 0.36),
    "knee": (0.29, 0.29, 0.36),
}
"""Distance of lesion centres from the midline in x, y, z: well inside the body, off midlines."""


@dataclass(frozen=True, slots=True)
class Shape:
    """An ellipsoid of one tissue, solid or with an ellipsoidal hole.

    Example:
        A skull is Shape("cortical bone", (0, 0, 0), (0.67, 0.83, 0.9), inside="fat", hole=(0.61,
        0.77, 0.84)).
    """

    tissue: str
    centre: Vector
    radii: Vector
    inside: str = "muscle"
    """The surrounding tissue: an X-ray adds the difference between the two along the ray."""
    hole: Vector | None = None
    """Radii of an ellipsoid cut out around the same centre; earlier shapes show through."""
    tilt: float = 0.0
    """Rotation about x in radians, applied first."""
    turn: float = 0.0
    """Rotation about z in radians, applied second."""


def _pair(shape: Shape) -> list[Shape]:
    """Return the shape and its mirror image across the plane x = 0."""
    x, y, z = shape.centre
    return [replace(shape, centre=(-x, y, z), turn=-shape.turn), shape]


def _head() -> list[Shape]:
    """Return scalp, skull and brain with ventricles; face and neck below show in X-rays only."""
    csf = "cerebrospinal fluid"
    return [
        Shape("muscle", (0, 0.16, -1.08), (0.34, 0.36, 0.52), "air"),
        Shape("muscle", (0, -0.36, -0.66), (0.42, 0.46, 0.36), "air"),
        Shape("fat", (0, 0, 0.1), (0.74, 0.90, 0.82), "air"),
        Shape(csf, (0, 0, 0.1), (0.68, 0.84, 0.76), "fat"),
        Shape("cortical bone", (0, 0, 0.1), (0.69, 0.85, 0.77), "fat", hole=(0.62, 0.78, 0.70)),
        Shape("grey matter", (0, 0, 0.1), (0.59, 0.75, 0.67), csf),
        *_pair(Shape("white matter", (0.27, 0, 0.1), (0.24, 0.62, 0.52), "grey matter")),
        *_pair(Shape("grey matter", (0.21, 0.02, 0.05), (0.09, 0.17, 0.16), "white matter")),
        *_pair(Shape(csf, (0.10, -0.17, 0.08), (0.06, 0.20, 0.13), "white matter", turn=0.3)),
        *_pair(Shape(csf, (0.11, 0.27, 0.08), (0.06, 0.17, 0.12), "white matter", turn=-0.4)),
        Shape(csf, (0, 0, 0.12), (0.018, 0.70, 0.60), "grey matter"),
        *_pair(Shape("air", (0.26, -0.62, -0.36), (0.17, 0.18, 0.11))),
        *_pair(Shape("air", (0.17, -0.55, -0.62), (0.10, 0.14, 0.10))),
        Shape("cortical bone", (0, -0.45, -0.88), (0.37, 0.36, 0.09), hole=(0.27, 0.26, 0.2)),
        *[Shape("vertebra", (0, 0.22, -0.72 - 0.2 * k), (0.15, 0.15, 0.08)) for k in range(3)],
    ]


def _spine(y: float) -> list[Shape]:
    """Return vertebrae over the whole height, the canal behind them and the arch around it."""
    vertebrae = [Shape("vertebra", (0, y, 0.27 * k), (0.15, 0.13, 0.115)) for k in range(-4, 5)]
    arch = Shape("cortical bone", (0, y + 0.16, 0), (0.11, 0.09, 3.0), hole=(0.07, 0.055, 3.0))
    return [*vertebrae, arch, Shape("cerebrospinal fluid", (0, y + 0.16, 0), (0.07, 0.055, 3.0))]


def _chest() -> list[Shape]:
    """Return two lungs, heart, great vessels, trachea, spine, sternum and slanting ribs."""
    ribs = [
        Shape("cortical bone", (0, 0.03, 0.24 * k), (0.83, 0.68, 0.035), hole=(0.76, 0.61, 0.06), tilt=0.42)
        for k in range(-5, 6)
    ]
    return [
        Shape("fat", (0, 0, 0), (0.94, 0.74, 2.6), "air"),
        Shape("muscle", (0, 0, 0), (0.87, 0.67, 2.5), "fat"),
        *_pair(Shape("lung", (0.43, 0.02, 0.0), (0.35, 0.53, 0.80), turn=0.1)),
        Shape("heart", (0.16, -0.16, -0.18), (0.34, 0.28, 0.32), "lung", turn=0.5),
        Shape("blood", (0.21, -0.15, -0.17), (0.16, 0.12, 0.19), "heart", turn=0.5),
        Shape("air", (0, 0.02, 0.62), (0.055, 0.055, 0.34)),
        Shape("blood", (0.12, 0.19, 0), (0.075, 0.075, 3.0)),
        *_spine(0.36),
        Shape("vertebra", (0, -0.60, 0), (0.13, 0.035, 0.5)),
        *ribs,
    ]


def _abdomen() -> list[Shape]:
    """Return liver, spleen, kidneys, stomach with gas, gall bladder, bowel, spine, iliac wings."""
    bowel = [(-0.05, -0.36, -0.05), (0.12, -0.10, -0.3), (-0.15, -0.2, -0.45), (0.33, -0.32, -0.5), (0.38, -0.1, -0.62)]
    return [
        Shape("fat", (0, 0, 0), (0.92, 0.74, 2.6), "air"),
        Shape("muscle", (0, 0.02, 0), (0.85, 0.66, 2.5), "fat"),
        Shape("fat", (0, -0.03, 0), (0.79, 0.58, 2.4)),
        Shape("liver", (-0.42, -0.10, 0.22), (0.38, 0.42, 0.46), "fat", turn=0.2),
        Shape("spleen", (0.62, 0.17, 0.30), (0.13, 0.27, 0.27), "fat", turn=-0.2),
        *_pair(Shape("kidney", (0.37, 0.30, -0.08), (0.14, 0.17, 0.30), "fat", turn=0.4)),
        *_pair(Shape("fat", (0.34, 0.29, -0.08), (0.05, 0.07, 0.12), "kidney")),
        Shape("bowel", (0.36, -0.24, 0.12), (0.25, 0.19, 0.28), "fat", turn=-0.3),
        Shape("air", (0.36, -0.33, 0.14), (0.15, 0.07, 0.20), "bowel"),
        Shape("bile", (-0.16, -0.28, 0.02), (0.10, 0.12, 0.14), "liver"),
        *[Shape("bowel", centre, (0.12, 0.11, 0.12), "fat") for centre in bowel],
        *[Shape("air", (x, y - 0.03, z), (0.07, 0.05, 0.07), "bowel") for x, y, z in bowel[1:4]],
        *_pair(Shape("muscle", (0.24, 0.32, 0), (0.12, 0.14, 2.0), "fat")),
        Shape("muscle", (0, 0.40, 0), (0.30, 0.22, 2.2), "fat"),
        *_spine(0.30),
        Shape("blood", (0.09, 0.12, 0), (0.07, 0.07, 3.0), "fat"),
        *_pair(Shape("cortical bone", (0.50, 0.18, -0.98), (0.30, 0.24, 0.36), hole=(0.26, 0.20, 0.33))),
    ]


def _knee() -> list[Shape]:
    """Return femur with condyles, tibia, fibula, patella, cartilage, joint fluid, fat, muscle."""

    def bone(centre: Vector, radii: Vector) -> Shape:
        return Shape("cortical bone", centre, radii)

    def grown(shape: Shape, tissue: str, by: float, inside: str) -> Shape:
        a, b, c = shape.radii
        return replace(shape, tissue=tissue, radii=(a + by, b + by, c + by), inside=inside)

    tibia_and_femur = [
        bone((0, 0.02, 1.20), (0.25, 0.22, 0.84)),
        bone((0, 0, 0.34), (0.43, 0.33, 0.31)),
        bone((0, 0, -0.26), (0.45, 0.33, 0.22)),
        bone((-0.02, 0.02, -1.20), (0.25, 0.22, 0.92)),
    ]
    fibula = bone((0.43, 0.18, -0.92), (0.085, 0.085, 0.62))
    patella = bone((0, -0.44, 0.28), (0.17, 0.09, 0.20))
    return [
        Shape("fat", (0, 0, 0), (0.68, 0.68, 2.8), "air"),
        *_pair(Shape("muscle", (0.30, 0.05, 1.05), (0.27, 0.50, 0.75), "fat")),
        *_pair(Shape("muscle", (0.30, 0.12, -1.05), (0.26, 0.46, 0.72), "fat")),
        Shape("synovial fluid", (0, -0.02, 0.01), (0.50, 0.36, 0.10), "fat"),
        Shape("synovial fluid", (0, -0.28, 0.48), (0.16, 0.08, 0.26), "fat"),
        *[grown(shape, "cartilage", 0.03, "fat") for shape in tibia_and_femur[1:3]],
        *tibia_and_femur,
        fibula,
        patella,
        *[grown(shape, "marrow", -0.035, "cortical bone") for shape in (*tibia_and_femur, fibula, patella)],
        Shape("synovial fluid", (0, 0.02, 0.07), (0.08, 0.36, 0.11), "marrow"),
    ]


BODIES = {"head": tuple(_head()), "chest": tuple(_chest()), "abdomen": tuple(_abdomen()), "knee": tuple(_knee())}
"""The shapes of each region, back to front, before any random change."""


def _add(vector: Vector, change: npt.NDArray[np.float64]) -> Vector:
    """Return the sum as a tuple; `change` is [3]."""
    x, y, z = (np.array(vector) + change).tolist()
    return x, y, z


def sample_body(region: str, rng: np.random.Generator) -> list[Shape]:
    """Return the shapes of a region with every organ slightly displaced and resized at random."""
    shapes = []
    for shape, moves, grows in zip(BODIES[region], *rng.normal(size=(2, len(BODIES[region]), 3)), strict=True):
        scale = np.minimum(shape.radii, 0.2)  # nested thin layers must stay nested
        shift, change = 0.05 * scale * np.clip(moves, -2, 2), 0.04 * scale * np.clip(grows, -2, 2)
        hole = None if shape.hole is None else _add(shape.hole, change)
        shapes.append(replace(shape, centre=_add(shape.centre, shift), radii=_add(shape.radii, change), hole=hole))
    return shapes


def sample_lesion(kind: str, centre: npt.NDArray[np.float64], radius: float, rng: np.random.Generator) -> list[Shape]:
    """Return a lesion's shapes by kind, around `centre` [3], outer radius `radius` (body units)."""

    def ball(tissue: str, fraction: float, inside: str, offset: float = 0.0) -> Shape:
        direction = rng.normal(size=3)
        shift = offset * radius * direction / np.linalg.norm(direction)
        radii = fraction * radius * rng.uniform(0.94, 1.06, 3)
        return Shape(tissue, _add((0, 0, 0), centre + shift), _add((0, 0, 0), radii), inside)

    if kind == "cyst":
        return [ball("capsule", 1.0, "muscle"), ball("cyst fluid", 0.84, "capsule")]
    if kind == "hemorrhage":
        return [ball("hemosiderin", 1.0, "muscle"), ball("clot", 0.70, "hemosiderin")]
    if kind == "calcification":
        lumps = [ball("calcium", 0.36, "capsule", offset=0.50) for _ in range(4)]
        return [ball("capsule", 1.0, "muscle"), ball("calcium", 0.58, "capsule"), *lumps]
    if kind == "mass":
        nodules = [ball("mass nodule", 0.30, "mass rim", offset=0.64) for _ in range(4)]
        return [ball("mass rim", 1.0, "muscle"), ball("mass core", 0.5, "mass rim", offset=0.1), *nodules]
    raise ValueError(f"Invalid kind={kind!r} in sample_lesion; expected one of {LESIONS[1:]}")
