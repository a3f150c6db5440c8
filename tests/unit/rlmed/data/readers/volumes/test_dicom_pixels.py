"""What is made of DICOM's pixels: the standard's formulas, pydicom's own, Pillow, shipped files."""

import io

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pydicom", reason="needs rlmed's extra 'readers'")

from pydicom import dcmread
from pydicom.encaps import get_frame
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi, apply_windowing, pixel_array
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit

from rlmed.data.images import BadImageError
from rlmed.data.readers.volumes.dicom_file import read_header
from rlmed.data.readers.volumes.dicom_pixels import render_frame
from rlmed.data.readers.volumes.display import Window
from tests.unit.rlmed.data.readers.dicom_files import (
    dataset_of,
    item,
    save,
    shipped,
    write_big_endian,
    write_compressed,
    write_dicom,
)

RNG = np.random.default_rng(0)
CT = RNG.integers(-1100, 3000, (32, 48)).astype(np.int16)
GREY = RNG.integers(0, 4096, (32, 48)).astype(np.uint16)
COLOUR = RNG.integers(0, 256, (32, 48, 3)).astype(np.uint8)


def shown(path, frame=None, window=None) -> np.ndarray:
    header = read_header(path)
    return np.asarray(render_frame(path, header, header.frame_index(frame), window))


def by_the_standard(x: float, center: float, width: float) -> float:
    """The pseudo-code of PS3.3, C.11.2.1.2.1, for an output from 0 to 255."""
    if x <= center - 0.5 - (width - 1) / 2:
        return 0.0
    if x > center - 0.5 + (width - 1) / 2:
        return 255.0
    return ((x - (center - 0.5)) / (width - 1) + 0.5) * 255.0


def test_a_window_is_applied_after_rescale_as_the_standard_has_it(tmp_path):
    path = write_dicom(
        tmp_path / "a", CT, RescaleSlope=2, RescaleIntercept=-1024, WindowCenter=[40, 600], WindowWidth=[400, 1500]
    )
    wanted = [[by_the_standard(2.0 * x - 1024, 40, 400) for x in row] for row in CT.tolist()]
    np.testing.assert_allclose(shown(path), wanted, atol=0.51)


def test_a_window_of_width_one_parts_the_values_in_two(tmp_path):
    path = write_dicom(tmp_path / "a", GREY, WindowCenter=2000, WindowWidth=1)
    np.testing.assert_array_equal(shown(path), np.where(GREY > 1999.5, 255, 0))


@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_every_window_function_is_pydicoms(tmp_path, function):
    elements = {"BitsStored": 12, "WindowCenter": 1800, "WindowWidth": 2500}
    path = write_dicom(tmp_path / "a", GREY, **elements, **({"VOILUTFunction": function} if function else {}))
    wanted = apply_windowing(GREY, dcmread(path)) / 4095 * 255
    np.testing.assert_allclose(shown(path), wanted, atol=0.51)


def test_a_window_function_of_another_name_is_refused_unless_a_window_is_given(tmp_path):
    path = write_dicom(tmp_path / "a", GREY, WindowCenter=1800, WindowWidth=2500, VOILUTFunction="CUBIC")
    with pytest.raises(BadImageError, match=r"VOILUTFunction 'CUBIC' .* LINEAR, LINEAR_EXACT, SIGMOID: "):
        shown(path)
    assert shown(path, window=Window(2000, 3000)).any()


def test_the_window_of_the_caller_wins(tmp_path):
    path = write_dicom(tmp_path / "a", GREY, WindowCenter=10, WindowWidth=10)
    wanted = [[by_the_standard(x, 2000, 3000) for x in row] for row in GREY.tolist()]
    np.testing.assert_allclose(shown(path, window=Window(2000, 3000)), wanted, atol=0.51)


@pytest.mark.parametrize(
    "elements",
    [{}, {"WindowCenter": 100, "WindowWidth": 0}, {"WindowCenter": None, "WindowWidth": 100}, {"WindowCenter": ""}],
)
def test_without_a_usable_window_the_percentiles_are_shown(tmp_path, elements):
    values = GREY.copy()
    values[0, 0] = 65535  # one hot pixel must not make the rest black
    path = write_dicom(tmp_path / "a", values, **{name: value for name, value in elements.items() if value is not None})
    low, high = np.percentile(values, (0.5, 99.5))
    wanted = np.clip((values - low) / (high - low), 0, 1) * 255
    np.testing.assert_allclose(shown(path), wanted, atol=0.51)


