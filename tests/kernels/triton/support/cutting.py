"""What is cut where is the launch table's business: tests of the kernels say it themselves."""

from typing import Any
from unittest.mock import patch


def cutting(segments: bool) -> Any:
    """Every sequence is cut into segments of two pieces, a block each, or none is."""
    from lightning_attention.kernels.triton import tiling  # a process may have to choose the interpreter before Triton

    def segment_rows(programs: int, T: int, C: int, resident_programs: int) -> int:
        return 2 * C if segments else -(-T // C) * C

    def piece_rows(rows: int, width: int) -> int:
        return rows // 2 if segments else rows

    return patch.multiple(tiling, segment_rows=segment_rows, piece_rows=piece_rows)
