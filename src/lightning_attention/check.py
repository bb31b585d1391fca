"""Whether the operations give the right numbers here: every device and backend against the definition in float64."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import lightning_attention as la
from lightning_attention.ops.backends import BACKENDS, choose

#: Error budgets in units of the input type's unit roundoff u = eps / 2 (bfloat16 3.9e-3, float16 4.9e-4, float32 6e-8).
#:
#: 16-bit inputs are exact in the reference too, and sums are float32, so what is left are the roundings of a number
#: to the type, each 0.42 u in the root mean square: of the product Q Kᵀ ⊙ M, of the decayed operand or state, and of
#: the result. Three independent ones make 0.72 u; the budget is 1.25 u. States see the decayed operand alone: 0.5 u.
#: float32 and float64 have no such roundings but those of the sums: two chained ones of 64 products each grow like
#: 2 √64 = 16 u, the budget is 32 u; gradients chain up to three and the scan of the states twice: 128 u.
#: The gradient of log_decay sums signed terms over all tokens, which cancel: four times the others.
BUDGETS = {
    torch.bfloat16: {"output": 1.25, "state": 0.5, "gradient": 1.25, "decay gradient": 5.0},
    torch.float16: {"output": 1.25, "state": 0.5, "gradient": 1.25, "decay gradient": 5.0},
    torch.float32: {"output": 32.0, "state": 32.0, "gradient": 128.0, "decay gradient": 512.0},
    torch.float64: {"output": 32.0, "state": 32.0, "gradient": 128.0, "decay gradient": 512.0},
}


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖ in the Frobenius norm, computed in float64."""
    wanted = wanted.double()
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def budget(dtype: torch.dtype, kind: str) -> float:
    """The largest relative Frobenius error allowed for inputs of the type."""
    return BUDGETS[dtype][kind] * torch.finfo(dtype).eps / 2


@dataclass(frozen=True)
class Row:
    """One line of the table: the worst of the quantities in ``what``, each against its own budget."""

    device: str
    backend: str
    dtype: torch.dtype
    what: str
    worst: str
    error: float
    budget: float
    failure: str | None = None

    @property
    def ok(self) -> bool:
        return self.failure is None and self.error <= self.budget  # False for a NaN


#: name, kind of budget, what came, what is wanted in float64
Quantity = tuple[str, str, Tensor, Tensor]
Case = Callable[[torch.device, torch.dtype, str], list[Quantity]]


def definition(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence, q, k [T, H, D] and v [T, H, E], from the state [H, D, E]: outputs and the last state, in float64.

    Written from the sum, o_t = q_t (λ^t S_0 + Σ_{s≤t} λ^(t−s) k_sᵀ v_s), with nothing shared with the backends.
    """
    q, k, v, rate, state = (x.double() for x in (q, k, v, log_decay, state))
    T = q.shape[0]
    t = torch.arange(T, device=q.device)
    gap = t[:, None] - t
    mask = torch.where(gap >= 0, torch.exp(rate[:, None, None] * gap.clamp(min=0)), 0)
    out = torch.einsum("hts,she->the", torch.einsum("thd,shd->hts", q, k) * mask, v)
    out = out + torch.exp(rate * (t[:, None] + 1))[..., None] * torch.einsum("thd,hde->the", q, state)
    to_end = torch.exp(rate * (T - 1 - t[:, None]))
    last = torch.exp(rate * T)[:, None, None] * state + torch.einsum("th,thd,the->hde", to_end, k, v)
    return out, last


class _Inputs:
    """Random normal inputs of N sequences, packed, the same on every device."""

    H, D, E = 4, 64, 48

    def __init__(self, lengths: list[int], device: torch.device, dtype: torch.dtype, log_decay: Tensor | None = None):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

        T, H, D, E = sum(lengths), self.H, self.D, self.E
        self.lengths = lengths
        self.cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0)
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.q, self.k, self.v, self.dout = (draw(T, H, X).to(device, dtype) for X in (D, D, E, E))
        self.state, self.dstate = (draw(len(lengths), H, D, E).to(device, self.wide) for _ in range(2))
        rate = la.decay.alibi(H) if log_decay is None else log_decay
        self.log_decay = rate.to(device, self.wide)

    def wanted(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The definition, sequence by sequence: [T, H, E] and [N, H, D, E]."""
        parts = zip(*(x.split(self.lengths) for x in (q, k, v)), state, strict=True)
        outs, lasts = zip(*(definition(a, b, c, log_decay, s) for a, b, c, s in parts), strict=True)
        return torch.cat(outs), torch.stack(lasts)


def _all_quantities(inputs: _Inputs, backend: str, packed: bool) -> list[Quantity]:
    """Output, last state and the five gradients, called packed or as a dense batch of equal lengths."""
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.log_decay, inputs.state)]
    q, k, v, log_decay, state = leaves
    N = len(inputs.lengths)
    q, k, v, dout = (x.unflatten(0, (1 if packed else N, -1)) for x in (q, k, v, inputs.dout))
    cu_seqlens = inputs.cu_seqlens if packed else None
    out, last = la.lightning_attention(
        q, k, v, log_decay, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens, backend=backend
    )
    assert last is not None
    grads = torch.autograd.grad((out, last), leaves, (dout, inputs.dstate))

    exact = [x.detach().double().requires_grad_() for x in leaves]
    want_out, want_last = inputs.wanted(*exact)
    want_grads = torch.autograd.grad((want_out, want_last), exact, (inputs.dout.double(), inputs.dstate.double()))

    names = (("dq", "gradient"), ("dk", "gradient"), ("dv", "gradient"),
             ("dlog_decay", "decay gradient"), ("dstate", "gradient"))  # fmt: skip
    return [
        ("output", "output", out.flatten(0, 1), want_out),
        ("final_state", "state", last, want_last),
        *((name, kind, g, w) for (name, kind), g, w in zip(names, grads, want_grads, strict=True)),
    ]


