"""A running request moves from one pool to another: by bytes, between types, and between head splits."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lightning_attention import decay, lightning_attention_decode, lightning_attention_prefill
from tests.support import ReferencePool, relative_error

H, D, E = 8, 6, 5
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@dataclass
class Server:
    """A pool cut by heads over some ranks; ``columns_first``: they store [S, H, E, D]."""

    ranks: int
    dtype: torch.dtype
    columns_first: bool = False

    def __post_init__(self) -> None:
        heads = H // self.ranks
        sizes = (heads, E, D) if self.columns_first else (heads, D, E)
        pools = [torch.randn(7, *sizes).to(self.dtype) for _ in range(self.ranks)]
        self.pools = [pool.mT if self.columns_first else pool for pool in pools]
        self.log_decay = decay.alibi(H).chunk(self.ranks)

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, slot: int) -> Tensor:
        where = {"cu_seqlens": torch.tensor([0, len(q)]), "slots": torch.tensor([slot]), "fresh": torch.tensor([True])}
        parts = zip(*(x.chunk(self.ranks, 1) for x in (q, k, v)), self.log_decay, self.pools, strict=True)
        return torch.cat([lightning_attention_prefill(*part, **where) for part in parts], 1)

    def decode(self, q: Tensor, k: Tensor, v: Tensor, slot: int) -> Tensor:
        parts = zip(*(x.chunk(self.ranks, 1) for x in (q, k, v)), self.log_decay, self.pools, strict=True)
        return torch.cat([lightning_attention_decode(*part, slots=torch.tensor([slot])) for part in parts], 1)

    def save(self, slot: int) -> bytes:
        """The row's heads one after another, whichever rank has them."""
        rows = [pool[slot].contiguous().view(torch.uint8).numpy().tobytes() for pool in self.pools]
        return b"".join(rows)

    def load(self, saved: bytes, dtype: torch.dtype, slot: int) -> None:
        row = torch.frombuffer(bytearray(saved), dtype=dtype).view(H, D, E)
        for pool, heads in zip(self.pools, row.chunk(self.ranks), strict=True):
            pool[slot] = heads.to(pool.dtype)


MOVES = [
    (Server(2, FP32), Server(4, FP32, True), 1e-6),
    (Server(4, FP32, True), Server(1, BF16), 6e-3),
    (Server(1, BF16), Server(8, FP32), 6e-3),
    (Server(2, FP16, True), Server(4, BF16), 6e-3),
]


@pytest.mark.parametrize(("origin", "target", "tolerance"), MOVES)
def test_a_running_request_moves(origin: Server, target: Server, tolerance: float):
    q, k, v = torch.randn(60, H, D), torch.randn(60, H, D), torch.randn(60, H, E)
    expected = ReferencePool(torch.zeros(1, H, D, E), decay.alibi(H)).prefill(q, k, v, [60], [0])
    out = [origin.prefill(q[:50], k[:50], v[:50], 3)]
    out += [origin.decode(q[t, None], k[t, None], v[t, None], 3) for t in range(50, 55)]
    others = [pool.clone() for pool in target.pools]
    target.load(origin.save(3), origin.dtype, 1)
    out += [target.decode(q[t, None], k[t, None], v[t, None], 1) for t in range(55, 60)]
    assert relative_error(torch.cat(out), expected) <= tolerance
    for pool, before in zip(target.pools, others, strict=True):
        assert torch.equal(pool[[0, 2, 3, 4, 5, 6]], before[[0, 2, 3, 4, 5, 6]])
        assert not torch.equal(pool[1], before[1])


def test_the_bytes_are_those_of_the_heads_in_order():
    """Where each number lies, whatever the split and however the pool lies: the layout that docs/serving.md gives."""
    whole, halves = Server(1, FP32), Server(2, FP32, True)
    whole.load(halves.save(2), FP32, 4)
    assert torch.equal(whole.pools[0][4], torch.cat([pool[2] for pool in halves.pools]))
    saved = whole.save(4)
    assert saved == halves.save(2)
    assert len(saved) == H * D * E * 4
    for h, d, e in ((0, 0, 0), (3, 2, 1), (7, 5, 4)):
        at = ((h * D + d) * E + e) * 4
        assert torch.frombuffer(bytearray(saved[at : at + 4]), dtype=FP32) == whole.pools[0][4, h, d, e]


def test_a_wrong_order_of_heads_is_noticed():
    origin, target = Server(2, FP32), Server(4, FP32)
    q, k, v = torch.randn(30, H, D), torch.randn(30, H, D), torch.randn(30, H, E)
    origin.prefill(q[:-1], k[:-1], v[:-1], 0)
    saved = origin.save(0)
    expected = origin.decode(q[-1:], k[-1:], v[-1:], 0)
    target.load(saved, FP32, 0)
    assert relative_error(target.decode(q[-1:], k[-1:], v[-1:], 0), expected) <= 1e-6
    target.load(saved[len(saved) // 2 :] + saved[: len(saved) // 2], FP32, 0)
    assert relative_error(target.decode(q[-1:], k[-1:], v[-1:], 0), expected) > 0.1
