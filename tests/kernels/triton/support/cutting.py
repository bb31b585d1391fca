"""What is cut where is the launch table's business: tests of the kernels say it themselves."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch


def chunk_of(dtype: torch.dtype) -> int:
    """Rows of a segment where calls are batch_invariant: two blocks or more."""
    return 32 if dtype == torch.float32 else 128


@contextmanager
def cutting(segments: bool, dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Every sequence is cut into segments of two pieces, a block each, or none is; ``dtype``: see ``chunk_of``."""
    # A process may have to choose the interpreter before it imports Triton.
    from lightning_attention.kernels.triton import plan, tiling

    def segment_rows(programs: int, T: int, C: int, resident_programs: int) -> int:
        return 2 * C if segments else -(-T // C) * C

    def piece_rows(rows: int, width: int) -> int:
        return rows // 2 if segments else rows

    sizes = patch.multiple(tiling, segment_rows=segment_rows, piece_rows=piece_rows)
    with sizes, patch.object(plan, "INVARIANT_CHUNK", chunk_of(dtype) if segments else 1 << 20):
        yield
