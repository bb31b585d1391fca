"""A prompt read in chunks, amid other sequences, by any backend's prefill."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.support.problem import Problem, cumulative


def read_in_chunks(
    prefill: Callable[..., Tensor], prompt: Problem, cuts: Sequence[int] = (), snapshot_at: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs [1, T, H, E], the last state [1, H, D, E], and the one after ``snapshot_at`` tokens of the first call.

    A call of ``prefill``, as a backend has it and batch_invariant, for each part of the prompt [1, T, H, *]; each call
    has other sequences beside it, longer and longer ones.
    """
    (_, T, H, D), E, device = prompt.q.shape, prompt.v.shape[3], prompt.q.device
    generator = torch.Generator().manual_seed(1)
    dtype = torch.promote_types(prompt.q.dtype, torch.float32)
    pool = torch.full((4, H, D, E), torch.nan, dtype=dtype, device=device)
    if prompt.initial_state is not None:
        pool[1] = prompt.initial_state[0]
    outputs = []
    for call, (start, stop) in enumerate(zip([0, *cuts], [*cuts, T], strict=True)):
        before, after = 7 + 70 * call, 1 + call

        def amid(x: Tensor, part: slice = slice(start, stop), before: int = before, after: int = after) -> Tensor:
            around = torch.randn(before + after, *x.shape[2:], generator=generator).to(x)
            return torch.cat([around[:before], x[0, part], around[before:]])

        def indices(*numbers: Any) -> Tensor:
            return torch.tensor(numbers, device=device)

        out = prefill(
            *(amid(x) for x in (prompt.q, prompt.k, prompt.v)), prompt.log_decay, pool,
            cumulative([before, stop - start, after]).to(device), indices(0, 1, 2),
            indices(True, call == 0 and prompt.initial_state is None, True), prompt.scale,
            indices([-1], [-1 if call else snapshot_at], [-1]), indices([-1], [3], [-1]), True,
        )  # fmt: skip
        outputs.append(out[None, before : before + stop - start])
    return torch.cat(outputs, 1), pool[1:2], pool[3:]
