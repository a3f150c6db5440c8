"""Turn errors about damaged files into ones that quote nothing of them.

Shared by DICOM and NIfTI.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rlmed.data.images import BadImageError


@contextmanager
def damage_reported(damage: tuple[type[Exception], ...], *, message: str, without_number: str) -> Iterator[None]:
    """Turn errors into a BadImageError without a patient's name.

    Args:
        damage: what a library raises for damaged files.
        message: for these.
        without_number: the reason for an OSError without errno, as decoders and gzip raise.
    """
    try:
        yield
    except BadImageError:
        raise
    except MemoryError:
        raise BadImageError("it does not fit in memory: export it again, smaller") from None
    except OSError as error:
        # not the error's text, which names the file
        what = error.strerror or without_number
        raise BadImageError(f"it cannot be read ({what}): correct the path or copy it again") from None
    except damage:
        raise BadImageError(message) from None
