"""Rows of parquet files, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow.parquet

BATCH = 64
"""Rows held at a time: images may be in them."""
INSTALL = "install what reads it from the checkout: pip install -c requirements.lock -e '.[readers]'"


def read_parquet(path: Path) -> tuple[list[str], Iterator[tuple[int, dict[str, Any]]]]:
    """Names of the columns, and (number from 0, values by column) of each row, read as they are asked for.

    Raises:
        ValueError: for a file that is no parquet file or is damaged, or when pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path.name} is a parquet file: {INSTALL}") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"parquet file {path} cannot be read ({_first_line(error)}): copy it again") from error
    return list(file.schema_arrow.names), _rows(path, file)


def _rows(path: Path, file: pyarrow.parquet.ParquetFile) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow

    number = 0
    try:
        with file:
            for batch in file.iter_batches(batch_size=BATCH):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"parquet file {path} is damaged after row {number} ({_first_line(error)}): copy it again"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
