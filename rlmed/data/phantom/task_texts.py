"""Texts of the generated tasks: questions, answers in other words, reports, completions."""

from __future__ import annotations

from collections.abc import Mapping

from rlmed.data.phantom.anatomy import NO_LESION, QUADRANTS, Study

QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "modality": ("Which technique was used for this image?", "How was this image acquired or displayed?"),
    "anatomy": ("Which part of the body does this image show?", "Which body region was examined?"),
    "disease": ("Which abnormality, if any, does this image show?", "Which finding can be seen here?"),
    "grading": ("Is the lesion small, medium or large, if there is one?",),
    "attribute": (
        "Which quadrant of the image contains the lesion?",
        "In which part of the image does the lesion lie?",
    ),
    "grounding": (
        "Where in the image is the {what}, if there is one?",
        "Which part of the image shows a {what}, if any?",
    ),
    "labels": ("Which of these findings can be seen in this image?", "Which of these does this image show?"),
    "report": ("What does this image show?", "Which findings does this image show?"),
}
"""Wordings by kind of open question, and by task."""

SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "T1-weighted": ("T1", "T1-weighted MRI"),
    "T2-weighted": ("T2", "T2-weighted MRI"),
    "FLAIR": ("fluid-attenuated inversion recovery", "FLAIR MRI"),
    "proton-density": ("PD", "PD-weighted", "proton-density-weighted"),
    "brain window": ("brain",),
    "bone window": ("bone",),
    "soft-tissue window": ("soft tissue", "soft-tissue"),
    "lung window": ("lung",),
    "frontal view": ("frontal",),
    "lateral view": ("lateral",),
    "axial view": ("axial",),
    "oblique view": ("oblique",),
    "head": ("skull", "brain"),
    "chest": ("thorax",),
    "abdomen": ("belly",),
    "knee": ("knee joint",),
    NO_LESION: ("none", "no finding", "no abnormality", "normal"),
    "cyst": ("cystic lesion",),
    "mass": ("tumor", "tumour"),
    "hemorrhage": ("haemorrhage", "bleeding", "hematoma", "haematoma"),
    "calcification": ("calcified lesion",),
    "medium": ("medium-sized", "moderate"),
    "large": ("big",),
    **{
        place: (f"{place} quadrant", f"{place.replace('upper', 'top').replace('lower', 'bottom')}")
        for place in QUADRANTS
    },
}
"""Other texts that are accepted for an answer to an open question."""


def accepted(value: str) -> list[str]:
    """Return the texts that are right where `value` is: itself, then others.

    Example:
        >>> accepted("hemorrhage")
        ['hemorrhage', 'haemorrhage', 'bleeding', 'hematoma', 'haematoma']
    """
    return [value, *SYNONYMS.get(value, ())]


def reports(study: Study) -> list[str]:
    """Return what a report of the study says, in two wordings.

    Terse, as reports are: in whole sentences, overlap with a reference would mostly be of words
    that all reports share.

    Example:
        >>> reports(Study("MRI", "FLAIR", "head", "cyst", "small", "upper left"))[0]
        'FLAIR MRI, head: small cyst, upper left.'
    """
    scan = f"{study.technique} {study.modality}"
    scan = scan[0].upper() + scan[1:]
    if study.lesion == NO_LESION:
        return [
            f"{scan}, {study.region}: {NO_LESION}.",
            f"No lesion; {study.technique} {study.modality} of the {study.region}.",
        ]
    found = f"{study.size} {study.lesion}, {study.quadrant}"
    return [
        f"{scan}, {study.region}: {found}.",
        f"{found.capitalize()}; {study.technique} {study.modality} of the {study.region}.",
    ]


def written(reasoning: str, answer: str) -> str:
    """Return a completion: reasoning and answer in the paper's tags."""
    return f"<think>{reasoning}</think>\n<answer>{answer}</answer>"
