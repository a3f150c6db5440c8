"""The process that decodes: what it answers, and that its end costs one frame."""

import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pydicom", reason="needs rlmed's extra 'readers'")

from pydicom.pixels import pixel_array
from pydicom.uid import JPEG2000Lossless, JPEGLosslessSV1, RLELossless

from rlmed.data.images import BadImageError
from rlmed.data.readers.volumes import decoder_process
from rlmed.data.readers.volumes.decoder_process import DecoderProcess
from tests.unit.rlmed.data.readers.dicom_files import shipped

WANTED = pixel_array(shipped("MR_small.dcm"))


@pytest.fixture(scope="module")
def decoder():
    decoder = DecoderProcess()
    yield decoder
    decoder.stop()


def test_frames_come_back_as_pydicom_decodes_them(decoder):
    values = decoder.decode(shipped("MR_small_jp2klossless.dcm"), JPEG2000Lossless, 0)
    assert values.dtype == np.int16
    np.testing.assert_array_equal(values, WANTED)
    np.testing.assert_array_equal(decoder.decode(shipped("MR_small_RLE.dcm"), RLELossless, 0), WANTED)
    two = decoder.decode(shipped("SC_rgb_rle_2frame.dcm"), RLELossless, 1)
    np.testing.assert_array_equal(two, pixel_array(shipped("SC_rgb_rle_2frame.dcm"), index=1))


def test_a_refusal_quotes_nothing_and_the_process_goes_on(decoder):
    with pytest.raises(BadImageError, match="no installed decoder") as caught:
        decoder.decode(Path("/nowhere/DOE^JANE.dcm"), JPEG2000Lossless, 0)
    assert "DOE" not in str(caught.value)
    first = decoder._process
    np.testing.assert_array_equal(decoder.decode(shipped("MR_small_RLE.dcm"), RLELossless, 0), WANTED)
    assert decoder._process is first


def test_a_crash_costs_one_frame(decoder):
    decoder.decode(shipped("MR_small_RLE.dcm"), RLELossless, 0)
    os.kill(decoder._process.pid, signal.SIGABRT)
    decoder._process.wait()
    with pytest.raises(BadImageError, match="crash the decoder"):
        decoder.decode(shipped("MR_small_RLE.dcm"), RLELossless, 0)
    np.testing.assert_array_equal(decoder.decode(shipped("MR_small_RLE.dcm"), RLELossless, 0), WANTED)


def test_a_crash_leaves_no_core_file(decoder):
    before = resource.getrlimit(resource.RLIMIT_CORE)
    # as where somebody looks for crashes
    resource.setrlimit(resource.RLIMIT_CORE, (before[1], before[1]))
    try:
        decoder.stop()
        decoder.decode(shipped("MR_small_RLE.dcm"), RLELossless, 0)
        assert resource.prlimit(decoder._process.pid, resource.RLIMIT_CORE) == (0, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, before)


def test_a_frame_that_takes_too_long_is_given_up(monkeypatch):
    impatient = DecoderProcess()
    impatient.decode(shipped("MR_small_RLE.dcm"), RLELossless, 0)
    # it will never answer, however fast the machine
    os.kill(impatient._process.pid, signal.SIGSTOP)
    monkeypatch.setattr(decoder_process, "TIME_LIMIT", 0.05)
    with pytest.raises(BadImageError, match="crash the decoder"):
        impatient.decode(shipped("MR_small_RLE.dcm"), RLELossless, 0)
    assert impatient._process is None


def test_what_the_libraries_print_goes_nowhere(tmp_path, decoder, capfd):
    content = bytearray(shipped("SC_rgb_jpeg_gdcm.dcm").read_bytes())
    table = content.index(b"\xff\xc4")
    content[table + 5 : table + 12] = b"\xff" * 7  # more codes of each length than there can be
    (tmp_path / "a.dcm").write_bytes(content)
    with pytest.raises(RuntimeError):
        pixel_array(tmp_path / "a.dcm")
    assert "Huffman" in capfd.readouterr().err
    with pytest.raises(BadImageError):
        decoder.decode(tmp_path / "a.dcm", JPEGLosslessSV1, 0)
    assert capfd.readouterr().err == ""
