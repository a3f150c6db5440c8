"""One known picture in each way DICOM stores pixels: it comes out; differing facts are found."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pydicom", reason="needs rlmed's extra 'readers'")

from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.pixels import pixel_array
from pydicom.uid import (
    JPEG2000,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from rlmed.data.images import BadImageError
from rlmed.data.readers.volumes.dicom_file import read_header
from rlmed.data.readers.volumes.dicom_pixels import render_frame
from rlmed.data.readers.volumes.display import Window
from tests.unit.rlmed.data.raw_files import in_bits, known_colour, known_grey
from tests.unit.rlmed.data.readers.dicom_files import (
    dataset_of,
    item,
    save,
    write_big_endian,
    write_compressed,
    write_dicom,
)

GREY, COLOUR = known_grey(), known_colour()
WHOLE = {"WindowCenter": 128, "WindowWidth": 256}
"""Shows 0 to 255 as they are."""
TWELVE = in_bits(GREY, 12).astype(np.uint16)
OF_TWELVE = {"BitsStored": 12, "HighBit": 11, "WindowCenter": 2048, "WindowWidth": 4096}
HOUNSFIELD = TWELVE.astype(np.int16) - 2048
OF_HOUNSFIELD = {"BitsStored": 12, "HighBit": 11, "WindowCenter": 0, "WindowWidth": 4096}


def shown(path: Path, frame: int | None = None, window: Window | None = None) -> np.ndarray:
    header = read_header(path)
    return np.asarray(render_frame(path, header, header.frame_index(frame), window)).astype(int)


def refused(path: Path, reason: str, window: Window | None = None) -> None:
    with pytest.raises(BadImageError, match=reason) as caught:
        shown(path, window=window)
    assert str(path) not in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- uncompressed


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    ("values", "elements"),
    [
        (GREY, WHOLE),
        (TWELVE, OF_TWELVE),
        (HOUNSFIELD, OF_HOUNSFIELD),
        (in_bits(GREY, 16).astype(np.uint16), {"WindowCenter": 32768, "WindowWidth": 65536}),
        (in_bits(GREY, 16).astype(np.int32) - 32768, {"WindowCenter": 0, "WindowWidth": 65536}),
        (in_bits(GREY, 32).astype(np.uint32), {"WindowCenter": 2**31, "WindowWidth": 2**32}),
        (GREY.astype(np.int8), {"WindowCenter": 0, "WindowWidth": 256}),
        (TWELVE, {**OF_TWELVE, "RescaleSlope": 1, "RescaleIntercept": 1e9, "WindowCenter": 1e9 + 2048}),
        (TWELVE, {**OF_TWELVE, "RescaleSlope": -1, "RescaleIntercept": 4095}),
    ],
)
def test_grey_of_every_width_and_sign(tmp_path, values, elements, photometric):
    wanted = GREY.astype(int)
    if values.dtype == np.int8:  # 128 and more are negative, so the brighter half is the darker one
        wanted = (wanted + 128) % 256
    if elements.get("RescaleSlope") == -1:
        wanted = 255 - wanted
    if photometric == "MONOCHROME1":
        wanted = 255 - wanted
    elements = {**elements, "PhotometricInterpretation": photometric}
    # a window of 4096 values has 4095 steps, and its upper end is half a step too high for a whole
    # number: rounding
    for write in (write_dicom, write_big_endian):
        np.testing.assert_allclose(shown(write(tmp_path / "a", values, **elements)), wanted, atol=1)


def test_one_bit_and_floats_and_doubles(tmp_path):
    mask = (GREY > 127).astype(np.uint8)
    dataset = dataset_of(mask, BitsAllocated=1, BitsStored=1, HighBit=0)
    dataset.PixelData = np.packbits(mask.ravel(), bitorder="little").tobytes()
    np.testing.assert_array_equal(shown(save(tmp_path / "a", dataset)), mask * 255)
    for dtype, name in ((np.float32, "FloatPixelData"), (np.float64, "DoubleFloatPixelData")):
        for scale in (1.0, 1e30, 1e-30):
            values = GREY.astype(dtype) * scale
            dataset = dataset_of(values, PixelData=None, BitsStored=None, HighBit=None, PixelRepresentation=None)
            setattr(dataset, name, values.tobytes())
            low, high = np.percentile(values, (0.5, 99.5))
            wanted = np.clip((values.astype(float) - low) / (high - low), 0, 1) * 255
            np.testing.assert_allclose(shown(save(tmp_path / "b", dataset)), wanted, atol=0.51)


def test_an_overlay_in_the_bits_above_is_masked_and_other_values_there_are_refused(tmp_path):
    above = TWELVE | np.where(GREY > 127, 0x8000, 0).astype(np.uint16)
    dataset = dataset_of(above, **OF_TWELVE)
    refused(save(tmp_path / "a", dataset), "BitsStored 12 and HighBit 11, .*values reach 36863")
    dataset.add_new(0x60000102, "US", 15)
    np.testing.assert_allclose(shown(save(tmp_path / "b", dataset)), GREY, atol=1)
    signed = dataset_of(((HOUNSFIELD & 0xFFF) | 0x7000).astype(np.int16), **OF_HOUNSFIELD)
    signed.add_new(0x60020102, "US", 14)
    np.testing.assert_allclose(shown(save(tmp_path / "c", signed)), GREY, atol=1)


def test_an_overlay_that_is_stored_apart_or_in_the_bits_of_values_masks_nothing(tmp_path):
    above = dataset_of(TWELVE | np.where(GREY > 127, 0x8000, 0).astype(np.uint16), **OF_TWELVE)
    above.add_new(0x60000102, "US", 0)
    refused(save(tmp_path / "a", above), "BitsStored 12 and HighBit 11, .*values reach 36863")
    apart = dataset_of(TWELVE, **OF_TWELVE)
    apart.add_new(0x60000102, "US", 0)
    np.testing.assert_allclose(shown(save(tmp_path / "b", apart)), GREY, atol=1)
    for bits, position in ((12, 11), (12, 1), (16, 15)):
        inside = dataset_of(TWELVE, BitsStored=bits, HighBit=bits - 1)
        inside.add_new(0x60020102, "US", position)
        refused(save(tmp_path / "c", inside), f"BitsStored {bits} and HighBit {bits - 1}, .*overlay in bit {position} ")


@pytest.mark.parametrize(("stored", "high"), [(12, 7), (16, 11), (12, 10)])
def test_values_above_the_high_bit_are_refused(tmp_path, stored, high):
    values = TWELVE * 16 if stored == 16 else TWELVE
    reason = f"BitsStored {stored} and HighBit {high}, .*values reach {values.max()}"
    refused(write_dicom(tmp_path / "a", values, BitsStored=stored, HighBit=high), reason)
    few = {"BitsStored": stored, "HighBit": high, "WindowCenter": 64.5, "WindowWidth": 128}
    np.testing.assert_allclose(shown(write_dicom(tmp_path / "b", TWELVE // 32, **few)), GREY, atol=2)


@pytest.mark.parametrize(("dtype", "name"), [(np.float32, "Float"), (np.float64, "DoubleFloat")])
def test_padding_of_floats_has_no_say_in_the_percentiles(tmp_path, dtype, name):
    values = GREY.astype(dtype)
    values[:, :20] = -3e38
    values[:, 20:24] = -2e38
    changes = {"PixelData": None, "BitsStored": None, "HighBit": None, "PixelRepresentation": None}
    dataset = dataset_of(values, **changes, **{f"{name}PixelData": values.tobytes()})
    setattr(dataset, f"{name}PixelPaddingValue", float(values[0, 0]))
    setattr(dataset, f"{name}PixelPaddingRangeLimit", float(values[0, 20]))
    wanted = np.where(np.arange(64) < 24, 0, GREY.astype(float))
    np.testing.assert_allclose(shown(save(tmp_path / "a", dataset)), wanted, atol=1)


@pytest.mark.parametrize("slope", ["1e-46", "1e39", "-1e-46"])
def test_a_slope_beyond_single_precision_is_one(tmp_path, slope):
    wanted = 255 - GREY if slope.startswith("-") else GREY
    picture = shown(write_dicom(tmp_path / "a", TWELVE, RescaleSlope=slope, RescaleIntercept=0))
    np.testing.assert_allclose(picture, wanted, atol=1)


@pytest.mark.parametrize(("planar", "said"), [(None, "no"), (2, "2 as")])
def test_colours_need_their_arrangement(tmp_path, planar, said):
    path = write_dicom(tmp_path / "a", COLOUR, PlanarConfiguration=planar)
    refused(path, f"3 samples .* {said} PlanarConfiguration, .* 0 or 1")


def test_padding_may_need_more_bits_than_are_stored(tmp_path):
    padded = HOUNSFIELD.copy()
    padded[:, :3] = -32768
    picture = shown(write_dicom(tmp_path / "a", padded, PixelPaddingValue=-32768, **OF_HOUNSFIELD))
    np.testing.assert_allclose(picture, np.where(np.arange(64) < 3, 0, GREY), atol=1)


def test_colour_in_every_arrangement(tmp_path):
    ybr = np.asarray(Image.fromarray(COLOUR).convert("YCbCr"))
    planes = {"PlanarConfiguration": 1, "PixelData": np.moveaxis(COLOUR, -1, 0).tobytes()}
    np.testing.assert_array_equal(shown(write_dicom(tmp_path / "a", COLOUR)), COLOUR)
    np.testing.assert_array_equal(shown(save(tmp_path / "b", dataset_of(COLOUR, **planes))), COLOUR)
    np.testing.assert_array_equal(shown(write_dicom(tmp_path / "c", in_bits(COLOUR, 16).astype(np.uint16))), COLOUR)
    twelve = dataset_of(in_bits(COLOUR, 12).astype(np.uint16), BitsStored=12, HighBit=11)
    np.testing.assert_array_equal(shown(save(tmp_path / "d", twelve)), COLOUR)
    # whole numbers of YBR do not tell all colours apart
    np.testing.assert_allclose(
        shown(write_dicom(tmp_path / "e", ybr, PhotometricInterpretation="YBR_FULL")), COLOUR, atol=4
    )
    luma, chroma = ybr[..., :1], ybr[:, ::2, 1:]
    halves = np.concatenate([luma.reshape(48, 32, 2), chroma], axis=-1)
    dataset = dataset_of(COLOUR, PhotometricInterpretation="YBR_FULL_422", PixelData=halves.tobytes())
    # every other colour is its neighbour's
    assert np.abs(shown(save(tmp_path / "f", dataset)) - COLOUR).mean() < 4


def test_palette_with_16_and_with_8_bits(tmp_path):
    for bits in (8, 16):
        dataset = dataset_of(255 - GREY, PhotometricInterpretation="PALETTE COLOR")
        for name, scale in (("Red", 1.0), ("Green", 0.5), ("Blue", 0.25)):
            entries = np.round(np.arange(255, -1, -1) * scale / 255 * (2**bits - 1)).astype(f"<u{bits // 8}")
            setattr(dataset, f"{name}PaletteColorLookupTableDescriptor", [256, 0, bits])
            dataset[f"{name}PaletteColorLookupTableDescriptor"].VR = "US"
            setattr(dataset, f"{name}PaletteColorLookupTableData", entries.tobytes())
        wanted = GREY[..., None] * np.array([1.0, 0.5, 0.25])
        np.testing.assert_allclose(shown(save(tmp_path / "a", dataset)), wanted, atol=1)


def test_each_frame_is_its_own_picture(tmp_path):
    frames = np.stack([GREY, GREY[::-1], 255 - GREY])
    path = write_dicom(tmp_path / "a", frames, frames=True, **WHOLE)
    for number, frame in enumerate(frames, start=1):
        np.testing.assert_array_equal(shown(path, number), frame)


# ---- compressed


def transcoded(path: Path, dataset: object, syntax: str) -> Path:
    gdcm = pytest.importorskip("gdcm", reason="needs rlmed's extra 'readers'")
    save(path, dataset)
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(path))
    assert writer.Write()
    return path


@pytest.mark.parametrize(
    "syntax", ["JPEGLosslessProcess14", "JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless", "RLELossless"]
)
@pytest.mark.parametrize(
    ("values", "elements", "wanted"),
    [
        (GREY, WHOLE, GREY),
        (TWELVE, OF_TWELVE, GREY),
        (HOUNSFIELD, OF_HOUNSFIELD, GREY),
        (in_bits(GREY, 16).astype(np.uint16), {"WindowCenter": 32768, "WindowWidth": 65536}, GREY),
        (in_bits(GREY, 16).astype(np.int32).astype(np.int16), {"WindowCenter": 0, "WindowWidth": 65536}, None),
        (GREY, {**WHOLE, "PhotometricInterpretation": "MONOCHROME1"}, 255 - GREY),
        (COLOUR, {}, COLOUR),
        (COLOUR, {"PlanarConfiguration": 1, "PixelData": np.moveaxis(COLOUR, -1, 0).tobytes()}, COLOUR),
    ],
)
def test_a_lossless_encoding_gives_the_same_picture(tmp_path, values, elements, wanted, syntax):
    if wanted is None:
        wanted = shown(write_dicom(tmp_path / "plain", values, **elements))
    path = transcoded(tmp_path / "a", dataset_of(values, **elements), syntax)
    assert read_header(path).transfer_syntax.is_encapsulated
    np.testing.assert_allclose(shown(path), wanted, atol=1)


def test_rle_with_values_of_more_bits_than_are_stored_is_refused(tmp_path):
    path = transcoded(tmp_path / "a", dataset_of(TWELVE), "RLELossless")
    changed = dcmread(path)
    changed.BitsStored, changed.HighBit = 8, 7
    refused(save(tmp_path / "b", changed), "BitsStored 8 and HighBit 7, .*values reach 4095")


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def without_marker(jpeg: bytes, marker: int) -> bytes:
    place = jpeg.index(bytes([0xFF, marker]))
    return jpeg[:place] + jpeg[place + 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big") :]


YCBCR = encoded(Image.fromarray(COLOUR), "JPEG", quality=98, subsampling=0)
RGB = encoded(Image.fromarray(COLOUR), "JPEG", quality=98, subsampling=0, keep_rgb=True)


@pytest.mark.parametrize(
    ("stream", "photometric"),
    [
        (YCBCR, "YBR_FULL_422"),
        (YCBCR, "YBR_FULL"),
        (without_marker(YCBCR, 0xE0), "YBR_FULL"),
        (RGB, "RGB"),
    ],
)
def test_jpeg_colours_are_what_header_and_stream_say_alike(tmp_path, stream, photometric):
    path = write_compressed(tmp_path / "a", [stream], COLOUR, JPEGBaseline8Bit, PhotometricInterpretation=photometric)
    assert np.abs(shown(path) - COLOUR).mean() < 3  # of a quality of 98


def test_jpeg_2000_colours(tmp_path):
    """A header that says RGB over a stream's transform is wrong by the standard; same picture."""
    plain = encoded(Image.fromarray(COLOUR), "JPEG2000", no_jp2=True, mct=0)
    transformed = encoded(Image.fromarray(COLOUR), "JPEG2000", no_jp2=True, mct=1)
    for stream, photometric in ((plain, "RGB"), (plain, "YBR_RCT"), (transformed, "YBR_RCT"), (transformed, "RGB")):
        path = write_compressed(
            tmp_path / "a", [stream], COLOUR, JPEG2000Lossless, PhotometricInterpretation=photometric
        )
        np.testing.assert_array_equal(shown(path), COLOUR)
    ybr = encoded(Image.fromarray(np.asarray(Image.fromarray(COLOUR).convert("YCbCr"))), "JPEG2000", no_jp2=True, mct=0)
    path = write_compressed(tmp_path / "b", [ybr], COLOUR, JPEG2000, PhotometricInterpretation="YBR_FULL")
    np.testing.assert_allclose(shown(path), COLOUR, atol=4)