def test_monochrome1_is_inverted(tmp_path):
    elements = {"WindowCenter": 2048, "WindowWidth": 4096}
    straight = shown(write_dicom(tmp_path / "a", GREY, **elements))
    inverted = shown(write_dicom(tmp_path / "b", GREY, PhotometricInterpretation="MONOCHROME1", **elements))
    np.testing.assert_array_equal(inverted, 255 - straight)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_has_no_say_in_the_percentiles(tmp_path, photometric):
    values = CT.copy()
    values[:, :10] = -2000
    padded = shown(write_dicom(tmp_path / "a", values, PixelPaddingValue=-2000, PhotometricInterpretation=photometric))
    bare = shown(write_dicom(tmp_path / "b", CT[:, 10:].copy(), PhotometricInterpretation=photometric))
    assert not padded[:, :10].any()
    np.testing.assert_array_equal(padded[:, 10:], bare)


def test_padding_may_be_a_range(tmp_path):
    values = CT.copy()
    values[:, :5], values[:, 5:10] = -3000, -2500
    path = write_dicom(tmp_path / "a", values, PixelPaddingValue=-3000, PixelPaddingRangeLimit=-2400)
    np.testing.assert_array_equal(shown(path)[:, 10:], shown(write_dicom(tmp_path / "b", CT[:, 10:].copy())))


@pytest.mark.parametrize("stored", ["US", "OW"])
def test_look_up_tables_are_pydicoms(tmp_path, stored):
    modality = np.linspace(100, 4000, 1000).astype(np.uint16)
    voi = (4095 * np.linspace(0, 1, 3000) ** 2).astype(np.uint16)
    tables = {
        "ModalityLUTSequence": [item(LUTDescriptor=[1000, 500, 16], LUTData=modality.tolist(), ModalityLUTType="US")],
        "VOILUTSequence": [item(LUTDescriptor=[3000, 400, 12], LUTData=voi.tolist())],
    }
    for sequence in tables.values():
        sequence[0]["LUTDescriptor"].VR = "US"
        if stored == "OW":
            sequence[0].LUTData = np.array(sequence[0].LUTData, dtype="<u2").tobytes()
        sequence[0]["LUTData"].VR = stored
    path = write_dicom(tmp_path / "a", GREY, **tables)
    dataset = dcmread(path)
    wanted = apply_voi(apply_modality_lut(GREY, dataset), dataset) / 4095 * 255
    assert np.ptp(wanted) > 200
    np.testing.assert_allclose(shown(path), wanted, atol=0.51)


