"""Normalize the names of imaging modalities across data sets."""

from __future__ import annotations

import re

_NAMES = {
    "MRI": ("mr", "mri", "magneticresonance", "magneticresonanceimaging"),
    "CT": ("ct", "computedtomography"),
    "X-ray": ("xray", "xrays", "xr", "cr", "dx", "radiograph", "radiography"),
    "Ultrasound": ("us", "ultrasound", "ultrasonography"),
    "OCT": ("oct", "opticalcoherencetomography"),
    "PET": ("pt", "pet"),
}
"""Spellings of each modality, reduced to letters and without bracketed parts."""
_BY_SPELLING = {spelling: name for name, spellings in _NAMES.items() for spelling in spellings}


def modality_name(text: str) -> str:
    """Return the modality name that evaluation uses; unknown names are unchanged.

    Example:
        >>> [modality_name(name) for name in ("MR (Mag-netic Resonance Imaging)", "X-Ray", "Dermoscopy")]
        ['MRI', 'X-ray', 'Dermoscopy']
    """
    return _BY_SPELLING.get(re.sub("[^a-z]", "", text.partition("(")[0].lower()), text.strip())
