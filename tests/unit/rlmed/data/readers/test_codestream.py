"""The size that a compressed stream states, against encoders that were told the size."""

import io

import numpy as np
import pytest
from PIL import Image

from rlmed.data.readers.codestream import FrameSize, jpeg2000_size, jpeg_size

COLOUR = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def encoded(image: Image.Image, form: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"comment": b"\xff\xc0 no frame header"}, {"quality": 1}]
)
def test_jpeg_states_rows_columns_and_samples(options):
    assert jpeg_size(encoded(COLOUR, "JPEG", **options)) == FrameSize(40, 60, 3)
    assert jpeg_size(encoded(COLOUR.convert("L"), "JPEG", **options)) == FrameSize(40, 60, 1)


@pytest.mark.parametrize("options", [{"no_jp2": True}, {"no_jp2": False}, {"tile_size": (16, 16), "no_jp2": True}])
def test_jpeg_2000_states_them_bare_and_in_a_file(options):
    assert jpeg2000_size(encoded(COLOUR, "JPEG2000", **options)) == FrameSize(40, 60, 3)


def test_fill_bytes_before_a_marker_are_passed_over():
    stream = encoded(COLOUR, "JPEG")
    assert jpeg_size(stream[:2] + b"\xff\xff\xff" + stream[2:]) == FrameSize(40, 60, 3)


def test_every_cut_gives_the_size_or_nothing():
    for form, measure in (("JPEG", jpeg_size), ("JPEG2000", jpeg2000_size)):
        stream = encoded(COLOUR, form)
        found = {measure(stream[:length]) for length in range(700)}
        assert found == {None, FrameSize(40, 60, 3)}


def test_two_codestreams_are_not_trusted():
    stream = encoded(COLOUR, "JPEG2000", no_jp2=True)
    assert jpeg2000_size(stream + stream) is None


@pytest.mark.parametrize(
    "stream", [b"", b"\xff", b"\0" * 100, b"\xff\xd8\xff\xda\0\0\0\0", b"\xff\xd8\xff\xd9\0\0\0\0"]
)
def test_no_image_has_no_size(stream):
    assert jpeg_size(stream) is None
    assert jpeg2000_size(stream) is None
