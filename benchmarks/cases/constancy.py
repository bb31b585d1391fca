"""Time per token from T = 2,048 to 1,048,576 at equal B·T; of ours alone unless peers are named.

fla tunes itself for minutes before its first call at 1,048,576 tokens; the figure with peers is that of ``lengths``.
"""

from functools import partial

import torch

from lightning_attention.bench.case import Case
from lightning_attention.bench.lengths import Sweep, doublings, show, sweep
from lightning_attention.bench.peers import ATTENTION

SCALES = {
    "cuda": Sweep(doublings(2048, 1 << 20), 16, 128, torch.bfloat16, tokens=1 << 20, limit_s=0.5, seconds=0.3),
    "cpu": Sweep(doublings(512, 16_384), 4, 64, torch.float32, tokens=16_384, limit_s=1, seconds=0.4),
}

MEASURE, SHOW = partial(sweep, suite="constancy"), partial(show, suite="constancy")
CASE = Case(MEASURE, SHOW, SCALES, operations=(ATTENTION,), backends=True)
