"""Functions with the signatures of peers that need a GPU, which show that the arguments mean the same."""

from typing import Any

import torch
from torch import Tensor

from lightning_attention import lightning_attention


def _lightning_attn_fwd(
    Q: Tensor, K: Tensor, V: Tensor, decay: Tensor, scale: float = 1.0, initial_state: Tensor | None = None,
    output_final_state: bool = False, chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    assert not Q.requires_grad  # what exports tensors to a compiled function refuses these
    assert initial_state is None
    assert not output_final_state
    return lightning_attention(Q, K, V, -decay, scale=scale).output, None


def _lightning_attn_fwd_varlen(
    Q: Tensor, K: Tensor, V: Tensor, decay: Tensor, cu_seqlens: Tensor, scale: float = 1.0,
    state_pool: Tensor | None = None, initial_state_indices: Tensor | None = None, chunk_size: int = 64,
    persistent: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    assert not Q.requires_grad
    assert cu_seqlens.dtype == torch.int32
    if state_pool is None or initial_state_indices is None:
        return lightning_attention(Q, K, V, -decay, scale=scale, cu_seqlens=cu_seqlens).output, None
    assert state_pool.is_contiguous()
    assert initial_state_indices.dtype == torch.int32
    slots = initial_state_indices.long()
    out, final = lightning_attention(
        Q, K, V, -decay, scale=scale, initial_state=state_pool[slots].mT, cu_seqlens=cu_seqlens, output_final_state=True
    )
    assert final is not None
    state_pool[slots] = final.mT
    return out, state_pool


def _linear_attention_decode(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, out: Tensor, softmax_scale: float, stride_q: int, stride_k: int,
    stride_v: int, stride_s: int, stride_o: int, s_offsets: Tensor, decay_scales: Tensor, HEAD_DIM: int,
    K_SPLIT_DIM: int, V_SPLIT_DIM: int,
) -> None:  # fmt: skip
    assert HEAD_DIM == K_SPLIT_DIM == V_SPLIT_DIM == q.shape[2]
    assert s_offsets.dtype == torch.int32
    states = s.view(-1, q.shape[1], HEAD_DIM, HEAD_DIM)  # a row a head of a sequence, [V, K]
    slots = s_offsets.long()
    new = states[slots] * torch.exp(-decay_scales)[:, None, None] + v[..., None] * k[..., None, :]
    states[slots] = new
    out.copy_((new @ (softmax_scale * q)[..., None])[..., 0])


def _linear_attention_verify_kvbuffer(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, out: Tensor, decay_scales: Tensor, h0_indices: Tensor,
    softmax_scale: float, T: int, k_buf: Tensor | None = None, v_buf: Tensor | None = None,
) -> None:  # fmt: skip
    assert {x.dtype for x in (q, k, v, s, out)} == {torch.float32}
    assert h0_indices.dtype == torch.int32
    assert q.shape[1] == T
    slots = h0_indices.long()
    out.copy_(lightning_attention(q, k, v, -decay_scales, scale=softmax_scale, initial_state=s[slots].mT).output)
    if k_buf is not None and v_buf is not None:
        k_buf[slots], v_buf[slots] = k, v


def _linear_attention_state_update_kvbuffer(
    k_buf: Tensor, v_buf: Tensor, s: Tensor, decay_scales: Tensor, h0_indices: Tensor, accepted_len: Tensor, T: int
) -> None:
    assert accepted_len.dtype == h0_indices.dtype == torch.int32
    assert k_buf.shape[:2] == (s.shape[0], T)
    for slot, accepted in zip(h0_indices.tolist(), accepted_len.tolist(), strict=True):
        for i in range(accepted):
            s[slot] = (
                s[slot] * torch.exp(-decay_scales)[:, None, None] + v_buf[slot, i, :, :, None] * k_buf[slot, i, :, None]
            )


#: Of ``cula.lightning``.
CULA: dict[str, Any] = {
    "lightning_attn_fwd": _lightning_attn_fwd, "lightning_attn_fwd_varlen": _lightning_attn_fwd_varlen,
    "linear_attention_decode": _linear_attention_decode,
    "linear_attention_verify_kvbuffer": _linear_attention_verify_kvbuffer,
    "linear_attention_state_update_kvbuffer": _linear_attention_state_update_kvbuffer,
}  # fmt: skip