# ---- two facts that differ

GREY_J2K = encoded(Image.fromarray(GREY), "JPEG2000", no_jp2=True)
GREY_JPEG = encoded(Image.fromarray(GREY), "JPEG")
TWO_FRAMES = {"NumberOfFrames": 2}
J2K_COLOUR = {mct: encoded(Image.fromarray(COLOUR), "JPEG2000", no_jp2=True, mct=mct) for mct in (0, 1)}


@pytest.mark.parametrize(
    ("stream", "like", "syntax", "elements", "reason"),
    [
        (
            RGB,
            COLOUR,
            JPEGBaseline8Bit,
            {"PhotometricInterpretation": "YBR_FULL_422"},
            "RGB, .*header says YBR_FULL_422",
        ),
        (YCBCR, COLOUR, JPEGBaseline8Bit, {}, "YCbCr, .*header says RGB"),
        (YCBCR, GREY, JPEGBaseline8Bit, {}, "64x48 .* 3 samples, .*header says 64x48 of 1"),
        (GREY_JPEG, COLOUR, JPEGBaseline8Bit, {}, "64x48 .* 1 samples, .*header says 64x48 of 3"),
        (GREY_JPEG, GREY, JPEGBaseline8Bit, {"Rows": 24}, "64x48 .* 1 samples, .*header says 64x24 of 1"),
        (
            GREY_JPEG,
            TWELVE,
            JPEGBaseline8Bit,
            OF_TWELVE,
            "8 bits, .*header .*BitsStored 12 and BitsAllocated 16",
        ),
        (GREY_JPEG, GREY, JPEG2000Lossless, {}, "syntax says JPEG 2000, .*pixels are JPEG:"),
        (GREY_J2K, GREY, JPEGBaseline8Bit, {}, "syntax says JPEG, .*pixels are JPEG 2000:"),
        (GREY_JPEG, GREY, JPEGLSLossless, {}, "syntax says JPEG-LS, .*pixels are JPEG:"),
        (GREY_JPEG, GREY, JPEGLosslessSV1, {}, "says lossless JPEG, .*pixels are JPEG:"),
        (
            GREY_J2K,
            GREY,
            JPEG2000,
            {"PixelRepresentation": 1},
            "values have none, .*PixelRepresentation 1. .*sign",
        ),
        (
            encoded(Image.fromarray(in_bits(GREY, 16).astype(np.uint16)), "JPEG2000", no_jp2=True),
            GREY,
            JPEG2000,
            {},
            "16 bits, .*header .*BitsStored 8 and BitsAllocated 8",
        ),
        (J2K_COLOUR[1], COLOUR, JPEG2000, {"PhotometricInterpretation": "YBR_FULL"}, "RGB after their own transform"),
        (
            J2K_COLOUR[0],
            COLOUR,
            JPEG2000,
            {"PhotometricInterpretation": "YBR_ICT"},
            "without a transform, .*header says YBR_ICT",
        ),
        (
            YCBCR,
            COLOUR,
            JPEGBaseline8Bit,
            {"PhotometricInterpretation": "YBR_RCT"},
            "say JPEG, .*header says YBR_RCT",
        ),
        (GREY_JPEG, GREY, JPEGBaseline8Bit, TWO_FRAMES, "NumberOfFrames 2, .*pixels are 1 frames"),
    ],
)
def test_header_against_codestream(tmp_path, stream, like, syntax, elements, reason):
    refused(write_compressed(tmp_path / "a", [stream], like, syntax, **elements), reason)


