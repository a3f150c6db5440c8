"""What a compressed stream says of itself, against encoders that were told it."""

import io

import numpy as np
import pytest
from PIL import Image

from rlmed.data.readers.volumes.codestream import Codestream, FrameSize, read_codestream, read_jpeg, read_jpeg2000

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
COLOUR = Image.fromarray(PIXELS)
SIZE = FrameSize(40, 60, 3)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"comment": b"\xff\xc0 no frame header"}, {"quality": 1}]
)
def test_jpeg_states_rows_columns_samples_and_colours(options):
    assert read_codestream(encoded(COLOUR, "JPEG", **options)) == Codestream("JPEG", SIZE, 8, colours="YCbCr")
    grey = Codestream("JPEG", FrameSize(40, 60, 1), 8)
    assert read_codestream(encoded(COLOUR.convert("L"), "JPEG", **options)) == grey


def test_jpeg_of_rgb_says_so_by_adobes_marker_or_by_the_names_of_its_components():
    stream = encoded(COLOUR, "JPEG", keep_rgb=True)
    assert read_codestream(stream).colours == "RGB"
    place = stream.index(b"\xff\xee")
    bare = stream[:place] + stream[place + 2 + int.from_bytes(stream[place + 2 : place + 4], "big") :]
    assert read_codestream(bare).colours == "RGB"  # libjpeg calls them R, G and B
    frame = bare.index(b"\xff\xc0")
    numbered = bytearray(bare)
    numbered[frame + 10 : frame + 19 : 3] = b"\1\2\3"
    assert read_codestream(bytes(numbered)).colours == ""


@pytest.mark.parametrize(
    ("marker", "kind"), [(0xC0, "JPEG"), (0xC1, "JPEG"), (0xC3, "lossless JPEG"), (0xF7, "JPEG-LS")]
)
def test_the_kind_and_the_bits_of_a_jpeg(marker, kind):
    frame = bytes([0xFF, 0xD8, 0xFF, marker, 0, 11, 12, 2, 0, 2, 128, 1, 1, 17, 0])
    assert read_codestream(frame) == Codestream(kind, FrameSize(512, 640, 1), 12)


@pytest.mark.parametrize("options", [{"no_jp2": True}, {"no_jp2": False}, {"tile_size": (16, 16), "no_jp2": True}])
@pytest.mark.parametrize("transform", [0, 1])
def test_jpeg_2000_states_them_bare_and_in_a_file(options, transform):
    stream = encoded(COLOUR, "JPEG2000", mct=transform, **options)
    assert read_codestream(stream) == Codestream("JPEG 2000", SIZE, 8, signed=False, transformed=bool(transform))


def test_jpeg_2000_states_bits_and_sign():
    grey = Image.fromarray(PIXELS[..., 0].astype(np.uint16))
    for signed in (False, True):
        wanted = Codestream("JPEG 2000", FrameSize(40, 60, 1), 16, signed=signed)
        assert read_codestream(encoded(grey, "JPEG2000", no_jp2=True, signed=signed)) == wanted


def test_fill_bytes_before_a_marker_are_passed_over():
    stream = encoded(COLOUR, "JPEG")
    assert read_codestream(stream[:2] + b"\xff\xff\xff" + stream[2:]).size == SIZE


def test_every_cut_gives_the_size_or_nothing():
    for form in ("JPEG", "JPEG2000"):
        stream = encoded(COLOUR, form)
        found = {read_codestream(stream[:length]) for length in range(700)}
        assert {stated and stated.size for stated in found} == {None, SIZE}


def test_two_codestreams_are_not_trusted():
    stream = encoded(COLOUR, "JPEG2000", no_jp2=True)
    assert read_codestream(stream + stream) is None


@pytest.mark.parametrize(
    "stream", [b"", b"\xff", b"\0" * 100, b"\xff\xd8\xff\xda\0\0\0\0", b"\xff\xd8\xff\xd9\0\0\0\0"]
)
def test_no_image_says_nothing(stream):
    assert read_jpeg(stream) is None
    assert read_jpeg2000(stream) is None
