import pytest
import torch

from lightning_attention.bench.attention import BACKWARD, BOTH, FORWARD, Problem, Shape, measure
from lightning_attention.bench.peers import ATTENTION, Peer, ours
from lightning_attention.kernels.reference.attention import recurrence


@pytest.mark.parametrize("pass_", [FORWARD, BACKWARD, BOTH])
def test_calls_compute_what_their_pass_says(pass_, cpu):
    problem = Problem(Shape(1, 70, 2, 16), torch.float64, cpu)
    found = problem.call(ours("reference"), pass_)()
    q, k, v, do = problem.tensors
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, _ = recurrence(*leaves, problem.log_decay, None, None, 1.0)
    got, wanted = ([found], [out]) if pass_ == FORWARD else (list(found), torch.autograd.grad(out, leaves, do))
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_an_implementation_that_fails_is_a_record(cpu):
    def load():
        return lambda q, k, v, log_decay: torch.linalg.inv(q)

    found = measure([Peer("bad", "bad", "none", {ATTENTION: load})], Problem(Shape(1, 8, 1, 4), torch.float32, cpu),
                    FORWARD, seconds=0.01)  # fmt: skip
    assert list(found["bad"]) == ["error"]
    assert "must be batches of square matrices" in found["bad"]["error"]
