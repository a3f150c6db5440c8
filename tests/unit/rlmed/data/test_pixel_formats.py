"""One known picture in each pixel kind Pillow opens: it comes out, or is refused with reason."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from rlmed.data.images import BadImageError, check_image, load_image
from tests.unit.rlmed.data.raw_files import in_bits, known_colour, known_grey, packed, write_png, write_tiff

GREY, COLOUR, OPACITY = known_grey(), known_colour(), known_grey()[::-1]
SIZE = (GREY.shape[1], GREY.shape[0])
ON_BLACK = np.round(GREY * (OPACITY / 255.0))
COLOUR_ON_BLACK = np.round(COLOUR * (OPACITY / 255.0)[..., None])
WITH_OPACITY = np.concatenate([COLOUR, OPACITY[..., None]], axis=-1)
INK = np.concatenate([255 - COLOUR, np.zeros_like(COLOUR[..., :1])], axis=-1)
"""The colours as cyan, magenta, yellow and no black."""


def two_levels(bits: int) -> np.ndarray:
    """What is left of the grey picture in so few bits, as 8 bits."""
    return np.round(in_bits(GREY, bits).astype(float) * 255 / (2**bits - 1))


def loaded(path: Path) -> np.ndarray:
    check_image(path)
    return np.asarray(load_image(path)).astype(int)


def assert_shows(path: Path, wanted: np.ndarray, tolerance: float = 0.0) -> None:
    wanted = wanted if wanted.ndim == 3 else np.stack([wanted] * 3, axis=-1)
    np.testing.assert_allclose(loaded(path), wanted, atol=tolerance)


# ---- PNG


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_png_grey_of_every_depth_with_and_without_a_transparent_value(tmp_path, bits):
    values = in_bits(GREY, bits)
    assert_shows(write_png(tmp_path / "a.png", values, bits, 0), two_levels(bits))
    darkest, brightest = 0, 2**bits - 1
    for transparent in {darkest, brightest, int(values[20, 40])} - ({1} if bits == 1 else set()):
        path = write_png(tmp_path / "b.png", values, bits, 0, tRNS=struct.pack(">H", transparent))
        opaque = values != transparent
        wanted = np.where(opaque, two_levels(bits), 0)
        if bits == 16:  # stretched from the range of what can be seen
            low, high = values[opaque].min(), values[opaque].max()
            wanted = np.where(opaque, np.round((values - float(low)) / (high - low) * 255), 0)
        assert_shows(path, wanted)


@pytest.mark.parametrize(("kind", "channels"), [(4, 2), (2, 3), (6, 4)])
def test_png_of_16_bits_of_which_12_are_used_is_refused_where_it_would_be_black(tmp_path, kind, channels):
    values = np.stack([in_bits(GREY, 12)] * channels, axis=-1)
    values[..., 3 if channels == 4 else channels - 1] |= 0 if kind == 2 else 0xF000  # opacity
    with pytest.raises(BadImageError, match="lowest 12 of its 16 bits"):
        loaded(write_png(tmp_path / "a.png", values, 16, kind))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_png_palettes_of_every_depth(tmp_path, bits):
    values, entries = in_bits(GREY, bits), 2**bits
    # from bright to dark, so that an index taken for a grey value would be the negative
    palette = np.stack([np.linspace(255, 55, entries), np.linspace(155, 5, entries), np.full(entries, 99)], axis=-1)
    palette = palette.round().astype(np.uint8)
    wanted = palette[values.astype(int)]
    assert_shows(write_png(tmp_path / "a.png", values, bits, 3, PLTE=palette.tobytes()), wanted)
    path = write_png(tmp_path / "b.png", values, bits, 3, PLTE=palette.tobytes(), tRNS=b"\0")
    assert_shows(path, np.where((values == 0)[..., None], 0, wanted))


@pytest.mark.parametrize("bits", [8, 16])
def test_png_colour_and_opacity(tmp_path, bits):
    values, both = in_bits(COLOUR, bits), in_bits(np.stack([GREY, OPACITY], axis=-1), bits)
    assert_shows(write_png(tmp_path / "a.png", values, bits, 2), COLOUR)
    seen_through = values[6, 10]
    path = write_png(tmp_path / "b.png", values, bits, 2, tRNS=struct.pack(">HHH", *seen_through.tolist()))
    assert_shows(path, np.where((values == seen_through).all(-1)[..., None], 0, COLOUR))
    assert_shows(write_png(tmp_path / "c.png", in_bits(WITH_OPACITY, bits), bits, 6), COLOUR_ON_BLACK)
    assert_shows(write_png(tmp_path / "d.png", both, bits, 4), ON_BLACK)


# ---- TIFF


def tiff(path: Path, values: np.ndarray, order: str = "<", **tags: object) -> Path:
    samples = values.shape[2] if values.ndim == 3 else 1
    content = values.astype(values.dtype.newbyteorder(order)).tobytes()
    bits = (8 * values.itemsize,) * samples
    return write_tiff(path, content, SIZE, order, **{"t258": bits, "t277": samples, "t262": 1, **tags})


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_tiff_grey_of_every_depth_and_either_polarity(tmp_path, bits, white_is_zero, order):
    values = in_bits(GREY, bits)
    values = 2**bits - 1 - values if white_is_zero else values
    content = packed(values, bits) if bits < 16 else values.astype(f"{order}u2").tobytes()
    tags = {"t258": bits, "t262": 0 if white_is_zero else 1, "t277": 1}
    path = write_tiff(tmp_path / "a.tif", content, SIZE, order, **tags)
    if (bits, white_is_zero, order) == (16, True, ">"):  # Pillow knows the other byte order only
        with pytest.raises(BadImageError, match="kind of pixels"):
            load_image(path)
    else:
        assert_shows(path, two_levels(bits))


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "packbits", "tiff_adobe_deflate"])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_tiff_white_is_zero_when_compressed(tmp_path, compression, dtype):
    negative = Image.fromarray((65535 - in_bits(GREY, 16)).astype(dtype))
    negative.save(tmp_path / "a.tif", compression=compression, tiffinfo={262: 0})
    with Image.open(tmp_path / "a.tif") as image:
        assert image.tag_v2[262] == 0
    assert_shows(tmp_path / "a.tif", GREY)


@pytest.mark.parametrize("kind", ["i1", "u2", "i2", "u4", "i4", "f4", ">u2", ">i2", ">i4", ">f4"])
def test_tiff_of_wide_and_signed_values_is_stretched_from_its_own_range(tmp_path, kind):
    """The type's whole range, a narrow one high up, and for signed ones one around zero."""
    dtype = np.dtype(kind)
    order = ">" if kind[0] == ">" else "<"
    sample = {"u": 1, "i": 2, "f": 3}[dtype.kind]
    if dtype.kind == "f":
        ranges = [(-3e38, 3e38), (0.0, 1e-30), (-0.01, 0.01)]
    else:
        info = np.iinfo(dtype)
        ranges = [(info.min, info.max), (info.max - 255, info.max)] + ([(-100, 27)] if dtype.kind == "i" else [])
    for low, high in ranges:
        values = low + (GREY / 255.0) * (float(high) - float(low))
        values = values.astype(dtype) if dtype.kind == "f" else np.round(values).astype(np.int64).astype(dtype)
        stored = values.astype(np.float64)
        wanted = np.round((stored - stored.min()) / (stored.max() - stored.min()) * 255)
        # of floats: the range is divided out in single precision, so halves may be rounded the
        # other way
        path = tiff(tmp_path / "a.tif", values, order, t339=sample)
        assert_shows(path, wanted, tolerance=1 if dtype.kind == "f" else 0)


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_colour_opacity_and_ink(tmp_path, order):
    for dtype in (np.uint8, np.uint16):
        bits = 8 * np.dtype(dtype).itemsize

        def write(name: str, values: np.ndarray, bits: int = bits, dtype: type = dtype, **tags: int) -> Path:
            return tiff(tmp_path / name, in_bits(values, bits).astype(dtype), order, **tags)

        assert_shows(write("a.tif", COLOUR, t262=2), COLOUR)
        # the fourth means nothing
        assert_shows(write("b.tif", WITH_OPACITY, t262=2, t338=0), COLOUR)
        assert_shows(write("c.tif", WITH_OPACITY, t262=2, t338=2), COLOUR_ON_BLACK)
        multiplied = np.concatenate([COLOUR_ON_BLACK.astype(np.uint8), OPACITY[..., None]], axis=-1)
        # undone and done again: rounded twice
        assert_shows(write("d.tif", multiplied, t262=2, t338=1), COLOUR_ON_BLACK, tolerance=1)
        assert_shows(write("e.tif", INK, t262=5), COLOUR)
    assert_shows(tiff(tmp_path / "f.tif", np.stack([GREY, OPACITY], -1), order, t338=0), GREY)
    assert_shows(tiff(tmp_path / "g.tif", np.stack([GREY, OPACITY], -1), order, t338=2), ON_BLACK)
    multiplied = np.stack([ON_BLACK.astype(np.uint8), OPACITY], axis=-1)
    assert_shows(tiff(tmp_path / "h.tif", multiplied, order, t338=1), ON_BLACK)
    planes = [np.ascontiguousarray(COLOUR[..., band]).tobytes() for band in range(3)]
    tags = {"t258": (8, 8, 8), "t262": 2, "t277": 3, "t284": 2}
    assert_shows(write_tiff(tmp_path / "i.tif", planes, SIZE, order, **tags), COLOUR)


