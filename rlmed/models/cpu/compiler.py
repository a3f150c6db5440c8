"""Compile `decode.cpp` for this processor, once, and load it; without a compiler, say so."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("decode.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-Wno-psabi")
"""The linker gets no `-fopenmp`: the threads are those of torch's own OpenMP, already loaded."""
COMPILE_S = 120.0
"""Most seconds that compiling may take; it takes 3."""


class CompilerError(RuntimeError):
    """There is no library of compiled decode steps; the message says why, on one line."""


def load_library() -> ctypes.CDLL:
    """Return the compiled `decode.cpp`, from the cache if it is there.

    Raises:
        CompilerError: if it cannot be compiled or loaded.
    """
    return _load(FLAGS)


def missing_library() -> str:
    """Return why there is no library; "" if there is one."""
    try:
        load_library()
    except CompilerError as error:
        return str(error)
    return ""


@functools.cache
def _load(flags: tuple[str, ...]) -> ctypes.CDLL:
    compiler = _compiler()
    path = _cached(compiler, flags)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:  # a file that was cut off, or of another system
        log.warning("%s cannot be loaded (%s): compiling it again", path, error)
    try:
        path.unlink(missing_ok=True)
        return ctypes.CDLL(str(_cached(compiler, flags)))
    except OSError as error:
        raise CompilerError(f"{path} cannot be loaded: {error}") from error


def _compiler() -> list[str]:
    """Return the compiler's path, and its first arguments if CXX has some, as `ccache g++`."""
    given = os.environ.get("CXX", "")
    try:
        name, *arguments = shlex.split(given) or ["g++"]
    except ValueError as error:
        raise CompilerError(f"CXX={given!r} is no command: {error}") from error
    compiler = shutil.which(name)
    if platform.system() != "Linux" or compiler is None:
        raise CompilerError(f"no C++ compiler {name} on this machine" if compiler is None else "not on Linux")
    return [compiler, *arguments]


def _cached(compiler: list[str], flags: tuple[str, ...]) -> Path:
    """Return the library for this source, compiler, flags and processor; compile it if missing."""
    version = _run([*compiler, *flags, "-E", "-dM", "-x", "c++", os.devnull])  # names all that -march found
    arguments = " ".join([*compiler[1:], *flags]).encode()
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), arguments, version])).hexdigest()[:16]
    for folder in _folders():
        path = folder / f"decode-{key}.so"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_owner(folder)
            if path.is_file():
                return path
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                unlinked, library = Path(scratch) / "decode.o", Path(scratch) / "decode.so"
                _run([*compiler, *flags, "-c", str(SOURCE), "-o", str(unlinked)])
                _run([*compiler, "-shared", str(unlinked), "-o", str(library)])
                library.replace(path)  # another process may do the same
        except OSError as error:
            reason = error
            continue
        log.info("compiled the decode steps for this processor: %s", path)
        return path
    raise CompilerError(f"no folder to compile in: {reason}")


def _folders() -> Iterator[Path]:
    """Yield where the library may be kept, best first."""
    home = Path(os.path.expanduser("~"))  # which stays as it is without HOME
    if cache := os.environ.get("XDG_CACHE_HOME"):
        yield Path(cache) / "rlmed"
    elif home.is_absolute() and os.path.isdir(home):  # Path.is_dir raises for names that are too long
        yield home / ".cache" / "rlmed"
    yield Path(tempfile.gettempdir()) / f"rlmed-{os.getuid()}"


def _check_owner(folder: Path) -> None:
    """Raise PermissionError if others could put a library there, which this process would run."""
    found = folder.stat()
    owners = {folder.lstat().st_uid, found.st_uid}  # of a link, too
    if not owners <= {0, os.getuid()} or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others can write to {folder}")


def _run(command: list[str]) -> bytes:
    try:
        return subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_S).stdout
    except subprocess.TimeoutExpired as error:
        raise CompilerError(f"{command[0]} took more than {COMPILE_S:.0f} s") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise CompilerError(f"{command[0]} failed: {lines[0]}") from error
