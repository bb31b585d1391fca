"""Decoding and drafts on a GPU: everything the interpreter is asked, in bfloat16 too, captured, and past 2^31."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_attention import (
    decay,
    lightning_attention_commit,
    lightning_attention_decode,
    lightning_attention_verify,
)
from tests.kernels.triton.support.device import DEVICE, counting_compilations, needs_gpu, no_waiting, poisoned, room_for
from tests.kernels.triton.support.serving import (
    COMMITTED,
    DECODED,
    NAN,
    VERIFIED,
    apply,
    arguments,
    assert_all_but_padding,
    assert_right,
    bits,
    case,
    into_out,
    make_call,
    moved,
    with_operations,
)
from tests.support import relative_error

pytestmark = needs_gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [(FP32, FP32), (FP16, FP32), (BF16, FP32), (BF16, BF16), (FP32, BF16), (BF16, FP16), (FP32, FP16)]
CASES = [("decode", x) for x in DECODED] + [("verify", x) for x in VERIFIED] + [("commit", x) for x in COMMITTED]
TABLES = {"decode": DECODED, "verify": VERIFIED, "commit": COMMITTED}


@pytest.mark.parametrize(("dtype", "state_dtype"), DTYPES)
@pytest.mark.parametrize(("operation", "name"), CASES)
def test_against_float64(operation: str, name: str, dtype: torch.dtype, state_dtype: torch.dtype):
    call = moved(case(TABLES[operation], name, dtype=dtype, state_dtype=state_dtype), DEVICE)
    with poisoned():
        out, state = with_operations(operation, call)
    assert_right(operation, call, out, state)


@pytest.mark.parametrize("operation", ["decode", "verify"])
def test_into_out_without_padding(operation: str):
    """At the third call of a shape, too, which is made from a recording."""
    call = moved(
        make_call([1] * 3, [4, -1, 1], D=64, E=64, H=4, dtype=BF16, padding=2 * (operation == "verify")), DEVICE
    )
    expected, _ = with_operations(operation, call)
    for _ in range(4):
        returned, out, _ = into_out(operation, call)
        assert returned is None
        assert_all_but_padding(call, out, expected)


@pytest.mark.parametrize("width", [(64, 64), (128, 128), (80, 112), (256, 256), (16, 256), (256, 8)])
@pytest.mark.parametrize("state_dtype", [FP32, BF16])
def test_widths(width: tuple[int, int], state_dtype: torch.dtype):
    D, E = width
    parents = [-1, 0, 1, 0, -1, 4, 5, 6, 7]
    shape = {"D": D, "E": E, "H": 5, "dtype": BF16, "state_dtype": state_dtype, "scale": D**-0.5}
    calls = {
        "decode": make_call([1] * 5, [6, 0, -1, 3, 1], **shape),
        "verify": make_call([9, 9, 0], [4, -1, 2], parents=parents * 2, padding=3, **shape),
        "commit": make_call([9, 4], [6, 5], accepted=[p % 2 == 0 for p in range(13)], **shape),
    }
    for operation, call in calls.items():
        call = moved(call, DEVICE)
        assert_right(operation, call, *with_operations(operation, call))


@pytest.mark.parametrize("kind", ["alibi", "none", "strong"])
@pytest.mark.parametrize(
    ("dtype", "state_dtype"), [(BF16, FP32), (BF16, BF16), (BF16, FP16), (FP16, FP32), (FP16, FP16)]
)
@pytest.mark.parametrize("width", [(64, 32), (64, 64), (64, 256), (128, 64), (128, 96), (128, 128), (128, 256)])
def test_chains_in_16_bits(width: tuple[int, int], dtype: torch.dtype, state_dtype: torch.dtype, kind: str):
    """The kernels in Gluon: more drafts than they take at once, next to none of them accepted, and padding."""
    D, E = width
    lengths, slots = [1, 0, 9, 3, 70, 5], [6, 2, 4, -1, 0, 1]
    accepted = [True, *[t % 3 == 1 for t in range(12)], *[t in (31, 32, 33, 69) for t in range(70)], *[False] * 5]
    shape = {"D": D, "E": E, "H": 6, "Hk": 2, "dtype": dtype, "state_dtype": state_dtype, "kind": kind, "scale": 0.1}
    call = moved(make_call(lengths, slots, accepted=accepted, padding=3, **shape), DEVICE)
    for operation in ("verify", "commit"):
        with poisoned():
            out, state = with_operations(operation, call)
        assert_right(operation, call, out, state)


def test_whom_a_spoilt_draft_reaches():
    """Drafts after it, if it is read; nobody, if it is not accepted."""
    accepted = [t != 3 for t in range(12)]
    call = moved(make_call([12], [2], D=128, E=128, H=4, dtype=BF16, accepted=accepted), DEVICE)
    clean, (_, state) = with_operations("verify", call)[0], with_operations("commit", call)
    for name, value in (("k", NAN), ("v", NAN), ("v", float("inf"))):
        spoilt = replace(call, **{name: getattr(call, name).clone()})
        getattr(spoilt, name)[3] = value
        out, _ = with_operations("verify", spoilt)
        assert torch.equal(out[:3], clean[:3])
        assert not out[3:].isfinite().any()
        assert torch.equal(bits(with_operations("commit", spoilt)[1]), bits(state))
    spoilt = replace(call, q=call.q.clone())
    spoilt.q[3] = NAN
    out, _ = with_operations("verify", spoilt)
    assert out[3].isnan().all()
    others = [t for t in range(12) if t != 3]
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("width", [(64, 32), (128, 128), (128, 256)])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_commit_has_the_bits_of_decoding_and_verify_its_numbers(dtype: torch.dtype, width: tuple[int, int]):
    D, E = width
    call = moved(make_call([6, 6], [6, 2], D=D, E=E, H=8, dtype=dtype, accepted=[True] * 12), DEVICE)
    _, committed = with_operations("commit", call)
    verified, _ = with_operations("verify", call)
    state, slots = call.state(), call.indices(call.slots)
    for t in range(6):
        q, k, v = (x[[t, 6 + t]] for x in (call.q, call.k, call.v))
        out = lightning_attention_decode(q, k, v, call.log_decay, state, slots=slots)
        assert relative_error(out, verified[[t, 6 + t]]) <= (1e-6 if dtype == FP32 else 2e-3)
    assert torch.equal(bits(committed), bits(state))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_the_state_after_each_draft_has_the_bits_of_decoding(dtype: torch.dtype, own: bool):
    """In another pool, and in the pool itself, where the first draft's takes the place of the sequence's."""
    call = moved(make_call([3, 3], [6, 2], D=128, E=128, H=8, dtype=dtype), DEVICE)
    drafts, slots = call.state(), call.indices(call.slots)
    snapshots = drafts if own else torch.full_like(drafts, torch.nan)
    rows = call.indices([6, 0, 1, 2, 3, 4]).view(2, 3)
    lightning_attention_verify(
        call.q, call.k, call.v, call.log_decay, drafts, cu_seqlens=call.indices([0, 3, 6]), slots=slots,
        snapshots=snapshots, snapshot_slots=rows,
    )  # fmt: skip
    state = call.state()
    for t in range(3):
        q, k, v = (x[[t, 3 + t]] for x in (call.q, call.k, call.v))
        lightning_attention_decode(q, k, v, call.log_decay, state, slots=slots)
        assert torch.equal(bits(snapshots[rows[:, t].long()]), bits(state[slots.long()]))


@pytest.mark.parametrize("operation", ["decode", "commit"])
def test_a_bfloat16_state_is_rounded_once(operation: str):
    """At the end of a call, of one token or of six, and after the output."""
    lengths = [1, 1] if operation == "decode" else [6, 4]
    accepted = [True] * sum(lengths)
    call = make_call(lengths, [6, 2], D=128, E=64, H=8, dtype=BF16, state_dtype=BF16, accepted=accepted)
    call = moved(call, DEVICE)
    out, state = with_operations(operation, call)
    exact_out, exact = with_operations(operation, replace(call, pool=call.pool.float()))
    assert torch.equal(bits(state[[6, 2]]), bits(exact[[6, 2]].bfloat16()))
    if out is not None:
        assert relative_error(out, exact_out) <= 2e-3


@pytest.mark.parametrize("operation", ["decode", "verify", "commit"])
def test_a_captured_call_heeds_new_contents(operation: str):
    """Tokens, slots, lengths, parents, accepted and the pool change between replays; the graph does not."""
    shape = {"D": 64, "E": 64, "H": 4, "dtype": BF16, "parents": [-1, 0, 0], "accepted": [True] * 3}
    lengths = [1] * 3 if operation == "decode" else [3, 0, 0]
    first = moved(make_call(lengths, [0, 1, 2], padding=0 if operation == "decode" else 5, **shape), DEVICE)
    state = first.state()
    fixed = arguments(operation, first, state)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        apply(operation, fixed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = apply(operation, fixed)

    for seed, (lengths, slots, parents) in enumerate(
        [
            ([2, 0, 6], [6, -1, 0], [-1, 0, -1, 0, 1, 1, 0, 3]),
            ([0, 0, 0], [6, 5, 4], []),
            ([8, 0, 0], [5, -1, -1], [-1, 0, 1, 2, 3, 4, 5, 6]),
            ([1, 3, 2], [-1, 2, 1], [-1, -1, -1, -1, -1, 0]),
        ]
    ):
        if operation == "decode":
            lengths, parents = [1, 1, 1], [-1] * 3
        accepted = [(t + seed) % 3 != 0 for t in range(len(parents))]
        padding = len(first.q) - sum(lengths)
        shape |= {"parents": parents, "accepted": accepted, "seed": seed + 1}
        new = moved(make_call(lengths, slots, padding=padding, **shape), DEVICE)
        state.copy_(new.pool)
        for old, fresh in zip(fixed, arguments(operation, new, state), strict=True):
            if isinstance(old, Tensor):
                old.copy_(fresh)
        graph.replay()
        assert_right(operation, new, static, state)


@pytest.mark.parametrize("state_dtype", [BF16, FP32])
def test_a_pool_past_2_to_the_31_elements(state_dtype: torch.dtype):
    H, D, E = 32, 128, 128
    rows = 2**31 // (H * D * E) + 3
    room_for(rows * H * D * E * state_dtype.itemsize / 1e9 + 1)
    pool = torch.zeros(rows, H, D, E, dtype=state_dtype, device=DEVICE)
    own = torch.tensor([rows - 1, rows // 2 + 1, 0], device=DEVICE)
    small = torch.randn(3, H, D, E, device=DEVICE).to(state_dtype)
    pool[own] = small
    q, k, v = torch.randn(3, 4, H, D, device=DEVICE, dtype=BF16).unbind()
    log_decay, cu_seqlens = decay.alibi(H).to(DEVICE), torch.tensor([0, 2, 3, 4], device=DEVICE)
    accepted = torch.tensor([True, False, True, True], device=DEVICE)

    def all_of_them(state: Tensor, slots: Tensor | None) -> list[Tensor]:
        where = {"cu_seqlens": cu_seqlens, "slots": slots}
        out = [lightning_attention_decode(q[:3], k[:3], v[:3], log_decay, state, slots=slots)]
        out.append(lightning_attention_verify(q, k, v, log_decay, state, **where))
        lightning_attention_commit(k, v, log_decay, state, accepted=accepted, **where)
        return out

    got, expected = all_of_them(pool, own), all_of_them(small, None)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert torch.equal(pool[own], small)
    pool[own] = 0
    assert not any(part.any() for part in pool.split(64))  # nothing else was touched


def test_an_offset_past_2_to_the_31_within_a_state():
    """Heads so far apart that a head's offset needs 64 bits: one layer of many, heads first."""
    H, D, E = 3, 64, 64
    room_for(2 * 2.2 * 2**31 / 1e9 + 1)
    apart = 2**31 // 2 + 8 * D * E
    flat = torch.zeros(2 * apart + 8 * D * E, dtype=BF16, device=DEVICE)
    pool = flat.as_strided((4, H, D, E), (D * E, apart, E, 1))
    small = torch.randn(4, H, D, E, device=DEVICE).to(BF16)
    pool.copy_(small)
    q, k, v = torch.randn(3, 4, H, D, device=DEVICE, dtype=BF16).unbind()
    out = lightning_attention_decode(q, k, v, None, pool)
    assert torch.equal(out, lightning_attention_decode(q, k, v, None, small))
    assert torch.equal(pool, small)


