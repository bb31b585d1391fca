"""The functions of OpenNLPLab's ``lightning_attn``, computed by this project's operations.

    from lightning_attention.integrations.lightning_attn import lightning_attn_func

in place of ``from lightning_attn.ops import lightning_attn_func``; the package need not be installed. Signatures and
layouts are those of its version 0.0.5: q and k are [B, H, T, D], v is [B, H, T, E], and the slopes s, [H, 1, 1], are
positive, a decay being exp(−s). There is no scale, and no state. docs/migrating.md has more.
"""

from torch import Tensor

from lightning_attention import decay
from lightning_attention.ops import validation
from lightning_attention.ops.attention import lightning_attention


def lightning_attn_func(q: Tensor, k: Tensor, v: Tensor, s: Tensor | None = None) -> Tensor:
    """o_t = Σ_{i≤t} exp(−s (t − i)) (q_t · k_i) v_i for each head; without slopes nothing decays.

    Args:
        q: [B, H, T, D], bfloat16, float16 or float32.
        k: [B, H, T, D], of q's dtype.
        v: [B, H, T, E], of q's dtype.
        s: [H, 1, 1] or [H], positive, of any floating-point dtype; read in float32.

    Returns:
        [B, H, T, E] in q's dtype, in memory [B, T, H, E].

    Raises:
        TypeError, ValueError: as ``lightning_attention``, of [B, T, H, ...] and of log_decay = −s.
    """
    for name, x, meaning in (("q", q, "[B, H, T, D]"), ("k", k, "[B, H, T, D]"), ("v", v, "[B, H, T, E]")):
        validation.check_rank(name, x, meaning)
    if s is not None:
        validation.check_floats("s", s)
        H = v.shape[1]
        if s.shape not in ((H,), (H, 1, 1)):
            raise ValueError(
                f"s has shape {list(s.shape)}; it must be [H, 1, 1] or [H], with H = {H}, one per head of v"
            )
    log_decay = None if s is None else -s.float().flatten()
    q, k, v = ((x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in (q, k, v))
    return lightning_attention(q, k, v, log_decay).output.transpose(1, 2)


def lightning_attn2(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """:func:`lightning_attn_func` with slopes."""
    return lightning_attn_func(q, k, v, s)


def lightning_attn2_no_decay(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """:func:`lightning_attn_func` without slopes."""
    return lightning_attn_func(q, k, v)


def _build_slope_tensor(n_attention_heads: int) -> Tensor:
    """The slopes of ALiBi, [H, 1, 1]: the negative of ``decay.alibi``."""
    return -decay.alibi(n_attention_heads)[:, None, None]
