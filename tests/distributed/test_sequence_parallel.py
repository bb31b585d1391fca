"""Each rank's results against the float64 recurrence over the whole sequence, on 1 to 4 gloo processes."""

import random
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from lightning_attention import decay, lightning_attention
from lightning_attention.distributed.sequence_parallel import Ranks
from lightning_attention.ops.sequence_parallel import sequence_parallel, sequence_parallel_backward
from tests.distributed.ranks import run_cases, spawn

DOCS = Path(__file__).parents[2] / "docs" / "distributed.md"
RANKS = 4  # the example's too
TOLERANCE = 1e-5  # of the largest value: float32 sums over some hundred tokens
ROUNDED = 2**-8  # bfloat16 results are rounded once
WRONG = 1e-2


@dataclass(frozen=True)
class Case:
    """lengths[r] is rank r's T, or with cu_seqlens a list of the tokens that it has of each sequence."""

    lengths: tuple
    log_decay: tuple | None
    B: int = 1
    D: int = 8
    E: int = 8
    Hk: int | None = None  # of q and k, where it is not that of v
    scale: float = 1.0
    initial: bool = True
    final: bool = True
    decay_grad: bool = True
    partial_loss: bool = False  # the first rank's loss leaves out the final state, the last rank's the output
    batch_invariant: bool = False
    backend: str = "tiled"
    dtype: str = "float32"
    autocast: bool = False  # from float32 to dtype
    padding: int = 0
    compiled: bool = False
    break_with: str = ""

    @property
    def packed(self) -> bool:
        return isinstance(self.lengths[0], tuple)


MILD = (-0.02, -0.4, 0.0)
CASES = [
    Case((130,), MILD),
    Case((64, 64), MILD, B=2),
    Case((5, 131), MILD),
    Case((131, 1), MILD, initial=False, final=False),
    Case((3, 70, 64), MILD, B=2, scale=0.35),
    Case((40, 0, 30, 129), MILD),
    Case((7, 9, 5, 11), (-8.0, -0.3, -1e-4)),
    Case((50, 60, 70, 80), (-8.0, -2.0, -31.0), scale=2.0),
    Case((65, 66, 67), None, D=5, E=12),
    Case((20, 30, 40, 500), (-0.001, -0.003), initial=False),
    Case((20, 30), MILD, decay_grad=False, final=False, batch_invariant=True),
    Case((20, 30), MILD, backend="reference", dtype="float64"),
    Case(((20, 0, 70), (3, 65, 0)), MILD, padding=5),
    Case((20, 30, 40), MILD, partial_loss=True),
    Case((20, 30, 40), MILD, Hk=1),
    Case((5, 0, 7), (float("-inf"), -0.1)),
    Case((70, 80), MILD, dtype="bfloat16"),
    Case((70, 80), MILD, dtype="bfloat16", autocast=True),
    # A stream of three sequences cut into four: the second crosses three ranks.
    Case(((40, 3, 0), (0, 50, 0), (0, 65, 2), (0, 0, 30)), MILD),
    Case(((9, 4), (0, 0), (8, 70)), (-8.0, 0.0, -0.1), backend="reference", padding=2, final=False),
]
COMPILED = [
    Case((30, 40), MILD, compiled=True),
    Case(((30, 9), (0, 40)), MILD, compiled=True, initial=False, final=False),
]
BROKEN = [
    Case((30, 20, 10), (-0.05, -0.02), break_with="no decay over the lengths"),
    Case((30, 20, 10), (-0.05, -0.02), break_with="equal lengths"),
    Case((30, 20, 10), (-0.05, -0.02), break_with="no exchange"),
]


def drawn(seed: int) -> Case:
    draw = random.Random(seed)
    ranks, packed = draw.randint(1, RANKS), draw.random() < 0.4
    B, lengths = draw.randint(1, 3), tuple(draw.choice((0, 1, 17, 63, 64, 65, 90, 200)) for _ in range(RANKS * 3))
    return Case(
        lengths=tuple(lengths[r * B : r * B + B] for r in range(ranks)) if packed else lengths[:ranks],
        log_decay=draw.choice((None, tuple(-(10 ** draw.uniform(-4, 1)) for _ in range(draw.randint(1, 3))))),
        B=1 if packed else B,
        D=draw.randint(1, 17),
        E=draw.randint(1, 17),
        scale=draw.choice((1.0, 0.25)),
        initial=draw.random() < 0.5,
        final=draw.random() < 0.5,
        padding=draw.choice((0, 3)) if packed else 0,
        batch_invariant=draw.random() < 0.3,
    )


CASES += [drawn(seed) for seed in range(8)]