def test_other_sizes_compile_nothing():
    shape = {"D": 64, "E": 64, "H": 4, "dtype": BF16}

    def calls(lengths: list[int], slots: list[int], padding: int) -> None:
        T = sum(lengths)
        drafts = {"parents": [-1] * T, "accepted": [True] * T, **shape}
        for operation, call in (
            ("decode", make_call([1] * len(slots), slots, **shape)),
            ("verify", make_call(lengths, slots, padding=padding, **drafts)),
            ("commit", make_call(lengths, slots, padding=padding, **drafts)),
        ):
            call = moved(call, DEVICE)
            assert_right(operation, call, *with_operations(operation, call))

    calls([3, 2], [4, 0], 2)
    with counting_compilations() as compiled:
        calls([1], [0], 0)
        calls([16] * 7, [6, 5, 4, 3, 2, 1, 0], 0)
        calls([0, 0, 0, 1], [1, 0, -1, 2], 31)
    assert not compiled


def test_more_sequences_compile_nothing():
    """64 states of 64 heads are read by programs of other sizes than one is."""
    shape = {"D": 64, "E": 64, "H": 64, "dtype": BF16, "state_dtype": BF16}

    def calls(N: int) -> None:
        call = moved(make_call([2] * N, accepted=[True] * 2 * N, **shape), DEVICE)
        for operation in ("verify", "commit"):
            assert_right(operation, call, *with_operations(operation, call))

    calls(1)
    with counting_compilations() as compiled:
        calls(64)
    assert not compiled


