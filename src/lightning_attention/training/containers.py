"""Texts that are not plain files: compressed ones, columns of parquet files, Hugging Face data sets."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from lightning_attention.training.encoding import NotTextError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
ARROW = ".arrow"
_BATCH_ROWS = 256


def unpacked(file: BinaryIO) -> BinaryIO:
    """A seekable file, decompressed where its first bytes are those of gzip, bzip2, xz or zstandard.

    What is returned has `read` and `seek(0)`; both raise NotTextError where the compressed bytes are damaged.
    """
    file.seek(0)
    head = file.read(6)
    file.seek(0)
    if head.startswith(b"\x1f\x8b"):
        return cast(BinaryIO, _Unpacked(gzip.GzipFile(fileobj=file), "gzip"))
    if head.startswith(b"BZh"):
        return cast(BinaryIO, _Unpacked(bz2.BZ2File(file), "bzip2"))
    if head.startswith(b"\xfd7zXZ\0"):
        return cast(BinaryIO, _Unpacked(lzma.LZMAFile(file), "xz"))
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return cast(BinaryIO, _Unpacked(_zstandard(file), "zstandard"))
    return file


def is_parquet(file: BinaryIO) -> bool:
    """Whether a seekable file's first bytes are those of parquet."""
    file.seek(0)
    return file.read(4) == b"PAR1"


def is_data_set(path: Path) -> bool:
    """Whether `save_to_disk` of Hugging Face's datasets wrote this folder."""
    is_file = os.path.isfile  # Path.is_file raises where the folder cannot be searched
    return is_file(path / "dataset_dict.json") or (is_file(path / "state.json") and is_file(path / "dataset_info.json"))


def parquet_texts(file: BinaryIO, field: str) -> Iterator[str | None]:
    """The column `field` of a parquet file, row by row. Raises NotTextError when it cannot be read."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise NotTextError("a parquet file, and reading it needs pyarrow: pip install pyarrow") from error
    try:
        table = parquet.ParquetFile(file)
        _require_text(field, {column.name: str(column.type) for column in table.schema_arrow})
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=[field]):
            yield from batch.column(0).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise NotTextError(f"a damaged parquet file: {_first_line(error)}") from error


def data_set_texts(path: Path, field: str) -> Iterator[str | None]:
    """The column `field` of a folder that `save_to_disk` wrote, or of an .arrow file. Raises NotTextError."""
    try:
        import datasets
    except ImportError as error:
        raise NotTextError("a Hugging Face data set, and reading it needs datasets: pip install datasets") from error
    try:
        rows: Any = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.Dataset.from_file(str(path))
    except Exception as error:  # pyarrow's, and datasets' own
        raise NotTextError(f"a damaged Hugging Face data set: {_first_line(error)}") from error
    if isinstance(rows, datasets.DatasetDict):
        folders = ", ".join(str(path / split) for split in rows)
        raise NotTextError(f"a Hugging Face data set of several splits; name one of their folders: {folders}")
    _require_text(field, {name: str(getattr(kind, "dtype", kind)) for name, kind in rows.features.items()})
    for batch in rows.select_columns([field]).iter(_BATCH_ROWS):
        yield from batch[field]


class _Unpacked:
    """A decompressing file whose errors say that the file is damaged, not that the disk is."""

    def __init__(self, file: Any, name: str) -> None:
        self._file, self._name = file, name

    def read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except (EOFError, OSError, zlib.error, lzma.LZMAError, _zstd_error()) as error:
            raise NotTextError(f"damaged {self._name}: {_first_line(error)}") from error

    def seek(self, offset: int) -> int:
        return self._file.seek(offset)


def _zstandard(file: BinaryIO) -> Any:
    zstd = _zstd()
    if zstd is None:
        raise NotTextError("compressed by zstandard, and reading it needs backports.zstd: pip install backports.zstd")
    # Long windows, as of `zstd --long=31`, are refused by default.
    return zstd.ZstdFile(file, options={zstd.DecompressionParameter.window_log_max: 31})


def _zstd() -> Any:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        return None
    return zstd


def _zstd_error() -> type[Exception]:
    zstd = _zstd()
    return zstd.ZstdError if zstd else EOFError


def _require_text(field: str, columns: dict[str, str]) -> None:
    if field not in columns:
        there = ", ".join(map(repr, columns))
        raise NotTextError(f"without a column {field!r} (--text-field): it has {there}")
    if "string" not in columns[field]:
        raise NotTextError(f"without text in its column {field!r}: it is of type {columns[field]}")


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
