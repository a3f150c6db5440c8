"""Read rows of parquet files, a few at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlmed.data.readers.base import INSTALL

BATCH = 16
"""Rows held at a time; they may contain images."""
MAX_GROUP_BYTES = 2**34
"""Most bytes that a row group may unpack to: pyarrow unpacks its columns whole."""


class ParquetTable:
    """A parquet file.

    Example:
        >>> table = ParquetTable(Path("data/train-00000-of-00001.parquet"))         # doctest: +SKIP
        >>> table.columns, next(table.rows(["question"]))                           # doctest: +SKIP
        (['image', 'question', 'answer'], (0, {'question': 'Is there a fracture?'}))
    """

    def __init__(self, path: Path) -> None:
        """Read the file's metadata.

        Raises:
            ValueError: for a file that is not parquet, or if pyarrow is not installed.
        """
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ValueError(f"{path.name} is a parquet file, which needs pyarrow: {INSTALL}") from error
        self._path = path
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                schema, metadata = file.schema_arrow, file.metadata
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"parquet file {path} cannot be read ({_first_line(error)}): copy it again") from error
        self.columns: list[str] = list(schema.names)
        self.count: int = metadata.num_rows
        self._labels = _class_labels(schema.metadata or {})
        sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
        if max(sizes, default=0) > MAX_GROUP_BYTES:
            raise ValueError(
                f"parquet file {path} has a row group that unpacks to {max(sizes)} bytes, more than {MAX_GROUP_BYTES}: "
                "write it with smaller row groups"
            )

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (number from 0, values by column) per row, for all columns or the given ones.

        Replaces class numbers by names where the `datasets` library has recorded them.

        Raises:
            ValueError: if the file is damaged.
        """
        import pyarrow
        import pyarrow.parquet

        number = 0
        try:
            with pyarrow.parquet.ParquetFile(self._path) as file:
                for batch in file.iter_batches(batch_size=BATCH, columns=columns):
                    for row in batch.to_pylist():
                        yield number, self._named(row)
                        number += 1
        # Python dates end with the year 9999
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
            raise ValueError(
                f"parquet file {self._path} is damaged after row {number} ({_first_line(error)}): copy it again"
            ) from error

    def _named(self, row: dict[str, Any]) -> dict[str, Any]:
        for column, names in self._labels.items():
            index = row.get(column)
            if isinstance(index, int) and 0 <= index < len(names):
                row[column] = names[index]
        return row


def _class_labels(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Return class names by column, from ClassLabel features that `datasets` writes into files."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}  # metadata of another kind says nothing about classes


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
