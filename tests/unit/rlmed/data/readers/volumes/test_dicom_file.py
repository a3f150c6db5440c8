"""Headers of DICOM files, and everything a damaged or hostile file can get wrong."""

import io
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pydicom", reason="needs rlmed's extra 'readers'")

from pydicom.uid import JPEG2000, MPEG2MPML, JPEGBaseline8Bit

from rlmed.data.images import BadImageError
from rlmed.data.readers.volumes import dicom_file
from rlmed.data.readers.volumes.decoder_process import DecoderProcess
from rlmed.data.readers.volumes.dicom_file import MODALITIES, decode_frame, read_header
from rlmed.data.readers.volumes.dicom_pixels import render_frame
from tests.unit.rlmed.data.readers.dicom_files import dataset_of, save, shipped, write_compressed, write_dicom

GREY = np.random.default_rng(0).integers(0, 4096, (32, 48)).astype(np.uint16)
NAME = "DOE^JANE"


def render(path: Path, number: int | None = None) -> Image.Image:
    header = read_header(path)
    return render_frame(path, header, header.frame_index(number))


@pytest.mark.parametrize(
    ("stated", "wanted"),
    [("MR", "MRI"), ("CT", "CT"), ("CR", "X-ray"), ("DX", "X-ray"), ("MG", "X-ray"), ("US", "Ultrasound"), ("SC", "")],
)
def test_modality_is_rlmeds(tmp_path, stated, wanted):
    assert read_header(write_dicom(tmp_path / "a", GREY, Modality=stated)).modality == wanted
    assert {"MRI", "CT", "X-ray"} <= set(MODALITIES.values())


@pytest.mark.parametrize(("stated", "wanted"), [("YES", True), ("yes ", True), ("NO", False), ("", False)])
def test_burnt_in_text_is_known_where_it_is_stated(tmp_path, stated, wanted):
    assert read_header(write_dicom(tmp_path / "a", GREY, BurnedInAnnotation=stated)).burned_in is wanted


def test_a_header_holds_nothing_of_a_patient(tmp_path):
    path = write_dicom(
        tmp_path / "a",
        GREY,
        PatientName=NAME,
        PatientID="4711",
        PatientBirthDate="19600229",
        InstitutionName="St. Elsewhere",
    )
    header = read_header(path)
    for text in (NAME, "4711", "19600229", "Elsewhere", header.dataset.get("SOPInstanceUID", "none")):
        assert text not in str(header.dataset) or text == "none"


def test_only_the_frame_asked_for_is_read(tmp_path, monkeypatch):
    frames = np.zeros((200, 64, 64), dtype=np.uint16)
    frames[150] = 7
    path = write_dicom(tmp_path / "a", frames, frames=True)
    read = []
    original = dicom_file.BoundedStream.read
    monkeypatch.setattr(
        dicom_file.BoundedStream, "read", lambda self, size=-1, /: read.append(size) or original(self, size)
    )
    values = decode_frame(path, read_header(path), 150)
    assert (values == 7).all()
    assert sum(read) < 3 * frames[0].nbytes


@pytest.mark.parametrize("number", [0, 3, 10**6])
def test_a_frame_out_of_range_is_an_error(tmp_path, number):
    path = write_dicom(tmp_path / "a", np.stack([GREY] * 2), frames=True)
    with pytest.raises(BadImageError, match=f"frame {number}: .*from 1 to 2"):
        render(path, number)


def test_a_frame_that_only_the_header_has_is_an_error(tmp_path):
    path = write_dicom(tmp_path / "a", np.stack([GREY] * 2), frames=True, NumberOfFrames=10**9)
    with pytest.raises(BadImageError, match=r"1000000000 frames .*48x32 .*16 bits.* 6144"):
        render(path)


@pytest.mark.parametrize("name", ["reportsi", "rtplan", "waveform_ecg", "test-SR"])
def test_a_file_without_pixels_is_an_error(name):
    with pytest.raises(BadImageError, match="has no pixels"):
        read_header(shipped(f"{name}.dcm"))


def test_a_header_without_its_pixels_is_an_error(tmp_path):
    with pytest.raises(BadImageError, match="has no pixels"):
        render(write_dicom(tmp_path / "a", GREY, PixelData=None))


