"""Small DICOM files for tests: real encodings, any header."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, generate_uid

SECONDARY_CAPTURE = UID("1.2.840.10008.5.1.4.1.1.7")


def shipped(name: str) -> Path:
    """A file that pydicom's wheel brings along."""
    path = get_testdata_file(name, download=False)
    assert path is not None, f"pydicom ships no {name}"
    return Path(path)


def dataset_of(pixels: np.ndarray, *, frames: bool = False, **elements: object) -> Dataset:
    """A data set of [rows, columns] or [rows, columns, 3], plus axis `frames`; None drops one."""
    dataset = Dataset()
    dataset.preamble = b"\0" * 128
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = SECONDARY_CAPTURE
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    if frames:
        dataset.NumberOfFrames = len(pixels)
    shape = pixels.shape[1:] if frames else pixels.shape
    dataset.Rows, dataset.Columns = shape[:2]
    dataset.SamplesPerPixel = shape[2] if len(shape) > 2 else 1
    if dataset.SamplesPerPixel > 1:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = "RGB" if dataset.SamplesPerPixel > 1 else "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OW" if pixels.itemsize > 1 else "OB"
    change(dataset, **elements)
    return dataset


def change(dataset: Dataset, **elements: object) -> None:
    for name, value in elements.items():
        if value is None:
            del dataset[name]
        else:
            setattr(dataset, name, value)


def save(path: Path, dataset: Dataset) -> Path:
    dataset.save_as(path, enforce_file_format=True)
    return path


def write_dicom(path: Path, pixels: np.ndarray, **elements: object) -> Path:
    return save(path, dataset_of(pixels, **elements))


def write_big_endian(path: Path, pixels: np.ndarray, **elements: object) -> Path:
    dataset = dataset_of(pixels, **elements)
    dataset.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder(">")).tobytes()
    dataset.save_as(path, implicit_vr=False, little_endian=False, enforce_file_format=True)
    return path


def write_compressed(
    path: Path, encoded: Sequence[bytes], like: np.ndarray, transfer_syntax: UID, **elements: object
) -> Path:
    """Frames that are compressed already."""
    dataset = dataset_of(like, **elements)
    dataset.file_meta.TransferSyntaxUID = transfer_syntax
    dataset.PixelData = encapsulate(list(encoded))
    dataset["PixelData"].is_undefined_length = True
    return save(path, dataset)


def item(**elements: object) -> Dataset:
    """One item of a sequence."""
    dataset = Dataset()
    change(dataset, **elements)
    return dataset
