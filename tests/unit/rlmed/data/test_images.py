"""Image files: every mode to 8-bit RGB, every defect to an error that names the file."""

import gzip
import io
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlmed.data import images
from rlmed.data.images import MAX_ASPECT, BadImageError, check_image, image_sha256, load_image

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
CORNER = np.zeros((40, 60), dtype=np.uint8)
CORNER[:10, :20] = 255  # one bright corner, so that a turn shows


def save(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def test_rgb_pixels_come_through_unchanged(tmp_path):
    loaded = load_image(save(tmp_path / "a.png", Image.fromarray(NOISE)))
    assert loaded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(loaded), NOISE)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "gif", "bmp", "webp", "ppm", "jp2"])
def test_every_listed_format_is_read_whatever_its_name(tmp_path, suffix):
    save(tmp_path / f"a.{suffix}", Image.new("RGB", (60, 40), (200, 200, 200))).rename(tmp_path / "a.dat")
    assert np.abs(np.asarray(load_image(tmp_path / "a.dat")).astype(int) - 200).max() <= 3


def test_cmyk_becomes_the_same_colour(tmp_path):
    loaded = load_image(save(tmp_path / "a.jpg", Image.new("RGB", (40, 40), (250, 20, 30)).convert("CMYK")))
    assert loaded.mode == "RGB"
    assert np.abs(np.asarray(loaded).astype(int) - [250, 20, 30]).max() <= 6


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_stretched_and_not_clipped_to_white(tmp_path, suffix):
    values = np.tile(np.linspace(1000, 5000, 64).astype(np.uint16), (32, 1))
    loaded = np.asarray(load_image(save(tmp_path / f"a.{suffix}", Image.fromarray(values))))
    np.testing.assert_array_equal(loaded[..., 0], loaded[..., 2])
    assert (loaded[0, 0, 0], loaded[0, -1, 0]) == (0, 255)
    expected = (values.astype(float) - 1000) / 4000 * 255
    assert np.abs(loaded[..., 0] - expected).max() <= 0.51


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_negative_and_float_grey_is_stretched_too(tmp_path, dtype):
    values = np.tile(np.linspace(-1000, 3000, 41), (30, 1)).astype(dtype)  # Hounsfield units
    loaded = np.asarray(load_image(save(tmp_path / "a.tif", Image.fromarray(values))))
    assert loaded[0, [0, 10, 20, 40], 0].tolist() == [0, 64, 128, 255]


def test_one_grey_value_and_nan_do_not_divide_by_zero(tmp_path):
    flat = load_image(save(tmp_path / "flat.png", Image.fromarray(np.full((30, 30), 40000, np.uint16))))
    assert np.ptp(np.asarray(flat)) == 0
    values = np.tile(np.linspace(0, 1, 30, dtype=np.float32), (30, 1))
    values[0, 0], values[0, 1] = np.nan, np.inf
    loaded = np.asarray(load_image(save(tmp_path / "nan.tif", Image.fromarray(values))))[..., 0]
    assert (loaded[0, 0], loaded[0, 1], loaded[5, 29]) == (0, 255, 255)
    everywhere = np.full((30, 30), np.nan, dtype=np.float32)
    with pytest.raises(BadImageError, match=r"all\.tif .*finite"):
        load_image(save(tmp_path / "all.tif", Image.fromarray(everywhere)))


def test_palette_keeps_its_colours_when_scaled_down(tmp_path):
    picture = Image.new("P", (3000, 30))
    picture.putpalette([0, 0, 0, 240, 10, 20])
    picture.paste(1, (0, 0, 3000, 30))
    loaded = np.asarray(load_image(save(tmp_path / "a.png", picture)))
    assert np.unique(loaded.reshape(-1, 3), axis=0).tolist() == [[240, 10, 20]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_black(tmp_path, mode):
    rgba = Image.new("RGBA", (40, 40), (255, 255, 255, 0))
    rgba.paste((255, 255, 255, 255), (20, 0, 40, 40))
    picture = rgba.convert(mode)
    if mode == "P":
        picture = Image.new("P", (40, 40), 0)
        picture.putpalette([255, 255, 255, 255, 255, 255])
        picture.paste(1, (20, 0, 40, 40))
        picture.info["transparency"] = 0
    loaded = np.asarray(load_image(save(tmp_path / "a.png", picture)))
    assert (loaded[20, 5].tolist(), loaded[20, 35].tolist()) == ([0, 0, 0], [255, 255, 255])


def test_half_transparent_is_half_as_bright(tmp_path):
    loaded = load_image(save(tmp_path / "a.png", Image.new("RGBA", (40, 40), (200, 100, 50, 128))))
    assert np.abs(np.asarray(loaded).astype(int) - [100, 50, 25]).max() <= 1


TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].T,
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["png", "tif", "packed.tif"])
def test_exif_orientation_is_applied_once(tmp_path, kind, orientation):
    picture, path = Image.fromarray(CORNER), tmp_path / f"a.{kind}"
    if kind == "png":
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture.save(path, exif=exif)
    else:
        picture.save(path, tiffinfo={274: orientation}, compression="tiff_lzw" if "packed" in kind else None)
    np.testing.assert_array_equal(np.asarray(load_image(path))[..., 0], TURNED[orientation](CORNER))


