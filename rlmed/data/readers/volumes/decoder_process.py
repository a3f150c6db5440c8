"""Decode compressed frames in a process that a damaged file may crash, hang or flood with warnings.

The decoders are C and C++ libraries behind pydicom. On damaged frames, GDCM sometimes terminates
its process (`terminate called after throwing an instance of 'gdcm::Exception'`); such a file must
cost its row, not the run.

The two processes talk through pipes: a request is a line of JSON, an answer a line of JSON and the
frame's bytes.
"""

from __future__ import annotations

import atexit
import io
import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydicom.pixels import pixel_array
from pydicom.uid import RLELossless

from rlmed.data.images import BadImageError

TIME_LIMIT = 120.0
"""Time limit in seconds for one frame; the largest allowed one takes a few."""
_READY = b"ready\n"
_PROGRAM = f"""
import sys
sys.modules["dl"] = None  # a module of Python 2, which GDCM tries to import: a local folder dl would match
from {__name__} import serve
serve()
"""


class DecoderProcess:
    """Starts on the first frame, restarts after a crash, and ends with this process.

    Example:
        values = DecoderProcess().decode(Path("series/1.dcm"), "1.2.840.10008.1.2.4.90", 0)  #
        int16, [512, 512]
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.stop)

    def decode(self, path: Path, transfer_syntax: str, frame: int) -> np.ndarray:
        """Return stored values of a frame (from 0): [rows, columns] or [rows, columns, samples].

        Raises:
            BadImageError: for an undecodable frame; gives the reason but not the path.
        """
        request = {"path": os.fspath(path.absolute()), "transfer_syntax": str(transfer_syntax), "frame": frame}
        with self._lock:
            process = self._process = self._process or _start()
            # kills a stuck process, and its pipe with it
            timer = threading.Timer(TIME_LIMIT, process.kill)
            timer.start()
            try:
                return _ask(process, request)
            except (EOFError, OSError):
                self.stop()
                raise BadImageError(
                    "its compressed pixels crash the decoder or hang it: export it again, uncompressed"
                ) from None
            except BadImageError:
                raise
            except BaseException:  # interrupted: the rest of this answer would pass for the next one
                self.stop()
                raise
            finally:
                timer.cancel()

    def stop(self) -> None:
        """Stop the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process = None


def _start() -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        # -P: search modules only where this process does
        [sys.executable, "-P", "-c", _PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)},
    )
    assert process.stdout is not None
    if process.stdout.readline() != _READY:
        process.kill()
        raise BadImageError(f"the decoder process did not start: `python -c 'import {__name__}'` shows why")
    return process


def _ask(process: subprocess.Popen[bytes], request: dict[str, Any]) -> np.ndarray:
    """Read an answer.

    Raises EOFError or OSError if the process ends, BadImageError if it reports a bad frame.
    """
    assert process.stdin is not None
    assert isinstance(process.stdout, io.BufferedReader)
    process.stdin.write(json.dumps(request).encode() + b"\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise EOFError
    answer = json.loads(line)
    if "reason" in answer:
        raise BadImageError(answer["reason"])
    values: np.ndarray = np.empty(answer["shape"], dtype=answer["dtype"])
    if process.stdout.readinto(values.data.cast("B")) != values.nbytes:
        raise EOFError
    return values


def serve() -> None:
    """Run the decoder process: answer the requests on stdin, until the other side closes it."""
    # a core dump in the working folder would hold a patient's header
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # the libraries print warnings
        _answer_all(sys.stdin.buffer, answers)


def _answer_all(requests: BinaryIO, answers: BinaryIO) -> None:
    answers.write(_READY)
    answers.flush()
    for line in requests:
        values = _decode(**json.loads(line))
        if isinstance(values, str):
            answers.write(json.dumps({"reason": values}).encode() + b"\n")
        else:
            answers.write(json.dumps({"shape": values.shape, "dtype": values.dtype.str}).encode() + b"\n")
            answers.write(np.ascontiguousarray(values).data.cast("B"))
        answers.flush()


def _decode(path: str, transfer_syntax: str, frame: int) -> np.ndarray | str:
    """Return the frame, or what is wrong; never pydicom's own messages, which quote headers."""
    plugin = "pydicom" if transfer_syntax == RLELossless else ""
    try:
        values: np.ndarray = pixel_array(
            path,
            index=frame,
            transfer_syntax_uid=transfer_syntax,
            decoding_plugin=plugin,
            correct_unused_bits=False,  # the caller checks them
        )
        return values
    except MemoryError:
        return "it does not fit in memory: export it again, smaller"
    except Exception:  # a decoder may raise anything; the answer is the same
        return "its compressed pixels are damaged, or no installed decoder supports them: export it again, uncompressed"