def test_without_sequences_or_drafts():
    state = torch.randn(3, 2, 16, 16, device=DEVICE)
    before, none = state.clone(), torch.zeros(0, 2, 16, device=DEVICE)
    cu_seqlens = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([1, -1], device=DEVICE)
    assert lightning_attention_decode(none, none, none, None, state, slots=slots[:0]).shape == (0, 2, 16)
    where = {"cu_seqlens": cu_seqlens, "slots": slots}
    assert lightning_attention_verify(none, none, none, None, state, **where).shape == (0, 2, 16)
    mask = torch.ones(0, dtype=torch.bool, device=DEVICE)
    lightning_attention_commit(none, none, None, state, accepted=mask, **where)
    assert torch.equal(state, before)


def test_float64_is_an_error():
    q = torch.zeros(1, 1, 16, dtype=torch.float64, device=DEVICE)
    with pytest.raises(TypeError, match="q has dtype float64; backend 'triton' takes"):
        lightning_attention_decode(q, q, q, None, torch.zeros(1, 1, 16, 16, device=DEVICE))


def _step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, slots: Tensor) -> Tensor:
    return lightning_attention_decode(q * 2, k, v, log_decay, state, slots=slots) + 1


@pytest.mark.filterwarnings("ignore")  # PyTorch's compiler warns of PyTorch
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled(mode: str | None):
    call = moved(make_call([1, 1, 1], [6, -1, 2], D=64, E=64, dtype=BF16), DEVICE)
    compiled, slots = torch.compile(_step, fullgraph=True, mode=mode), call.indices(call.slots)
    state, expected_state = call.state(), call.state()
    for _ in range(3):  # a graph is captured at the second call and replayed at the third
        out = compiled(call.q, call.k, call.v, call.log_decay, state, slots).clone()
        assert torch.equal(out, _step(call.q, call.k, call.v, call.log_decay, expected_state, slots))
        assert torch.equal(bits(state), bits(expected_state))