def _dense(device: torch.device, dtype: torch.dtype, backend: str) -> list[Quantity]:
    return _all_quantities(_Inputs([193, 193], device, dtype), backend, packed=False)


def _packed(device: torch.device, dtype: torch.dtype, backend: str) -> list[Quantity]:
    return _all_quantities(_Inputs([1, 65, 0, 130, 64], device, dtype), backend, packed=True)


def _strong_decay(device: torch.device, dtype: torch.dtype, backend: str) -> list[Quantity]:
    """λ = 3e-4, at lengths around the blocks': an implementation that divides by decays overflows here."""
    found = []
    for T in (1, 2, 63, 64, 65, 127, 129):
        inputs = _Inputs([T], device, dtype, torch.full((_Inputs.H,), -8.0, device="cpu"))
        for name, kind, got, wanted in _all_quantities(inputs, backend, packed=False):
            if name != "dlog_decay":  # of the size of λ itself: zero but for rounding
                found.append((f"{name}, T = {T}", kind, got, wanted))
    return found


def _pool(inputs: _Inputs) -> tuple[Tensor, Tensor]:
    """A pool with a row more than there are sequences, and the slot of each, last to first."""
    N = len(inputs.lengths)
    slots = torch.arange(N, 0, -1, device=inputs.state.device)
    pool = inputs.state.new_zeros(N + 1, *inputs.state.shape[1:])
    pool[slots] = inputs.state
    return pool, slots


def _decode(device: torch.device, dtype: torch.dtype, backend: str) -> list[Quantity]:  # noqa: ARG001
    x = _Inputs([1, 1, 1, 1, 1], device, dtype)
    pool, slots = _pool(x)
    wanted, last = x.wanted(x.q, x.k, x.v, x.log_decay, x.state)
    out = la.lightning_attention_decode(x.q, x.k, x.v, x.log_decay, pool, slots=slots)
    return [("output", "output", out, wanted), ("state", "state", pool[slots], last)]


def _prefill(device: torch.device, dtype: torch.dtype, backend: str) -> list[Quantity]:  # noqa: ARG001
    x = _Inputs([1, 65, 130, 1], device, dtype)
    pool, slots = _pool(x)
    wanted, last = x.wanted(x.q, x.k, x.v, x.log_decay, x.state)
    out = la.lightning_attention_prefill(x.q, x.k, x.v, x.log_decay, pool, cu_seqlens=x.cu_seqlens, slots=slots)
    return [("output", "output", out, wanted), ("state", "state", pool[slots], last)]