def tokens(case: Case, rank: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The rank's tokens as places in the whole batch, the rank's cu_seqlens, and the whole batch's."""
    if not case.packed:
        start = sum(case.lengths[:rank])
        return torch.arange(start, start + case.lengths[rank]), None, None
    lengths = torch.tensor(case.lengths)
    whole = torch.cat([torch.zeros(1, dtype=torch.long), lengths.sum(0).cumsum(0)])
    starts = whole[:-1] + lengths[:rank].sum(0)
    places = [torch.arange(s, s + n) for s, n in zip(starts.tolist(), lengths[rank].tolist(), strict=True)]
    own = torch.cat([torch.zeros(1, dtype=torch.long), lengths[rank].cumsum(0)])
    return torch.cat(places), own.int(), whole


def whole_sequence(case: Case, data: dict[str, torch.Tensor], cu_seqlens: torch.Tensor | None) -> dict:
    """The float64 recurrence over everything; the loss is the sum of the ranks' losses."""
    leaf = {name: x.double().clone().requires_grad_() for name, x in data.items()}
    out, final = lightning_attention(
        leaf["q"], leaf["k"], leaf["v"], leaf.get("log_decay"), scale=case.scale,
        initial_state=leaf.get("initial_state"), output_final_state=True, cu_seqlens=cu_seqlens, backend="reference",
    )  # fmt: skip
    loss = (out * data["dout"]).sum() + (final * data["dfinal"].sum(0)).sum() * case.final
    loss.backward()
    return {"output": out, "final_state": final} | {"d" + name: x.grad for name, x in leaf.items()}


def run_case(case: Case, seed: int, rank: int, group: dist.ProcessGroup) -> dict[str, float]:
    """The largest error of each result over the group's ranks, relative to the result's largest value."""
    dtype = getattr(torch, case.dtype)
    state_dtype = torch.promote_types(dtype, torch.float32)
    places, cu_seqlens, whole = tokens(case, rank)
    T = sum(map(sum, case.lengths)) if case.packed else sum(case.lengths)
    N, H = (len(case.lengths[0]) if case.packed else case.B), len(case.log_decay or (0, 0))
    torch.manual_seed(seed)
    sizes = {"q": case.D, "k": case.D, "v": case.E, "dout": case.E}
    heads = {"q": case.Hk or H, "k": case.Hk or H, "v": H, "dout": H}
    data = {name: torch.randn(case.B, T, heads[name], size, dtype=dtype) for name, size in sizes.items()}
    data["dfinal"] = torch.randn(len(case.lengths), N, H, case.D, case.E, dtype=state_dtype)
    if case.initial:
        data["initial_state"] = torch.randn(N, H, case.D, case.E, dtype=state_dtype)
    if case.log_decay is not None:
        data["log_decay"] = torch.tensor(case.log_decay, dtype=state_dtype)
    use_output, use_final = True, case.final
    if case.partial_loss:
        use_output, use_final = rank < len(case.lengths) - 1, rank > 0
        data["dout"][:, tokens(case, len(case.lengths) - 1)[0]] = 0
        data["dfinal"][0] = 0
    expected = whole_sequence(case, data, whole)

    # Padding after the last sequence must not be read.
    fill = torch.full((case.B, case.padding, 1, 1), torch.nan, dtype=dtype)
    own = {
        name: torch.cat([data[name][:, places], fill.expand(-1, -1, heads[name], size)], 1)
        .to(torch.float32 if case.autocast else dtype)
        .requires_grad_()
        for name, size in sizes.items()
    }
    own |= {name: data[name].clone().requires_grad_() for name in ("log_decay", "initial_state") if name in data}
    if not case.decay_grad:
        own["log_decay"].requires_grad_(False)

    def attend(q, k, v, log_decay, initial_state):
        return lightning_attention(
            q, k, v, log_decay, scale=case.scale, initial_state=initial_state, output_final_state=case.final,
            cu_seqlens=cu_seqlens, group=group, batch_invariant=case.batch_invariant, backend=case.backend,
        )  # fmt: skip

    call = torch.compile(attend, fullgraph=True, backend="aot_eager") if case.compiled else attend
    real, sent = Ranks.gather, []

    def gather(ranks, message, gathered, **options):
        sent.append(message.numel())
        wait = real(ranks, message, gathered, **options)

        def broken():
            wait()
            every = gathered.view(ranks.size, *message.shape)
            if case.break_with == "no exchange":
                every[:] = message
            if message.dim() == 1:  # states and lengths, forward
                if case.break_with == "no decay over the lengths":
                    every[:, -N:] = 0
                if case.break_with == "equal lengths":
                    every[:, -N:] = message[-N:]

        return broken

    watched = mock.patch.object(Ranks, "gather", gather)
    autocast = torch.autocast("cpu", dtype, enabled=case.autocast)
    with autocast, nullcontext() if case.compiled else watched:  # the mocks are not for the compiler to trace
        out, final = call(own["q"], own["k"], own["v"], own.get("log_decay"), own.get("initial_state"))
        T_own = places.numel()
        assert out.dtype == dtype
        assert (final is not None) == case.final
        loss = torch.zeros(())
        if use_output:
            loss = loss + (out[:, :T_own] * data["dout"][:, places]).sum()
        if use_final:
            loss = loss + (final * data["dfinal"][rank]).sum()
        loss.backward()
    state = N * H * case.D * case.E
    if not case.compiled:
        assert sent == [state + N, state * (1 + case.final)], sent

    assert not out[:, T_own:].any()
    found = {"output": (out[:, :T_own], expected["output"][:, places])}
    if case.final:
        found["final_state"] = (final, expected["final_state"])
        everywhere = [torch.empty_like(final) for _ in case.lengths]
        dist.all_gather(everywhere, final.detach(), group=group)
        assert all(torch.equal(final, other) for other in everywhere) or case.break_with
    for name in ("q", "k", "v"):
        assert not own[name].grad[:, T_own:].any()
        found["d" + name] = (own[name].grad[:, :T_own], expected["d" + name][:, places])
    for name in ("log_decay", "initial_state"):
        if name in own and own[name].requires_grad:
            total = own[name].grad.clone()
            dist.all_reduce(total, group=group)
            found["d" + name] = (total, expected["d" + name])
    worst = torch.stack([_error(x, expected[name], wanted) for name, (x, wanted) in found.items()])
    dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=group)
    return dict(zip(found, worst.tolist(), strict=True))