def test_a_truncated_file_is_an_error_wherever_it_is_cut(tmp_path):
    with pytest.raises(BadImageError, match="damaged, truncated"):
        render(shipped("MR_truncated.dcm"))
    # the compressed file ends in padding that may be missing
    uncompressed, compressed = write_dicom(tmp_path / "a", GREY), shipped("MR_small_jpeg_ls_lossless.dcm")
    for whole in (uncompressed.read_bytes(), compressed.read_bytes()[:-150]):
        for length in range(0, len(whole) - 1, len(whole) // 40):
            (tmp_path / "cut").write_bytes(whole[:length])
            with pytest.raises(BadImageError):
                render(tmp_path / "cut")


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 5000, b"question,answer\nWhich organ?,liver\n" * 100, b"\x89PNG\r\n\x1a\n" * 100]
)
def test_another_file_is_an_error(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(BadImageError):
        read_header(tmp_path / "a")


def test_a_missing_file_or_a_folder_is_an_error_that_does_not_name_it(tmp_path):
    (tmp_path / NAME).mkdir()
    for path in (tmp_path / NAME, tmp_path / NAME / "1.dcm"):
        with pytest.raises(BadImageError, match="cannot be read") as caught:
            read_header(path)
        assert NAME not in str(caught.value)


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"Rows": 65535, "Columns": 65535}, "more than 50000000 values"),
        ({"Rows": 64}, "48x64 .* 16 bits, .*6144 bytes; .*has 3072"),
        ({"Rows": 0}, "48x0 pixels"),
        ({"PhotometricInterpretation": NAME}, "photometric interpretation is none of"),
        ({"PhotometricInterpretation": "RGB"}, "1 samples a pixel, .*colours need 3"),
        ({"SamplesPerPixel": 3}, "3 samples a pixel, .*colours need 1"),
        ({"BitsAllocated": 64}, "48x32 .* 64 bits, .*12288 bytes; .*has 3072"),
        ({"BitsAllocated": 12}, "BitsStored 16 and BitsAllocated 12"),
        ({"PixelSpacing": [1.0, 1000.0]}, "more than 20 times"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "palette is missing"),
    ],
)
def test_a_header_that_lies_is_an_error_that_quotes_no_text(tmp_path, elements, reason):
    with pytest.raises(BadImageError, match=reason) as caught:
        render(write_dicom(tmp_path / "a", GREY, **elements))
    assert NAME not in str(caught.value)


def test_a_huge_declared_size_costs_no_memory(tmp_path):
    path = write_dicom(tmp_path / "a", GREY, Rows=60000, Columns=60000)
    tracemalloc.start()
    with pytest.raises(BadImageError, match="60000x60000"):
        render(path)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(("form", "syntax"), [("JPEG", JPEGBaseline8Bit), ("JPEG2000", JPEG2000)])
def test_a_compressed_frame_of_another_size_than_the_headers_is_not_decoded(tmp_path, monkeypatch, form, syntax):
    bomb = io.BytesIO()
    Image.new("L", (6000, 5000)).save(bomb, form)
    assert len(bomb.getvalue()) < 700_000
    path = write_compressed(tmp_path / "a", [bomb.getvalue()], np.zeros((32, 48), dtype=np.uint8), syntax)
    monkeypatch.setattr(DecoderProcess, "decode", lambda *arguments: pytest.fail("it was decoded"))
    with pytest.raises(BadImageError, match=r"6000x5000 .* 1 samples.*header says 48x32 of 1"):
        render(path)


def test_a_deflated_data_set_is_refused_before_it_is_inflated():
    with pytest.raises(BadImageError, match="deflated"):
        read_header(shipped("image_dfl.dcm"))


def test_a_video_is_an_error(tmp_path):
    with pytest.raises(BadImageError, match="compressed pixels say no size"):
        render(write_compressed(tmp_path / "a", [b"\0\0\1\xb3" + b"\0" * 100], GREY, MPEG2MPML))


def test_an_encoding_without_a_decoder_is_an_error():
    with pytest.raises(BadImageError, match="no installed decoder supports them"):
        render(shipped("JPEG-lossy.dcm"))


def test_an_element_that_claims_to_be_longer_than_allowed_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom_file, "MAX_READ", 1000)
    with pytest.raises(BadImageError, match="more than 1000"):
        render(write_dicom(tmp_path / "a", GREY))


def test_an_element_without_an_end_is_not_read_to_the_end_of_the_file(tmp_path, monkeypatch):
    path = write_dicom(tmp_path / "a", GREY)
    head = path.read_bytes()[: -GREY.nbytes]
    place = head.index(b"\x08\x00\x16\x00UI")  # the first element after the file's meta information
    with path.open("wb") as file:
        file.write(head[:place] + b"\x05\x00\x10\x10OB\0\0\xff\xff\xff\xff")
        file.truncate(100_000_000)  # zeros that take no room on the disk
    monkeypatch.setattr(dicom_file, "MAX_READ", 1_000_000)
    tracemalloc.start()
    with pytest.raises(BadImageError, match="more than 1000000 bytes"):
        read_header(path)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_random_damage_never_raises_anything_else(tmp_path):
    rng = random.Random(0)
    originals = [
        shipped(f"{name}.dcm").read_bytes() for name in ("MR_small_implicit", "rtdose_rle_1frame", "SC_rgb_rle")
    ]
    originals.append(save_bytes(tmp_path, GREY))
    outcomes = set()
    for _ in range(400):
        damaged = bytearray(rng.choice(originals))
        for _ in range(rng.choice((1, 4, 16))):
            damaged[rng.randrange(132, min(len(damaged), 2500))] = rng.randrange(256)
        (tmp_path / "a").write_bytes(damaged)
        try:
            render(tmp_path / "a")
            outcomes.add("read")
        except BadImageError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def save_bytes(folder: Path, pixels: np.ndarray) -> bytes:
    return save(
        folder / "original", dataset_of(pixels, PixelSpacing=[1, 1], WindowCenter=1, WindowWidth=2)
    ).read_bytes()


def test_pydicoms_log_records_stay_quiet(tmp_path, caplog):
    """They quote what they complain about; so do warnings, see test_dicom.py's own process."""
    syntax = b"1.2.840.10008.1.2.1\0"
    content = write_dicom(tmp_path / "a", GREY).read_bytes()
    (tmp_path / "a").write_bytes(content.replace(syntax, NAME.encode().ljust(len(syntax), b"\0")))
    with pytest.raises(BadImageError):
        render(tmp_path / "a")
    assert not caplog.records
