import pytest
import torch

import lightning_attention as la
from lightning_attention import check
from lightning_attention.kernels.reference.attention import recurrence

CPU = torch.device("cpu")


def test_the_definition_is_the_recurrence():
    q, k, v = torch.randn(9, 2, 4), torch.randn(9, 2, 4), torch.randn(9, 2, 3)
    log_decay, state = torch.tensor([-0.5, 0.0]), torch.randn(2, 4, 3)
    out, last = check.definition(q, k, v, log_decay, state)
    want_out, want_last = recurrence(q[None], k[None], v[None], log_decay, state[None], None, 1.0)
    torch.testing.assert_close(out, want_out[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, want_last[0], rtol=1e-12, atol=1e-12)


def test_the_definition_of_no_tokens_is_the_state():
    empty, state = torch.zeros(0, 1, 4), torch.randn(1, 4, 4)
    out, last = check.definition(empty, empty, empty, torch.tensor([-1.0]), state)
    assert out.shape == (0, 1, 4)
    assert torch.equal(last, state.double())


def test_budgets_follow_the_precision_of_the_input():
    assert check.budget(torch.bfloat16, "output") == pytest.approx(1.25 * 2**-8)
    assert check.budget(torch.float16, "output") == pytest.approx(1.25 * 2**-11)
    assert check.budget(torch.float32, "output") == pytest.approx(32 * 2**-24)
    assert check.budget(torch.float32, "output") <= 2e-6
    assert check.budget(torch.float32, "gradient") <= 1e-5
    assert check.budget(torch.bfloat16, "output") <= 5e-3
    assert check.budget(torch.bfloat16, "state") <= 2e-3


def test_the_backends_of_a_cpu():
    found = check.backends(CPU)
    assert found["tiled"] is None
    assert found["reference"] is None
    assert found["triton"] == "it needs a CUDA or ROCm device, or Triton's interpreter (TRITON_INTERPRET=1)"


def test_everything_is_right_here():
    rows = list(check.check(CPU))
    assert [r for r in rows if not r.ok] == []
    kinds = {(r.backend, r.dtype) for r in rows}
    wide, bf16 = torch.float32, torch.bfloat16
    assert kinds == {("tiled", wide), ("tiled", bf16), ("reference", torch.float64)}
    whole = {"output", "final state", "gradients", "packed batch", "decay of −8"}
    assert {r.what for r in rows if r.backend == "reference"} == whole
    assert {r.what for r in rows if r.dtype == wide} == whole | {"decode", "prefill", "speculation", "rings"}
    assert all(r.error > 0 for r in rows)


def _rows(cases: dict[str, check.Case], dtype: torch.dtype) -> dict[str, check.Row]:
    return {r.what: r for r in check._rows(CPU, "tiled", dtype, cases)}


def _scaled_output(call):
    """Off by one per cent: below what a reader of the numbers would notice, far above rounding."""

    def broken(*args, **kwargs):
        result = call(*args, **kwargs)
        return result._replace(output=result.output * 1.01)

    return broken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_per_cent_off_is_found(dtype, monkeypatch):
    monkeypatch.setattr(la, "lightning_attention", _scaled_output(la.lightning_attention))
    rows = _rows(check.WHOLE, dtype)
    assert {what for what, row in rows.items() if not row.ok} >= {"output", "packed batch", "decay of −8"}
    assert rows["final state"].ok


def test_not_a_number_is_found(monkeypatch):
    right = la.lightning_attention

    def broken(*args, **kwargs):
        result = right(*args, **kwargs)
        return result._replace(final_state=result.final_state * float("nan"))

    monkeypatch.setattr(la, "lightning_attention", broken)
    row = _rows(check.WHOLE, torch.float32)["final state"]
    assert row.worst == "final_state"
    assert not row.ok


def test_a_wrong_gradient_is_found_and_named(monkeypatch):
    right = la.lightning_attention

    def broken(q, k, v, *args, **kwargs):
        return right(q, k, v + 0.001 * (v - v.detach()), *args, **kwargs)

    monkeypatch.setattr(la, "lightning_attention", broken)
    rows = _rows(check.WHOLE, torch.float32)
    assert rows["output"].ok
    assert not rows["gradients"].ok
    assert rows["gradients"].worst == "dv"


def test_a_backend_that_raises_is_a_row(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(la, "lightning_attention", broken)
    rows = _rows(check.WHOLE, torch.float32)
    assert {r.failure for r in rows.values()} == {"RuntimeError: no kernel image"}
    assert not any(r.ok for r in rows.values())


@pytest.mark.parametrize(
    ("name", "what"),
    [("decode", ["decode", "rings"]), ("prefill", ["prefill"]), ("verify", ["speculation"])],
)
def test_a_serving_operation_that_is_off_is_found(name, what, monkeypatch):
    operation = f"lightning_attention_{name}"
    right = getattr(la, operation)
    monkeypatch.setattr(la, operation, lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    rows = _rows(check.SERVING, torch.bfloat16)
    assert [w for w, row in rows.items() if not row.ok] == what


def test_a_commit_that_does_nothing_is_found(monkeypatch):
    monkeypatch.setattr(la, "lightning_attention_commit", lambda *args, **kwargs: None)
    row = _rows(check.SERVING, torch.float32)["speculation"]
    assert row.worst == "commit"
    assert not row.ok


def test_a_fold_that_does_nothing_is_found(monkeypatch):
    monkeypatch.setattr(la, "lightning_attention_fold", lambda *args, **kwargs: None)
    row = _rows(check.SERVING, torch.float32)["rings"]
    assert row.worst == "state"
    assert not row.ok


def test_a_verify_that_touches_the_state_is_found(monkeypatch):
    right = la.lightning_attention_verify

    def broken(q, k, v, log_decay, state, **kwargs):
        out = right(q, k, v, log_decay, state, **kwargs)
        state[1] *= 1.001
        return out

    monkeypatch.setattr(la, "lightning_attention_verify", broken)
    assert not _rows(check.SERVING, torch.float32)["speculation"].ok