@pytest.mark.parametrize("has_table", [True, False])
@pytest.mark.parametrize("said", [1, 2, 4])
def test_frames_against_fragments(tmp_path, said, has_table):
    dataset = dataset_of(GREY, NumberOfFrames=said)
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.PixelData = encapsulate([GREY_JPEG] * 3, has_bot=has_table)
    dataset["PixelData"].is_undefined_length = True
    refused(save(tmp_path / "a", dataset), f"NumberOfFrames {said}, .*pixels are 3 frames")
    dataset.NumberOfFrames = 3
    assert shown(save(tmp_path / "b", dataset), 3).shape == GREY.shape
    whole = dataset_of(GREY)
    whole.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    whole.PixelData = encapsulate([GREY_JPEG], fragments_per_frame=3, has_bot=has_table)
    whole["PixelData"].is_undefined_length = True
    assert shown(save(tmp_path / "c", whole)).shape == GREY.shape


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"Rows": 24}, "64x24 .* 16 bits, .*3072 bytes; .*has 6144"),
        ({"Rows": 47}, "64x47 .*6016 bytes; .*has 6144"),
        ({"Columns": 32}, "1 frame of 32x48 .* 16 bits, .*3072 bytes; .*has 6144"),
        ({"Columns": 128}, "128x48 .*12288 bytes; .*has 6144"),
        ({"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}, " 8 bits, .*3072 bytes; .*has 6144"),
        ({"BitsAllocated": 32}, " 32 bits, .*12288 bytes; .*has 6144"),
        ({"NumberOfFrames": 3}, "3 frames of 64x48 .* 16 bits, .*18432 bytes"),
        ({"BitsStored": 20}, "BitsStored 20 and BitsAllocated 16"),
        ({"BitsStored": 8, "HighBit": 7}, "BitsStored 8 and HighBit 7, .*values reach 4095"),
        (
            {"PhotometricInterpretation": "YBR_RCT", "SamplesPerPixel": 1},
            "1 samples a pixel, .*colours need 3 .YBR_RCT",
        ),
        ({"PixelRepresentation": 3}, "PixelRepresentation 3"),
        ({"PresentationLUTShape": "INVERSE"}, "MONOCHROME2 and PresentationLUTShape INVERSE"),
        (
            {"PresentationLUTShape": "IDENTITY", "PhotometricInterpretation": "MONOCHROME1"},
            "MONOCHROME1 and PresentationLUTShape IDENTITY",
        ),
        ({"PixelSpacing": [1, 1], "PixelAspectRatio": [2, 1]}, "PixelSpacing 1 by 1 and PixelAspectRatio 2 by 1"),
    ],
)
def test_header_against_itself_and_uncompressed_pixels(tmp_path, elements, reason):
    refused(write_dicom(tmp_path / "a", TWELVE, **elements), reason)