def _error(x: torch.Tensor, whole: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    if not x.isfinite().all():
        return torch.tensor(torch.inf, dtype=torch.double)
    largest = whole.abs().max().clamp(min=1) if whole.numel() else 1
    return (x.double() - wanted).abs().max() / largest if x.numel() else torch.zeros((), dtype=torch.double)


def work(rank: int, ranks: int, cases: list[Case], folder: str) -> None:
    run_cases(rank, ranks, cases, folder, run_case)
    if ranks == RANKS:
        example = DOCS.read_text().split("```python\n")[1].split("```")[0]
        names: dict = {}
        exec(example, names)
        assert names["error"] < TOLERANCE
    else:
        dist.destroy_process_group()  # the example does so too


def failures(results: list[tuple[Case, dict[str, float]]]) -> list[tuple[Case, dict[str, float]]]:
    def budget(case: Case, name: str) -> float:
        rounded = case.dtype == "bfloat16" and name in ("output", "dq", "dk", "dv")  # states and decays never are
        return ROUNDED if rounded else TOLERANCE

    return [(case, errors) for case, errors in results if any(e > budget(case, name) for name, e in errors.items())]


def test_slices_of_a_sequence_agree_with_the_whole(tmp_path):
    """And the example in the documentation runs."""
    results = spawn(work, CASES + BROKEN, tmp_path)
    assert not failures(results[: len(CASES)])
    for case, errors in results[len(CASES) :]:
        for name in ("output", "final_state", "dk", "dv", "dlog_decay", "dinitial_state"):
            assert errors[name] > WRONG, (case.break_with, name)


@pytest.mark.slow
def test_compiled_without_a_graph_break(tmp_path):
    assert not failures(spawn(work, COMPILED, tmp_path))


def test_opcheck(group):
    torch.manual_seed(0)
    (q, k, v, dout), dfinal = torch.randn(4, 1, 9, 2, 4), torch.randn(2, 2, 4, 4)
    given = decay.alibi(2), dfinal, torch.tensor([0, 2, 8])
    args = (q, k, v, *given, 0.5, True, False, "tiled", group.group_name)
    torch.library.opcheck(sequence_parallel.operator, args)
    _, _, start, lengths = sequence_parallel.operator(*args)
    saved = q, k, v, given[0], start, given[2], lengths
    for learnable, dfinal_or_none in ((True, dfinal), (False, None)):
        rest = (0.5, False, learnable, "tiled", group.group_name)
        torch.library.opcheck(sequence_parallel_backward.operator, (dout, dfinal_or_none, *saved, *rest))


def test_a_group_must_be_a_process_group():
    q = torch.randn(1, 3, 2, 4)
    with pytest.raises(TypeError, match=r"group is a str; it must be a torch\.distributed ProcessGroup"):
        lightning_attention(q, q, q, group="sp")