def _speculation(device: torch.device, dtype: torch.dtype, backend: str) -> list[Quantity]:  # noqa: ARG001
    """Drafts verified, the state still as it was, then all but the last of each sequence committed."""
    x = _Inputs([4, 1, 7], device, dtype)
    pool, slots = _pool(x)
    before = pool.clone()
    wanted, _ = x.wanted(x.q, x.k, x.v, x.log_decay, x.state)
    out = la.lightning_attention_verify(x.q, x.k, x.v, x.log_decay, pool, cu_seqlens=x.cu_seqlens, slots=slots)
    untouched = pool.clone()

    accepted = torch.ones(x.q.shape[0], dtype=torch.bool, device=device)
    accepted[x.cu_seqlens[1:] - 1] = False
    la.lightning_attention_commit(x.k, x.v, x.log_decay, pool, cu_seqlens=x.cu_seqlens, accepted=accepted, slots=slots)
    sequences = zip(*(y.split(x.lengths) for y in (x.q, x.k, x.v)), x.state, strict=True)
    lasts = [definition(q[:-1], k[:-1], v[:-1], x.log_decay, state)[1] for q, k, v, state in sequences]
    return [
        ("verify", "output", out, wanted),
        ("state after verify", "state", untouched, before),
        ("commit", "state", pool[slots], torch.stack(lasts)),
    ]


def _rings(device: torch.device, dtype: torch.dtype, backend: str) -> list[Quantity]:  # noqa: ARG001
    """Decoding with rings of recent tokens, for more than two turns of them, and the states they are folded into."""
    x = _Inputs([21, 21], device, dtype)
    pool, slots = _pool(x)
    S, H, D, E = pool.shape
    recent = la.RecentTokens.empty(S, H, D, E, 8, dtype, device)
    wanted, last = x.wanted(x.q, x.k, x.v, x.log_decay, x.state)
    q, k, v = (y.unflatten(0, (2, 21)) for y in (x.q, x.k, x.v))
    steps = [
        la.lightning_attention_decode(q[:, t], k[:, t], v[:, t], x.log_decay, pool, slots=slots, recent=recent)
        for t in range(21)
    ]
    la.lightning_attention_fold(pool, recent, x.log_decay, slots=slots)
    out = torch.stack(steps, 1).flatten(0, 1)
    return [("output", "output", out, wanted), ("state", "state", pool[slots], last)]


#: The dense case has three rows, of these quantities.
PARTS = {
    "output": ("output",),
    "final state": ("final_state",),
    "gradients": ("dq", "dk", "dv", "dlog_decay", "dstate"),
}
WHOLE: dict[str, Case] = {
    "dense": _dense,
    "packed batch": _packed,
    "decay of −8": _strong_decay,
}
SERVING: dict[str, Case] = {
    "decode": _decode,
    "prefill": _prefill,
    "speculation": _speculation,
    "rings": _rings,
}


def devices() -> list[torch.device]:
    """The CPU, and the GPU where there is one."""
    return [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()


def backends(device: torch.device) -> dict[str, str | None]:
    """Every backend's name, and why the device does not have it, or None if it does."""
    found: dict[str, str | None] = {}
    for name in BACKENDS:
        try:
            choose(name, device)
            found[name] = None
        except ValueError as error:
            found[name] = str(error).rpartition("; ")[2].rpartition(", but ")[2]
    return found


def _row(device: torch.device, backend: str, dtype: torch.dtype, what: str, quantities: list[Quantity]) -> Row:
    """The quantity that takes up most of its budget."""
    measured = [(relative_error(got, wanted), budget(dtype, kind), name) for name, kind, got, wanted in quantities]
    # A NaN compares as neither larger nor smaller: it has to be looked for.
    error, allowed, name = max(measured, key=lambda m: float("inf") if m[0] != m[0] else m[0] / m[1])
    return Row(device.type, backend, dtype, what, name, error, allowed)


def _rows(device: torch.device, backend: str, dtype: torch.dtype, cases: dict[str, Case]) -> Iterator[Row]:
    for what, case in cases.items():
        try:
            quantities = case(device, dtype, backend)
        except Exception as error:  # a backend that cannot run is what this is here to find
            failure = f"{type(error).__name__}: {error}"
            yield Row(device.type, backend, dtype, what, "", float("nan"), float("nan"), failure)
            continue
        if case is _dense:
            for part, names in PARTS.items():
                yield _row(device, backend, dtype, part, [x for x in quantities if x[0] in names])
        else:
            yield _row(device, backend, dtype, what, quantities)


def check(device: torch.device) -> Iterator[Row]:
    """Every available backend of the device, in every input type it is made for; then the serving operations."""
    for backend, missing in backends(device).items():
        if missing is not None:
            continue
        types = [torch.float64] if backend == "reference" else [torch.float32, torch.bfloat16]
        if backend == "triton":
            types.append(torch.float16)
        for dtype in types:
            yield from _rows(device, backend, dtype, WHOLE)
    for dtype in (torch.float32, torch.bfloat16):
        yield from _rows(device, choose(None, device), dtype, SERVING)