def test_a_window_of_the_caller_wins_over_a_look_up_table(tmp_path):
    table = item(LUTDescriptor=[4, 0, 8], LUTData=[250, 255, 255, 255])
    table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    path = write_dicom(tmp_path / "a", GREY // 1000, VOILUTSequence=[table])
    assert shown(path).min() == 250
    path = write_dicom(tmp_path / "a", GREY, VOILUTSequence=[table])
    assert shown(path, window=Window(2048, 4096)).max() > 200


def test_palettes_of_8_and_16_bits_are_pydicoms(tmp_path):
    real = shipped("examples_palette.dcm")
    dataset = dcmread(real)
    assert dataset.PhotometricInterpretation == "PALETTE COLOR"
    wanted = apply_color_lut(pixel_array(dataset), dataset) / 65535 * 255
    np.testing.assert_allclose(shown(real), wanted, atol=0.51)

    indices = COLOUR[..., 0]
    tables = RNG.integers(0, 256, (3, 256)).astype(np.uint8)
    elements = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        elements[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 8]
        elements[f"{colour}PaletteColorLookupTableData"] = table.tobytes()
    dataset = dataset_of(indices, **elements)
    for colour in ("Red", "Green", "Blue"):
        dataset[f"{colour}PaletteColorLookupTableDescriptor"].VR = "US"
    np.testing.assert_array_equal(shown(save(tmp_path / "a", dataset)), np.stack([t[indices] for t in tables], -1))


def test_colour_comes_through_in_either_arrangement(tmp_path):
    np.testing.assert_array_equal(shown(write_dicom(tmp_path / "a", COLOUR)), COLOUR)
    planes = dataset_of(COLOUR, PlanarConfiguration=1, PixelData=np.moveaxis(COLOUR, -1, 0).tobytes())
    np.testing.assert_array_equal(shown(save(tmp_path / "b", planes)), COLOUR)


def test_ybr_becomes_rgb(tmp_path):
    red = np.empty((8, 8, 3), dtype=np.uint8)
    red[:] = (76, 85, 255)  # of JPEG's formula for (254, 0, 0)
    red[:4] = (29, 255, 107)  # (0, 0, 254)
    picture = shown(write_dicom(tmp_path / "a", red, PhotometricInterpretation="YBR_FULL"))
    np.testing.assert_allclose(picture[4:], np.broadcast_to((254, 0, 0), (4, 8, 3)), atol=1)
    np.testing.assert_allclose(picture[:4], np.broadcast_to((0, 0, 254), (4, 8, 3)), atol=1)


def test_colour_of_16_bits_is_scaled(tmp_path):
    wide = COLOUR.astype(np.uint16) * 257
    np.testing.assert_array_equal(shown(write_dicom(tmp_path / "a", wide)), COLOUR)


@pytest.mark.parametrize(
    "name",
    [
        *("MR_small_bigendian", "MR_small_implicit", "MR_small_RLE", "MR_small_jp2klossless", "MR_small_padded"),
        *("MR_small_jpeg_ls_lossless", "MR_small_expb"),
    ],
)
def test_a_lossless_encoding_gives_the_same_picture(name):
    uncompressed = shown(shipped("MR_small.dcm"))
    assert np.ptp(uncompressed) > 200
    np.testing.assert_array_equal(shown(shipped(f"{name}.dcm")), uncompressed)


@pytest.mark.parametrize(
    ("name", "difference"),
    [
        ("SC_rgb_jpeg_gdcm", 0),  # lossless JPEG, the usual form in archives
        ("SC_rgb_rle", 0),
        ("SC_rgb_gdcm_KY", 1),
        ("SC_ybr_full_422_uncompressed", 5),
        ("SC_rgb_jls_lossy_line", 3),
        ("SC_rgb_jpeg_dcmtk", 5),
        ("SC_rgb_dcmtk_+eb+cr", 3),
        ("SC_rgb_dcmtk_+eb+cy+np", 6),
    ],
)
def test_the_same_colour_bars_come_out_of_every_encoding(name, difference):
    """Pure and light red, green and blue, then black, two greys and white, each 10 rows high."""
    bars = [(255, 0, 0), (255, 128, 128), (0, 255, 0), (128, 255, 128), (0, 0, 255), (128, 128, 255)]
    bars += [(0, 0, 0), (64, 64, 64), (192, 192, 192), (255, 255, 255)]
    centres = shown(shipped(f"{name}.dcm"))[5::10].astype(int)
    assert np.abs(centres - np.array(bars)[:, None]).max() <= difference


def test_a_jpeg_frame_is_what_pillow_makes_of_it():
    path = shipped("examples_ybr_color.dcm")
    dataset = dcmread(path)
    frame = get_frame(dataset.PixelData, 6, number_of_frames=30)
    wanted = np.asarray(Image.open(io.BytesIO(frame)).convert("RGB")).astype(int)
    assert np.abs(shown(path, frame=7).astype(int) - wanted).mean() < 1


def test_frames_are_numbered_from_1_and_the_middle_one_is_the_default(tmp_path):
    frames = np.arange(5, dtype=np.uint8)[:, None, None] * np.full((8, 8), 50, dtype=np.uint8)
    frames[:, 7, 6:] = 250  # a mark, since a frame of one grey value is none
    path = write_dicom(tmp_path / "a", frames, frames=True, WindowCenter=128, WindowWidth=256)
    assert [int(shown(path, frame)[0, 0]) for frame in (1, 2, 5, None)] == [0, 50, 200, 100]


def test_an_enhanced_object_says_for_each_frame_how_it_is_shown(tmp_path):
    row = np.arange(0, 48 * 80, 80, dtype=np.int16)
    # equal rows, so that stretching them changes no value
    frames = np.stack([np.tile(row, (32, 1))] * 2)
    ways = ((500, 1), (1500, 2))
    each = [
        item(
            FrameVOILUTSequence=[item(WindowCenter=center, WindowWidth=1000)],
            PixelValueTransformationSequence=[item(RescaleSlope=slope, RescaleIntercept=-10, RescaleType="HU")],
        )
        for center, slope in ways
    ]
    path = write_dicom(
        tmp_path / "a",
        frames,
        frames=True,
        SharedFunctionalGroupsSequence=[item(PixelMeasuresSequence=[item(PixelSpacing=[1.5, 0.5])])],
        PerFrameFunctionalGroupsSequence=each,
    )
    for number, (center, slope) in enumerate(ways, start=1):
        picture = shown(path, number)
        assert picture.shape == (96, 48)
        wanted = [by_the_standard(slope * x - 10, center, 1000) for x in row.tolist()]
        np.testing.assert_allclose(picture, np.tile(wanted, (96, 1)), atol=1)


@pytest.mark.parametrize(
    ("elements", "size"),
    [
        ({"PixelSpacing": [1.0, 0.5]}, (48, 64)),
        ({"PixelSpacing": [0.5, 1.0]}, (96, 32)),
        ({"ImagerPixelSpacing": [0.4, 0.2]}, (48, 64)),
        ({"PixelAspectRatio": [1, 2]}, (96, 32)),
        ({"PixelSpacing": [0.7, 0.7], "ImagerPixelSpacing": [1.4, 1.4]}, (48, 32)),
        ({"PixelSpacing": [0, 0]}, (48, 32)),
    ],
)
def test_pixels_become_square(tmp_path, elements, size):
    values = np.zeros((32, 48), dtype=np.uint8)
    values[:8, :12] = 255
    picture = shown(write_dicom(tmp_path / "a", values, **elements))
    assert picture.shape[::-1] == size
    assert picture[0, 0] == 255, "the upper left corner stays there"
    assert picture[-1, 0] == picture[0, -1] == 0


def test_big_endian_and_1_bit_and_32_bits_and_floats_are_read(tmp_path):
    np.testing.assert_array_equal(shown(write_big_endian(tmp_path / "a", CT)), shown(write_dicom(tmp_path / "b", CT)))
    mask = shown(shipped("liver_1frame.dcm"))
    assert set(np.unique(mask)) == {0, 255}
    dose = pixel_array(shipped("rtdose.dcm"), index=7).astype(float)
    low, high = np.percentile(dose, (0.5, 99.5))
    np.testing.assert_allclose(
        shown(shipped("rtdose.dcm")), np.clip((dose - low) / (high - low), 0, 1) * 255, atol=0.51
    )

    values = np.linspace(0, 1, 32 * 48, dtype=np.float32).reshape(32, 48)
    values[3, 3] = np.nan
    dataset = dataset_of(values, BitsStored=None, HighBit=None, PixelRepresentation=None, PixelData=None)
    dataset.FloatPixelData = values.tobytes()
    picture = shown(save(tmp_path / "c", dataset))
    assert picture[3, 3] == 0
    assert picture[0, 0] == 0
    assert picture[-1, -1] == 255


def test_pixels_that_are_there_twice_are_refused(tmp_path):
    dataset = dataset_of(CT.astype(np.int32))
    dataset.FloatPixelData = np.linspace(0, 1, CT.size, dtype=np.float32).tobytes()
    with pytest.raises(BadImageError, match=r"twice, as PixelData and .*floats"):
        shown(save(tmp_path / "a", dataset))


def test_files_without_a_preamble_or_any_file_meta_are_read(tmp_path):
    whole = write_dicom(tmp_path / "a", CT, WindowCenter=40, WindowWidth=400).read_bytes()
    (tmp_path / "no preamble").write_bytes(whole[132:])
    dataset = dcmread(tmp_path / "a")
    np.testing.assert_array_equal(shown(tmp_path / "no preamble"), shown(tmp_path / "a"))
    for implicit in (True, False):
        bare = dataset_of(CT, WindowCenter=40, WindowWidth=400)
        del bare.file_meta
        bare.preamble = None
        bare.save_as(tmp_path / "bare", implicit_vr=implicit, little_endian=True, enforce_file_format=False)
        np.testing.assert_array_equal(shown(tmp_path / "bare"), shown(tmp_path / "a"))
    assert dataset.Rows == 32


def test_compressed_frames_of_our_own_are_read(tmp_path):
    picture = Image.fromarray(COLOUR)
    jpeg, j2k = io.BytesIO(), io.BytesIO()
    picture.resize((60, 40)).save(jpeg, "JPEG", quality=95)
    picture.save(j2k, "JPEG2000", irreversible=False, no_jp2=True)
    like = np.zeros((40, 60, 3), dtype=np.uint8)
    path = write_compressed(
        tmp_path / "a", [jpeg.getvalue()], like, JPEGBaseline8Bit, PhotometricInterpretation="YBR_FULL_422"
    )
    wanted = np.asarray(Image.open(jpeg).convert("RGB")).astype(int)
    assert np.abs(shown(path).astype(int) - wanted).max() <= 3
    path = write_compressed(
        tmp_path / "b", [j2k.getvalue()], COLOUR, JPEG2000Lossless, PhotometricInterpretation="YBR_RCT"
    )
    np.testing.assert_array_equal(shown(path), COLOUR)