def test_harmless_differences_are_accepted(tmp_path):
    """Padding of zeros, a high bit of bits that hold nothing, a codestream of fewer bits."""
    filled = dataset_of(TWELVE, **OF_TWELVE)
    filled.PixelData += bytes(500)
    np.testing.assert_allclose(shown(save(tmp_path / "a", filled)), GREY, atol=1)
    elements = {**OF_TWELVE, "HighBit": 15, "PresentationLUTShape": "IDENTITY"}
    np.testing.assert_allclose(shown(write_dicom(tmp_path / "b", TWELVE, **elements)), GREY, atol=1)
    path = write_compressed(
        tmp_path / "c", [GREY_J2K], GREY.astype(np.uint16), JPEG2000Lossless, BitsStored=16, HighBit=15, **WHOLE
    )
    np.testing.assert_array_equal(shown(path), GREY)


def test_transfer_syntax_against_pixel_data(tmp_path):
    plain = write_dicom(tmp_path / "plain", GREY).read_bytes()
    # RLE Lossless
    (tmp_path / "a").write_bytes(plain.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0"))
    refused(tmp_path / "a", "syntax .*pixels are compressed, .*not")
    squeezed = write_compressed(tmp_path / "b", [GREY_JPEG], GREY, RLELossless).read_bytes()
    (tmp_path / "b").write_bytes(squeezed.replace(b"1.2.840.10008.1.2.5\0", b"1.2.840.10008.1.2.1\0"))
    refused(tmp_path / "b", "syntax .*pixels are uncompressed, .* compressed")
    refused(write_compressed(tmp_path / "c", [GREY_JPEG], GREY, RLELossless), r"\d{5,} bytes a pixel, .*header says 1 ")
    implicit = dataset_of(TWELVE, **OF_TWELVE)
    implicit.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    np.testing.assert_allclose(shown(save(tmp_path / "d", implicit)), GREY, atol=1)


# ---- pictures that show nothing


@pytest.mark.parametrize(
    ("values", "elements", "reason"),
    [
        (
            TWELVE,
            {"RescaleSlope": 0, "RescaleIntercept": 5},
            "RescaleSlope 0 and RescaleIntercept 5, .*every value 5",
        ),
        (
            TWELVE,
            {"WindowCenter": 30000, "WindowWidth": 100},
            r" 0 to 4095, .* own .*\bWindowCenter\b.*\b30000\b.*\b100\b",
        ),
        (HOUNSFIELD, {"WindowCenter": -9000, "WindowWidth": 100}, "from -2048 to 2047, .* own window"),
        (TWELVE, {**OF_TWELVE, "RescaleIntercept": -9000}, "from -9000 to -4905, .* own window"),
        (TWELVE, {"WindowCenter": 9e5, "WindowWidth": 10, "VOILUTFunction": "SIGMOID"}, "its own window"),
        (TWELVE, {"WindowCenter": 9e5, "WindowWidth": 10, "VOILUTFunction": "LINEAR_EXACT"}, "its own window"),
        # so wide that all is one grey
        (TWELVE, {"WindowCenter": 2000, "WindowWidth": 10**7}, "its own window"),
        (np.full_like(TWELVE, 7), {}, "all its values are 7"),
        (np.full_like(TWELVE, 7), OF_TWELVE, "all its values are 7"),
        (np.full_like(HOUNSFIELD, -2000), {"PixelPaddingValue": -2000}, "all its values are -2000"),
        (
            np.where(GREY > 127, 9, 0).astype(np.uint16),
            {"PixelPaddingValue": 0},
            "all .*values are 9 .beside its padding",
        ),
        (np.full_like(COLOUR, 80), {}, r"one colour \(80 of 255\)"),
    ],
)
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_picture_that_shows_nothing_is_refused_with_the_cause(tmp_path, values, elements, reason, photometric):
    grey = {"PhotometricInterpretation": photometric} if values.ndim == 2 else {}
    refused(write_dicom(tmp_path / "a", values, **elements, **grey), reason)


def test_the_window_asked_for_is_named_and_the_files_own_is_no_way_out(tmp_path):
    path = write_dicom(tmp_path / "a", TWELVE, **OF_TWELVE)
    reason = r" 0 to 4095, .* -600\b.*\b10\b.* --window\b"
    refused(path, reason, Window(-600, 10))


def test_one_hot_pixel_inside_the_window_does_not_make_a_picture_but_a_mask_is_one(tmp_path):
    hot = TWELVE.copy()
    hot[0, 0] = 65535
    refused(write_dicom(tmp_path / "a", hot, WindowCenter=60000, WindowWidth=1000), "from 0 to 65535, .* own window")
    mask = np.zeros_like(GREY)
    mask[3, 3] = 1
    assert np.argwhere(shown(write_dicom(tmp_path / "b", mask))).tolist() == [[3, 3]]


@pytest.mark.parametrize("bits", [8, 16])
def test_a_look_up_table_with_other_bits_than_it_says_is_refused(tmp_path, bits):
    table = item(LUTDescriptor=[4096, 0, bits], LUTData=np.arange(4096, dtype="<u2").tobytes())
    table["LUTDescriptor"].VR, table["LUTData"].VR = "US", "OW"
    path = write_dicom(tmp_path / "a", TWELVE, VOILUTSequence=[table], BitsStored=12, HighBit=11)
    refused(path, f"VOI .* {bits} bits an entry, .*largest .*4095")
    np.testing.assert_allclose(shown(path, window=Window(2048, 4096)), GREY, atol=1)


def test_a_modality_table_for_negative_values(tmp_path):
    """Its first value, -2048, is written as 63488 where its representation is unsigned."""
    entries = np.arange(4096, dtype="<u2")
    table = item(LUTDescriptor=[4096, 63488, 16], LUTData=entries.tobytes(), ModalityLUTType="US")
    table["LUTDescriptor"].VR, table["LUTData"].VR = "US", "OW"
    elements = {**OF_HOUNSFIELD, "WindowCenter": 2048, "ModalityLUTSequence": [table]}
    path = write_dicom(tmp_path / "a", HOUNSFIELD, **elements)
    assert pixel_array(path).min() == -2048
    np.testing.assert_allclose(shown(path), GREY, atol=1)


def test_two_rescalings_are_refused(tmp_path):
    table = item(LUTDescriptor=[2, 0, 16], LUTData=[0, 1], ModalityLUTType="US")
    table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    path = write_dicom(tmp_path / "a", TWELVE, ModalityLUTSequence=[table], RescaleSlope=2, RescaleIntercept=0)
    refused(path, "modality look-up table and RescaleSlope 2")


def test_a_palette_of_other_bits_or_entries_than_it_says_is_refused(tmp_path):
    changes = [
        ("Descriptor", [256, 0, 16], "palette .*16 bits an entry, .*largest entry is 255"),
        ("Descriptor", [200, 0, 8], "200 entries of 8 bits and holds 256"),
        ("Data", bytes(100), "256 entries of 8 bits and holds 100"),
    ]
    for part, value, reason in changes:
        dataset = dataset_of(GREY, PhotometricInterpretation="PALETTE COLOR")
        for name in ("Red", "Green", "Blue"):
            content = {"Descriptor": [256, 0, 8], "Data": bytes(range(256)), part: value}
            if content["Descriptor"][2] == 16:
                content["Data"] = np.arange(256, dtype="<u2").tobytes()
            for kind, stated in content.items():
                setattr(dataset, f"{name}PaletteColorLookupTable{kind}", stated)
            dataset[f"{name}PaletteColorLookupTableDescriptor"].VR = "US"
        refused(save(tmp_path / "a", dataset), reason)
    dataset.RedPaletteColorLookupTableDescriptor = [256, 5, 8]
    refused(save(tmp_path / "b", dataset), "descriptors are .*256, 5, 8.*not alike")


def test_a_dark_frame_is_no_damage_of_its_table(tmp_path):
    table = item(LUTDescriptor=[4096, 0, 12], LUTData=np.arange(4096, dtype="<u2").tobytes())
    table["LUTDescriptor"].VR, table["LUTData"].VR = "US", "OW"
    path = write_dicom(tmp_path / "a", TWELVE // 16, VOILUTSequence=[table], BitsStored=12, HighBit=11)
    np.testing.assert_allclose(shown(path), (TWELVE // 16) / 4095 * 255, atol=0.51)
