"""Values wider than 256 channels, as RetNet's with keys of 256: whatever has a limit there takes them in parts."""

from typing import Any

import torch

from tests.kernels.triton.support.interpreter import Interpreter, interpreted
from tests.support import cumulative, make_problem, misses, relative_error

pytestmark = interpreted
D, E = 256, 512


def test_sequences_and_their_gradients(interpreter: Interpreter):
    """That of log_decay too, which is a sum over the parts."""
    problem = make_problem(lengths=[20, 0, 13], padding=3, H=1, D=D, E=E, dtype=torch.float16)
    run = interpreter.solve(problem)
    assert not misses(run.solution, problem)


def _serve(backend: str, q: Any, k: Any, v: Any, log_decay: Any, state: Any, cu_seqlens: Any) -> list[torch.Tensor]:
    """Outputs and the pool: prefill, verify, commit of all drafts, decode."""
    from lightning_attention.ops.backends import get

    run, N = get(backend), len(cu_seqlens) - 1
    packed = q, k, v, log_decay, state, cu_seqlens, None
    out = [
        run.prefill(*packed, None, 0.5, None, None, False, None),
        run.verify(*packed, None, 0.5, None, None, None),
    ]
    run.commit(k, v, log_decay, state, cu_seqlens, torch.ones(len(k), dtype=torch.bool), None)
    return [*out, run.decode(q[:N], k[:N], v[:N], log_decay, state, None, 0.5, False, None), state]


def test_serving(interpreter: Interpreter):
    call = [torch.randn(19, 1, size) for size in (D, D, E)]
    call += [torch.tensor([-0.1]), torch.randn(2, 1, D, E), cumulative([18, 1])]
    got = interpreter.call(_serve, "triton", *call)
    wanted = _serve("tiled", *(x.double() if x.is_floating_point() else x for x in call))
    assert [relative_error(a, b) <= 2e-6 for a, b in zip(got, wanted, strict=True)] == [True] * 4
