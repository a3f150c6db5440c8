"""One name for each imaging modality, whatever a data set calls it."""

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
"""Ways of writing a modality, without what is no letter and what stands in brackets."""
_BY_SPELLING = {spelling: name for name, spellings in _NAMES.items() for spelling in spellings}


def modality_name(text: str) -> str:
    """The name that the evaluation goes by; other names stay as they are.

    Example:
        >>> [modality_name(name) for name in ("MR (Mag-netic Resonance Imaging)", "X-Ray", "Dermoscopy")]
        ['MRI', 'X-ray', 'Dermoscopy']
    """
    return _BY_SPELLING.get(re.sub("[^a-z]", "", text.partition("(")[0].lower()), text.strip())