def test_exif_orientation_of_a_scaled_jpeg(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    big = Image.fromarray(CORNER).resize((1200, 800), Image.Resampling.NEAREST)
    loaded = np.asarray(load_image(save(tmp_path / "a.jpg", big, exif=exif), max_side=90))[..., 0]
    assert loaded.shape == (90, 60)
    assert loaded[5, 55] > 250  # the corner at the top left, turned clockwise
    assert loaded[80, 5] < 5


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif").getpixel((20, 20)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((28, 28), (28, 28)),
        ((4, 4), (28, 28)),
        ((10, 20), (28, 56)),
        ((4, 800), (28, 5600)),  # the longest side that 200 : 1 allows beats max_side
        ((20000, 100), (5600, 28)),
        ((4096, 1024), (2048, 512)),
        ((2049, 2049), (2048, 2048)),
    ],
)
@pytest.mark.parametrize("mode", ["L", "I;16"])
def test_sides_end_between_what_models_take(tmp_path, size, expected, mode):
    assert load_image(save(tmp_path / "a.png", Image.new(mode, size))).size == expected


@pytest.mark.parametrize("long_side", range(2000, 6001, 250))
def test_scaling_never_makes_an_image_too_elongated_for_qwen2_vl(tmp_path, long_side):
    width, height = load_image(save(tmp_path / "a.png", Image.new("L", (long_side, -(-long_side // 200))))).size
    assert width <= MAX_ASPECT * height
    assert height >= 28


def test_rounding_the_shorter_side_does_not_break_the_aspect_limit(tmp_path):
    # halved, 11400x57 is 5700x28.5, and 5700x28 would be 204 to 1
    assert load_image(save(tmp_path / "a.png", Image.new("L", (11400, 57))), max_side=5700).size == (5600, 28)


@pytest.mark.parametrize(
    ("size", "reason"),
    [((1, 1), "1x1 pixels, fewer than 4"), ((3, 50), "3x50"), ((4, 801), "4x801 .*200 times"), ((1005, 5), "crop it")],
)
def test_too_small_or_elongated_is_refused(tmp_path, size, reason):
    path = save(tmp_path / "odd.png", Image.new("RGB", size))
    with pytest.raises(BadImageError, match=rf"odd\.png.*{reason}"):
        load_image(path)


def png_bytes() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(NOISE).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file: copy"),
        (bytes(128) + b"DICM" + bytes(300), "is a DICOM file: .*prepare files"),
        (bytes(344) + b"n+1\0" + bytes(9), "is a NIfTI file: .*prepare files"),
        (gzip.compress(bytes(344) + b"n+1\0", mtime=0), "is a NIfTI file: .*prepare files"),
        (b"this is no image", "is not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n", "is not an image"),
        (png_bytes()[:20], "not an image|truncated"),
        (png_bytes()[:3000], "truncated or damaged"),
        (bytes(128) + b"DICM" + bytes(100), r"DICOM .* rlmed\.prepare"),
    ],
)
def test_defects_name_file_and_advice(tmp_path, content, reason):
    (tmp_path / "scan.png").write_bytes(content)
    with pytest.raises(BadImageError, match=rf"scan\.png.*({reason})"):
        load_image(tmp_path / "scan.png")


def test_a_truncated_jpeg_is_an_error_and_not_a_grey_half(tmp_path):
    path = save(tmp_path / "a.jpg", Image.fromarray(np.tile(NOISE, (5, 5, 1))))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadImageError, match="truncated"):
        load_image(path)


def test_missing_files_and_folders_are_errors(tmp_path):
    with pytest.raises(BadImageError, match=r"none\.png does not exist"):
        load_image(tmp_path / "none.png")
    with pytest.raises(BadImageError, match="read: Is a directory"):
        load_image(tmp_path)
    with pytest.raises(BadImageError, match="File name too long"):
        load_image(tmp_path / ("x" * 5000))
    (tmp_path / "a.png").symlink_to(tmp_path / "b.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(BadImageError, match="symbolic links"):
        load_image(tmp_path / "a.png")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of some damage before it fails
def test_random_damage_gives_an_image_or_our_error(tmp_path):
    draw, path = random.Random(0), tmp_path / "a.bin"
    originals = []
    for kind, mode in [("PNG", "RGB"), ("PNG", "P"), ("JPEG", "L"), ("TIFF", "RGB"), ("GIF", "P"), ("WEBP", "RGB")]:
        stream = io.BytesIO()
        Image.fromarray(NOISE).convert(mode).save(stream, kind)
        originals.append(stream.getvalue())
    refused = 0
    for _ in range(600):
        damaged = bytearray(draw.choice(originals))
        for _ in range(draw.choice([1, 2, 5, 20])):
            damaged[draw.randrange(min(len(damaged), draw.choice([60, 200, len(damaged)])))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            load_image(path)
        except BadImageError:
            refused += 1
    assert 100 < refused < 600


def gigantic_header(path: Path, side: int) -> None:
    """A BMP whose header promises side x side pixels that do not follow."""
    stream = io.BytesIO()
    Image.new("L", (8, 8)).save(stream, "BMP")
    content = bytearray(stream.getvalue())
    content[18:26] = side.to_bytes(4, "little") * 2
    path.write_bytes(content)


# pytest drops the filter of the module
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [13_100, 13_400, 60_000])
def test_a_gigantic_image_is_refused_before_it_is_decoded(tmp_path, side):
    gigantic_header(tmp_path / "a.bmp", side)  # 13,400 and more is also beyond Pillow's own limit
    with pytest.raises(BadImageError, match=r"more than 170000000.*scale it down"):
        load_image(tmp_path / "a.bmp")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from Linux' /proc")
@pytest.mark.parametrize(("suffix", "mode", "limit_mib"), [("jpg", "L", 60), ("png", "L", 250), ("png", "I;16", 400)])
def test_ten_thousand_squared_loads_in_bounded_memory(tmp_path, suffix, mode, limit_mib):
    path = save(tmp_path / f"big.{suffix}", Image.new(mode, (10_000, 10_000)))
    # VmHWM is the peak of this program; that of getrusage would include the peak of the process
    # that started it
    code = """
        import re, sys
        from pathlib import Path
        from rlmed.data.images import load_image
        def peak_kib():
            return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
        before = peak_kib()
        assert load_image(Path(sys.argv[1])).size == (2048, 2048)
        print((peak_kib() - before) // 1024)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    assert run.stderr == ""  # no warning of a decompression bomb
    assert int(run.stdout) < limit_mib


def test_sha256_is_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert image_sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.fixture
def decodes(monkeypatch):
    """The files decoded so far, in their order; no picture is kept yet."""
    names, decode = [], images._decode
    monkeypatch.setattr(
        images, "_decode", lambda stream, *rest: names.append(Path(stream.name).name) or decode(stream, *rest)
    )
    monkeypatch.setattr(images, "_KEPT", images._KeptPictures())
    return names


@pytest.mark.parametrize("pixels", [NOISE, NOISE[..., 0]], ids=["coloured", "grey"])
def test_a_kept_picture_is_decoded_once_and_is_the_same(tmp_path, decodes, pixels):
    path = save(tmp_path / "a.png", Image.fromarray(pixels))
    check_image(path, keep=True)
    first = load_image(path)
    first.paste((1, 2, 3), (0, 0, 40, 40))  # a caller's own
    assert (first.mode, decodes) == ("RGB", ["a.png"])
    np.testing.assert_array_equal(np.asarray(load_image(path)), np.asarray(Image.fromarray(pixels).convert("RGB")))


def test_a_file_that_has_changed_is_decoded_again(tmp_path, decodes):
    path = save(tmp_path / "a.png", Image.fromarray(NOISE))
    check_image(path, keep=True)
    save(path, Image.fromarray(255 - NOISE))
    np.testing.assert_array_equal(np.asarray(load_image(path)), 255 - NOISE)
    path.unlink()
    with pytest.raises(BadImageError, match="does not exist"):
        load_image(path)


def test_no_more_pictures_are_kept_than_there_is_room_for(tmp_path, decodes, monkeypatch):
    size = NOISE[..., 0].size
    monkeypatch.setattr(images, "KEPT_BYTES", 4 * size)  # a coloured one and a grey one
    paths = [save(tmp_path / f"{name}.png", Image.fromarray(NOISE)) for name in "ab"]
    paths.append(save(tmp_path / "c.png", Image.fromarray(NOISE[..., 0])))
    for path in paths:
        check_image(path, keep=True)
    for path in [*paths, *paths]:
        load_image(path)
    assert decodes == ["a.png", "b.png", "c.png", "b.png", "b.png"]


def test_a_check_alone_keeps_nothing(tmp_path, decodes):
    path = save(tmp_path / "a.png", Image.fromarray(NOISE))
    check_image(path)
    load_image(path)
    assert len(decodes) == 2