def test_under_autocast():
    call = moved(make_call([1, 1], [6, 2], D=64, E=64), DEVICE)
    with torch.autocast(DEVICE, dtype=BF16):
        out, state = with_operations("decode", call)
    in_bf16 = replace(call, **{name: getattr(call, name).bfloat16() for name in "qkv"})
    assert_right("decode", in_bf16, out, state)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("operation", ["decode", "verify", "commit"])
def test_nothing_is_read_on_the_host(operation: str):
    drafts = {"parents": [-1, 0, 0, 1, -1, 0], "accepted": [True] * 6}
    lengths = [1] * 6 if operation == "decode" else [4, 2]
    call = moved(make_call(lengths, [6, -1, 2, 1, 0, 3][: len(lengths)], D=64, E=64, dtype=BF16, **drafts), DEVICE)
    given = arguments(operation, call, call.state())
    apply(operation, given)  # compiled now
    with no_waiting():
        apply(operation, given)


@pytest.mark.parametrize(("dtype", "state_dtype"), [(BF16, FP32), (FP32, FP32), (BF16, BF16)])
@pytest.mark.parametrize("width", [(128, 128), (64, 64), (80, 112), (256, 256)])
def test_how_many_others_there_are_changes_no_bit(width: tuple[int, int], dtype: torch.dtype, state_dtype: torch.dtype):
    D, E = width
    H, most, n = 8, 300, 0
    q, k = torch.randn(2, most, H, D, device=DEVICE).to(dtype)
    v, pool = torch.randn(most, H, E, device=DEVICE).to(dtype), torch.randn(most, H, D, E, device=DEVICE)
    pool, rate = pool.to(state_dtype), decay.alibi(H).to(DEVICE)
    alone = None
    for N in (1, 7, 64, most):  # each has other columns without batch_invariant
        state = pool.clone()
        slots = torch.arange(N, device=DEVICE)
        out = lightning_attention_decode(q[:N], k[:N], v[:N], rate, state, slots=slots, batch_invariant=True)
        got = out[n], state[n]
        alone = alone or got
        assert all(torch.equal(a, b) for a, b in zip(got, alone, strict=True)), N