def test_tiff_ycbcr_lab_and_palette(tmp_path):
    ycbcr = np.asarray(Image.fromarray(COLOUR).convert("YCbCr"))
    # 8 bits of YCbCr tell half of the colours of RGB apart (a quarter of them has none of its own)
    assert_shows(tiff(tmp_path / "a.tif", ycbcr, t262=6, t530=(1, 1)), COLOUR, tolerance=3)
    profiles = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
    lab = np.asarray(ImageCms.profileToProfile(Image.fromarray(COLOUR), *profiles, outputMode="LAB"))
    # a step of a* or b* is up to some ten steps of a saturated red or blue; on average it is much
    # less
    assert np.abs(loaded(tiff(tmp_path / "b.tif", lab, t262=8)) - COLOUR).mean() < 3
    entries = np.arange(255, -1, -1) * 257
    path = tiff(tmp_path / "c.tif", 255 - GREY, t262=3, t320=tuple(np.tile(entries, 3).tolist()))
    assert_shows(path, GREY)


def test_tiff_of_several_pages_shows_its_first_and_a_fax_is_no_negative(tmp_path):
    pages = [Image.fromarray(page) for page in (GREY, 255 - GREY)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert_shows(tmp_path / "a.tif", GREY)
    line_art = Image.fromarray(np.where(GREY > 127, 255, 0).astype(np.uint8)).convert("1")
    for compression in ("group3", "group4", "tiff_ccitt"):
        line_art.save(tmp_path / "b.tif", compression=compression)
        assert_shows(tmp_path / "b.tif", np.where(GREY > 127, 255, 0))


@pytest.mark.parametrize(
    ("tags", "values", "reason"),
    [
        ({"t262": 0, "t339": 2}, GREY.astype(np.int16), "kind of pixels .*not read"),
        ({"t339": 3}, GREY.astype(np.float64), "kind of pixels .*not read"),
        ({"t339": 3}, GREY.astype(np.float16), "kind of pixels .*not read"),
        ({}, GREY.astype(np.uint64), "kind of pixels .*not read"),
        ({"t262": 2, "t339": (2, 2, 2)}, COLOUR, "kind of pixels .*not read"),
        ({"t262": 6}, COLOUR, "YCbCrSubSampling 2 2"),
        ({"t262": 2, "t284": 2}, in_bits(COLOUR, 16).astype(np.uint16), "colours of 16 bits in planes"),
    ],
)
def test_tiff_that_pillow_does_not_show_rightly_is_refused_by_its_kind(tmp_path, tags, values, reason):
    path = tiff(tmp_path / "odd.tif", values, **tags)
    if "t284" in tags:
        planes = [np.ascontiguousarray(values[..., band]).tobytes() for band in range(3)]
        write_tiff(path, planes, SIZE, t258=(16, 16, 16), t277=3, **tags)
    with pytest.raises(BadImageError, match=rf"odd\.tif .*{reason}"):
        load_image(path)


@pytest.mark.parametrize("bits", [1, 8, 16])
def test_grey_that_may_be_the_negative_is_refused(tmp_path, bits):
    pixels = packed(in_bits(GREY, bits), bits) if bits < 16 else in_bits(GREY, bits).astype("<u2").tobytes()
    path = write_tiff(tmp_path / "a.tif", pixels, GREY.shape[::-1], t258=bits)
    with pytest.raises(BadImageError, match=r"PhotometricInterpretation is missing"):
        load_image(path)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("side", [20, 2100])
def test_wide_values_are_scaled_as_bytes_are(tmp_path, order, side):
    """A sharp edge overshoots when scaled: that must not change the range, nor wrap around."""
    picture = np.zeros((side, side), dtype=np.uint8)
    picture[: side // 2, side // 3 :] = 255
    picture[side // 2 :] = np.linspace(0, 255, side).round()
    Image.fromarray(picture).save(tmp_path / "narrow.png")
    size = (side, side)
    narrow = loaded(tmp_path / "narrow.png")
    for values in (in_bits(picture, 16).astype("u2"), picture.astype("i2") - 90, picture.astype("f4") * 1e9):
        sample = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
        content = values.astype(values.dtype.newbyteorder(order)).tobytes()
        tags = {"t258": 8 * values.itemsize, "t262": 1, "t277": 1, "t339": sample}
        # bytes are averaged in blocks first where they are scaled down, so edges differ; and each
        # is rounded once more
        difference = np.abs(loaded(write_tiff(tmp_path / "a.tif", content, size, order, **tags)) - narrow)
        assert (difference > 2).mean() < 0.005, values.dtype


def test_a_value_that_is_no_number_is_black_and_does_not_spread(tmp_path):
    values = np.tile(np.linspace(1, 2, 24, dtype=np.float32), (24, 1))
    values[5, 5], values[5, 20], values[20, 5] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(tmp_path / "a.tif")
    picture = loaded(tmp_path / "a.tif")[..., 0]
    assert (picture[6, 6], picture[6, 23], picture[23, 6]) == pytest.approx((0, 255, 0), abs=20)
    assert np.abs(picture[13] - np.linspace(0, 255, 28)).max() < 5  # a row of others


# ---- other formats


@pytest.mark.parametrize(
    ("suffix", "mode", "wanted", "tolerance", "options"),
    [
        ("jpg", "L", GREY, 12, {"quality": 98}),
        ("jpg", "RGB", COLOUR, 16, {"quality": 98, "subsampling": 0}),
        ("jpg", "CMYK", COLOUR, 12, {"quality": 98}),
        ("webp", "RGB", COLOUR, 0, {"lossless": True}),
        ("webp", "RGBA", COLOUR_ON_BLACK, 0, {"lossless": True, "exact": True}),
        ("jp2", "L", GREY, 0, {}),
        ("jp2", "RGB", COLOUR, 0, {}),
        ("j2k", "RGB", COLOUR, 0, {}),
        ("jp2", "RGBA", COLOUR_ON_BLACK, 0, {}),
        ("jp2", "LA", ON_BLACK, 0, {}),
        ("jp2", "CMYK", COLOUR, 0, {}),
        ("jp2", "YCbCr", COLOUR, 3, {}),
        ("jp2", "I;16", GREY, 0, {}),
        ("gif", "L", GREY, 0, {}),
        ("bmp", "L", GREY, 0, {}),
        ("bmp", "RGB", COLOUR, 0, {}),
        ("bmp", "RGBA", COLOUR, 0, {}),  # a BMP file of this version has no opacity
        ("ppm", "RGB", COLOUR, 0, {}),
        ("ppm", "I", GREY, 0, {}),
        ("ppm", "F", GREY, 0, {}),
    ],
)
def test_other_formats(tmp_path, suffix, mode, wanted, tolerance, options):
    """JPEG rounds blocks of frequencies: at quality 98 a sharp edge is off by some grey levels."""
    sources = {
        **dict.fromkeys(("L", "I", "F"), GREY),
        "RGBA": WITH_OPACITY,
        "LA": np.stack([GREY, OPACITY], axis=-1),
        "I;16": in_bits(GREY, 16).astype(np.uint16),
    }
    image = Image.fromarray(sources.get(mode, COLOUR))
    (image if image.mode == mode else image.convert(mode)).save(tmp_path / f"a.{suffix}", **options)
    assert_shows(tmp_path / f"a.{suffix}", wanted, tolerance)


def test_jpeg_2000_with_a_sign(tmp_path):
    """Stored from -128 on: the sign bit of each value is the other one."""
    Image.fromarray(GREY ^ 0x80).save(tmp_path / "a.jp2", signed=True)
    assert_shows(tmp_path / "a.jp2", GREY)
    Image.fromarray(in_bits(GREY, 16).astype(np.uint16) ^ 0x8000).save(tmp_path / "b.jp2", signed=True)
    assert_shows(tmp_path / "b.jp2", GREY)


def test_a_cmyk_jpeg_without_adobes_marker_is_refused(tmp_path):
    """Adobe's hold the negative, others that or the positive: nothing in the file says which."""
    Image.fromarray(COLOUR).convert("CMYK").save(tmp_path / "odd.jpg")
    content = (tmp_path / "odd.jpg").read_bytes()
    place = content.index(b"\xff\xeeAdobe"[:2])
    (length,) = struct.unpack_from(">H", content, place + 2)
    (tmp_path / "odd.jpg").write_bytes(content[:place] + content[place + 2 + length :])
    with pytest.raises(BadImageError, match=r"odd\.jpg .*CMYK .*RGB"):
        load_image(tmp_path / "odd.jpg")


def _text(values: np.ndarray) -> bytes:
    return " ".join(map(str, values.ravel().tolist())).encode()


BLACK = (GREY < 128).astype(int)
NETPBM: dict[str, tuple[bytes, np.ndarray]] = {
    "P1": (b"P1 64 48\n" + _text(BLACK), 255 - 255 * BLACK),
    "P4": (b"P4 64 48\n" + packed(BLACK, 1), 255 - 255 * BLACK),
    "P2 of 12 bits": (b"P2 64 48 4095\n" + _text(in_bits(GREY, 12)), GREY),
    "P3 of 12 bits": (b"P3 64 48 4095\n" + _text(in_bits(COLOUR, 12)), COLOUR),
    "P5": (b"P5 64 48 255\n" + GREY.tobytes(), GREY),
    "P5 of 16 bits": (b"P5 64 48 65535\n" + in_bits(GREY, 16).astype(">u2").tobytes(), GREY),
    "P5 of 12 bits": (b"P5 64 48 4095\n" + in_bits(GREY, 12).astype(">u2").tobytes(), GREY),
    "P6 of 16 bits": (b"P6 64 48 65535\n" + in_bits(COLOUR, 16).astype(">u2").tobytes(), COLOUR),
    "Pf": (b"Pf\n64 48\n-1.0\n" + GREY[::-1].astype("<f4").tobytes(), GREY),
    "Pf, big-endian": (b"Pf\n64 48\n1.0\n" + GREY[::-1].astype(">f4").tobytes(), GREY),
}


@pytest.mark.parametrize("kind", NETPBM)
def test_netpbm(tmp_path, kind):
    content, wanted = NETPBM[kind]
    (tmp_path / "a.pgm").write_bytes(content)
    assert_shows(tmp_path / "a.pgm", wanted)


def bmp(bits: int, compression: int, rows: bytes, height: int, masks: bytes = b"", palette: bytes = b"") -> bytes:
    start = 54 + len(masks) + len(palette)
    sizes = (SIZE[0], height, 1, bits, compression, len(rows), 0, 0, len(palette) // 4, 0)
    header = struct.pack("<IiiHHIIiiII", 40, *sizes)
    return struct.pack("<2sIHHI", b"BM", start + len(rows), 0, 0, start) + header + masks + palette + rows


FIVES = COLOUR.astype(int) >> 3
BMP: dict[str, tuple[bytes, np.ndarray]] = {
    "32 bits": (
        bmp(32, 0, np.concatenate([COLOUR[::-1, :, ::-1], np.zeros_like(COLOUR[..., :1])], -1).tobytes(), 48),
        COLOUR,
    ),
    "5 bits a colour": (bmp(16, 0, (FIVES[::-1] @ [1024, 32, 1]).astype("<u2").tobytes(), 48), FIVES * 255 // 31),
    "from the top": (
        bmp(8, 0, GREY.tobytes(), -48, palette=b"".join(bytes([entry] * 3 + [0]) for entry in range(256))),
        GREY,
    ),
    "4 bits, bright first": (
        bmp(
            4,
            0,
            packed(15 - in_bits(GREY, 4)[::-1], 4),
            48,
            palette=bytes(np.repeat(np.arange(255, -1, -17), 4).tolist()),
        ),
        two_levels(4),
    ),
    "1 bit, white first": (
        bmp(1, 0, packed(BLACK[::-1], 1), 48, palette=b"\xff\xff\xff\0\0\0\0\0"),
        255 - 255 * BLACK,
    ),
}


@pytest.mark.parametrize("kind", BMP)
def test_bmp(tmp_path, kind):
    content, wanted = BMP[kind]
    (tmp_path / "a.bmp").write_bytes(content)
    assert_shows(tmp_path / "a.bmp", wanted)


# ---- pictures that show nothing


def wide(value: float, dtype: str) -> Image.Image:
    return Image.fromarray(np.full((40, 40), value, dtype=dtype))


NOTHING: dict[str, tuple[Callable[[], Image.Image], str, str]] = {
    "black": (lambda: Image.new("L", (40, 40)), "png", r"one colour \(0 of 255\)"),
    "white": (lambda: Image.new("1", (40, 40), 1), "png", r"one colour \(255 of 255\)"),
    "a colour": (lambda: Image.new("RGB", (40, 40), (9, 50, 200)), "png", r"one colour \(9 50 200 of 255\)"),
    "a JPEG": (lambda: Image.new("RGB", (40, 40), (99, 99, 99)), "jpg", "one colour"),
    "a mask of 0 and 1": (
        lambda: Image.fromarray((GREY > 99).astype(np.uint8)),
        "png",
        r"one colour \(0 to 1 of 255\)",
    ),
    "a palette of one colour": (lambda: Image.new("P", (40, 40), 3), "gif", "one colour"),
    "16 bits": (lambda: wide(40000, "u2"), "png", "all its values are 40000"),
    "floats": (lambda: wide(-1.5, "f4"), "tif", r"all its values are -1\.5"),
    "NaN": (lambda: wide(np.nan, "f4"), "tif", "finite"),
    "infinite": (lambda: wide(-np.inf, "f4"), "tif", "finite"),
    "transparent": (
        lambda: Image.fromarray(np.concatenate([COLOUR, np.zeros_like(COLOUR[..., :1])], axis=-1)),
        "png",
        "transparent all over",
    ),
}


@pytest.mark.parametrize("kind", NOTHING)
def test_a_picture_that_shows_nothing_is_refused_with_the_cause(tmp_path, kind):
    make, suffix, reason = NOTHING[kind]
    make().save(tmp_path / f"empty.{suffix}")
    with pytest.raises(BadImageError, match=rf"empty\.{suffix} .*{reason}"):
        check_image(tmp_path / f"empty.{suffix}")


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_one_pixel_that_differs_is_a_picture(tmp_path, dtype):
    values = np.zeros((40, 40), dtype=dtype)
    values[7, 9] = 200
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert np.argwhere(loaded(tmp_path / "a.tif")[..., 0]).tolist() == [[7, 9]]
