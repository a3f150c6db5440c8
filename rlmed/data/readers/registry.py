"""Look up readers by name. To add one, write a module with a `READER` and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from rlmed.data.readers.base import Reader
from rlmed.data.readers.formats import coco, csv_table, huggingface, reports
from rlmed.data.readers.published import medvlm_r1, omnimedvqa, path_vqa, pmc_vqa, slake, vqa_rad
from rlmed.data.readers.volumes import dicom, files, nifti

READERS: Mapping[str, Reader] = {
    reader.name: reader
    for reader in (
        csv_table.READER,
        huggingface.READER,
        coco.READER,
        reports.READER,
        medvlm_r1.READER,
        omnimedvqa.READER,
        vqa_rad.READER,
        slake.READER,
        path_vqa.READER,
        pmc_vqa.READER,
        dicom.READER,
        nifti.READER,
        files.READER,
    )
}


def find_reader(name: str) -> Reader:
    """Return the reader of that name.

    Raises:
        ValueError: for an unknown name; lists all readers.
    """
    if name not in READERS:
        raise ValueError(f"Invalid reader {name!r}; expected one of {', '.join(READERS)}")
    return READERS[name]
