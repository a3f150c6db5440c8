"""All readers by name. A new one is a module with a `READER`, and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from rlmed.data.readers import csv_table, dicom, huggingface, medvlm_r1, nifti, omnimedvqa, pmc_vqa, slake, vqa_rad
from rlmed.data.readers.base import Reader

READERS: Mapping[str, Reader] = {
    reader.name: reader
    for reader in (
        csv_table.READER,
        huggingface.READER,
        medvlm_r1.READER,
        omnimedvqa.READER,
        vqa_rad.READER,
        slake.READER,
        pmc_vqa.READER,
        dicom.READER,
        nifti.READER,
    )
}


def find_reader(name: str) -> Reader:
    """The reader of that name.

    Raises:
        ValueError: naming all there are.
    """
    if name not in READERS:
        raise ValueError(f"there is no reader {name!r}: choose one of {', '.join(READERS)}")
    return READERS[name]
