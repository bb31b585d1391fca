"""Every error of the operations: its type, and that it names the argument, what came and what is wanted."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_attention import (
    lightning_attention,
    lightning_attention_commit,
    lightning_attention_decode,
    lightning_attention_prefill,
    lightning_attention_verify,
)

B, T, N, S, H, D, E = 2, 6, 3, 4, 2, 4, 3


def attention() -> dict[str, object]:
    return {
        "q": torch.zeros(B, T, H, D),
        "k": torch.zeros(B, T, H, D),
        "v": torch.zeros(B, T, H, E),
        "log_decay": torch.zeros(H),
        "initial_state": torch.zeros(B, H, D, E),
    }


def packed_attention() -> dict[str, object]:
    return {
        "q": torch.zeros(1, T, H, D),
        "k": torch.zeros(1, T, H, D),
        "v": torch.zeros(1, T, H, E),
        "log_decay": torch.zeros(H),
        "cu_seqlens": torch.tensor([0, 2, 2, 5]),
        "initial_state": torch.zeros(N, H, D, E),
    }


def serving(tokens: int, **extra: object) -> dict[str, object]:
    return {
        "q": torch.zeros(tokens, H, D),
        "k": torch.zeros(tokens, H, D),
        "v": torch.zeros(tokens, H, E),
        "log_decay": torch.zeros(H),
        "state": torch.zeros(S, H, D, E),
        "slots": torch.tensor([2, -1, 0]),
        "out": torch.zeros(tokens, H, E),
        **extra,
    }


def decode() -> dict[str, object]:
    return serving(N)


def prefill() -> dict[str, object]:
    return serving(
        T,
        cu_seqlens=torch.tensor([0, 2, 2, 5]),
        fresh=torch.zeros(N, dtype=torch.bool),
        snapshot_at=torch.tensor([[1], [0], [2]]),
        snapshot_slots=torch.tensor([[1], [-1], [3]]),
    )


def verify() -> dict[str, object]:
    return serving(
        T,
        cu_seqlens=torch.tensor([0, 2, 2, 5]),
        parents=torch.tensor([-1, 0, -1, -1, 1, 99]),
        snapshots=torch.zeros(4, H, D, E),
        snapshot_slots=torch.tensor([[0, -1], [77, 0], [1, 2]]),
    )


def commit() -> dict[str, object]:
    arguments = serving(T, cu_seqlens=torch.tensor([0, 2, 2, 5]), accepted=torch.zeros(T, dtype=torch.bool))
    del arguments["q"], arguments["out"]
    return arguments


OPERATIONS: dict[Callable[[], dict[str, object]], Callable] = {
    attention: lightning_attention,
    packed_attention: lightning_attention,
    decode: lightning_attention_decode,
    prefill: lightning_attention_prefill,
    verify: lightning_attention_verify,
    commit: lightning_attention_commit,
}
SERVING = [decode, prefill, verify, commit]
PACKED = [packed_attention, prefill, verify, commit]


def _fails(of: Callable, error: type[Exception], message: str, **wrong: object):
    arguments = of() | wrong
    pool = arguments.get("state")
    before = pool.clone() if isinstance(pool, Tensor) and pool.device.type == "cpu" else None
    with pytest.raises(error, match=re.escape(message)):
        OPERATIONS[of](**arguments)
    if before is not None:
        assert torch.equal(pool, before)  # nothing was written before the error was found


def each(operations: list[Callable]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("of", operations, ids=lambda of: of.__name__)


def each_argument(operations: list[Callable], *names: str) -> pytest.MarkDecorator:
    """Each operation with each of its tensors, or those of the names given."""
    pairs = [(of, name) for of in operations for name in of() if name in names or not names]
    return pytest.mark.parametrize(("of", "name"), pairs, ids=lambda x: x if isinstance(x, str) else x.__name__)


@each(list(OPERATIONS))
def test_the_arguments_to_be_made_wrong_are_right(of: Callable):
    OPERATIONS[of](**of())


# what every operation takes


@each_argument(list(OPERATIONS))
def test_not_a_tensor(of: Callable, name: str):
    _fails(of, TypeError, f"{name} is a list; it must be a tensor", **{name: [1.0]})


@each_argument(list(OPERATIONS), "q", "k", "v")
def test_another_number_of_dimensions(of: Callable, name: str):
    x = of()[name][0]
    _fails(of, ValueError, f"{name} has shape {list(x.shape)}; it must be [", **{name: x})


def test_the_dimensions_wanted_are_told():
    q, v = torch.zeros(H, D), torch.zeros(H, E)
    _fails(attention, ValueError, "q has shape [2, 4]; it must be [B, T, H, D]", q=q)
    _fails(attention, ValueError, "v has shape [2, 3]; it must be [B, T, H, E]", v=v)
    _fails(prefill, ValueError, "q has shape [2, 4]; it must be [T, H, D]", q=q)
    _fails(decode, ValueError, "v has shape [2, 3]; it must be [N, H, E]", v=v)
    _fails(commit, ValueError, "k has shape [2, 4]; it must be [T, H, D]", k=q)


@each([attention, packed_attention, decode, prefill, verify])
def test_sizes_of_q_and_k(of: Callable):
    k = of()["k"]
    shape = [*k.shape[:-1], D + 1]
    _fails(of, ValueError, f"k has shape {shape}; it must be that of q, {list(k.shape)}", k=torch.zeros(shape))
    longer = torch.cat([k, k])
    _fails(of, ValueError, f"k has shape {list(longer.shape)}; it must be that of q, {list(k.shape)}", k=longer)


@each(list(OPERATIONS))
def test_sizes_of_v(of: Callable):
    k, v = of()["k"], of()["v"]
    longer = torch.cat([v, v])
    message = f"v has shape {list(longer.shape)}; all but the last two sizes must be those of k, {list(k.shape)}"
    _fails(of, ValueError, message, v=longer)
    more = v.repeat_interleave(2, -2)[..., :3, :]
    _fails(of, ValueError, "v has 3 heads; it must have a multiple of the 2 of k", v=more)


@each(list(OPERATIONS))
@pytest.mark.parametrize("name", ["H", "D", "E"])
def test_sizes_of_zero(of: Callable, name: str):
    arguments = of()
    k, v = list(arguments["k"].shape), list(arguments["v"].shape)
    if name == "H":
        k[-2] = v[-2] = 0
    else:
        (k if name == "D" else v)[-1] = 0
    wrong = {"q": torch.zeros(k), "k": torch.zeros(k), "v": torch.zeros(v)}
    wrong = {name: x for name, x in wrong.items() if name in arguments}
    _fails(of, ValueError, f"k has shape {k} and v {v}; H, D and E must be at least 1", **wrong)


@each(list(OPERATIONS))
def test_dtypes_of_qkv(of: Callable):
    arguments = of()
    ints = {name: arguments[name].long() for name in ("q", "k", "v") if name in arguments}
    _fails(of, TypeError, "k has dtype int64; it must be bfloat16 or float16 or float32 or float64", **ints)
    _fails(of, TypeError, "v has dtype bfloat16; it must be float32", v=arguments["v"].bfloat16())
    if "q" in arguments:
        _fails(of, TypeError, "q has dtype float64; it must be float32", q=arguments["q"].double())
        _fails(of, TypeError, "k has dtype float64; it must be float32", k=arguments["k"].double())


@each_argument(list(OPERATIONS))
def test_devices(of: Callable, name: str):
    elsewhere = of()[name].to("meta")
    if name == "k" and of is commit:  # the one that v is compared with
        _fails(of, ValueError, "v is on cpu; it must be on meta", k=elsewhere)
    else:
        _fails(of, ValueError, f"{name} is on meta; it must be on cpu, where the other inputs are", **{name: elsewhere})


@each_argument(list(OPERATIONS), "q", "k", "v")
def test_strides(of: Callable, name: str):
    x = of()[name]
    transposed = x.mT.contiguous().mT
    _fails(of, ValueError, f"{name} has strides {list(transposed.stride())}; the last must be 1", **{name: transposed})


def test_a_last_size_of_one_has_any_stride():
    x = torch.zeros(B, T, H, 3)[..., :1]
    assert x.stride(-1) == 1
    x = x.as_strided(x.shape, (*x.stride()[:-1], 7))
    lightning_attention(x, x, x)


@each(list(OPERATIONS))
def test_log_decay(of: Callable):
    _fails(of, ValueError, "log_decay has shape [3]; it must be [H] = [2], one per head of v", log_decay=torch.zeros(3))
    _fails(of, ValueError, "of slopes log_decay is -slopes.flatten()", log_decay=torch.zeros(2, 1, 1))
    _fails(of, TypeError, "log_decay has dtype bfloat16; it must be float32", log_decay=torch.zeros(2).bfloat16())
    _fails(of, TypeError, "log_decay has dtype float64; it must be float32", log_decay=torch.zeros(2).double())


@each([attention, packed_attention, decode, prefill, verify])
@pytest.mark.parametrize("scale", ["1", torch.ones(())], ids=type)
def test_scale(of: Callable, scale: object):
    _fails(of, TypeError, f"scale is a {type(scale).__name__}; it must be a float or None", scale=scale)


@pytest.mark.parametrize("factor", [0.25, None])
@each([attention, packed_attention, decode, prefill, verify])
def test_the_scale_of_softmax_attention(of: Callable, factor: float | None):
    arguments = of()
    result = []
    for scale in (factor, D**-0.5):
        given = {n: x.clone() if isinstance(x, Tensor) else x for n, x in arguments.items()} | {"scale": scale}
        for seed, name in enumerate(("q", "k", "v")):
            given[name] = torch.randn(given[name].shape, generator=torch.Generator().manual_seed(seed))
        out = OPERATIONS[of](**given)
        result.append(out.output if isinstance(out, tuple) else out)
    assert result[0].any()
    assert torch.equal(*result) is (factor is None)


# whole sequences


@each([attention, packed_attention])
def test_initial_state(of: Callable):
    state = of()["initial_state"]
    n = state.shape[0]
    message = f"initial_state has shape [9, 2, 4, 3]; it must be [N, H, D, E] = [{n}, 2, 4, 3]"
    _fails(of, ValueError, message, initial_state=torch.zeros(9, H, D, E))
    message = f"initial_state has shape [{n}, 2, 3, 4]; it must be [N, H, D, E] = [{n}, 2, 4, 3]"
    _fails(of, ValueError, message, initial_state=state.mT)
    wanted = "it must be float32 or bfloat16 or float16"
    _fails(of, TypeError, f"initial_state has dtype float64; {wanted}", initial_state=state.double())
    double = {name: of()[name].double() for name in ("q", "k", "v")}
    wanted += " or float64"
    _fails(of, TypeError, f"initial_state has dtype int32; {wanted}", **double, initial_state=state.int())


def test_a_batch_of_packed_sequences():
    message = "q has shape [2, 6, 2, 4]; with cu_seqlens the batch B must be 1"
    _fails(attention, ValueError, message, cu_seqlens=torch.tensor([0, 6]), initial_state=None)


# packed sequences


@each(PACKED)
def test_cu_seqlens(of: Callable):
    def fails(error: type[Exception], message: str, *values: float, dtype: torch.dtype = torch.int64):
        _fails(of, error, message, cu_seqlens=torch.tensor(values, dtype=dtype))

    fails(TypeError, "cu_seqlens has dtype float32; it must be int32 or int64", 0, 2, 2, 5, dtype=torch.float32)
    fails(ValueError, "cu_seqlens has shape [1]; it must be [N+1] with N at least 1", 0)
    _fails(of, ValueError, "cu_seqlens has shape [2, 2]; it must be [N+1]", cu_seqlens=torch.zeros(2, 2).long())
    fails(ValueError, "cu_seqlens is [1, 2, 2, 5]; it must start at 0 and never decrease", 1, 2, 2, 5)
    fails(ValueError, "cu_seqlens is [0, 3, 2, 5]; it must start at 0 and never decrease", 0, 3, 2, 5)
    fails(ValueError, "cu_seqlens is [0, -1, 2, 5]; it must start at 0 and never decrease", 0, -1, 2, 5)
    fails(ValueError, "cu_seqlens ends at 7; it must not pass the 6 tokens", 0, 2, 2, 7)
    fails(ValueError, "cu_seqlens ends at 7; it must not pass the 6 tokens", 0, 2, 2, 7, dtype=torch.int32)


def test_a_long_cu_seqlens_is_shortened():
    cuts = torch.tensor([0, 1, 2, 3, 2, 4, 4, 4, 4, 4, 5])
    message = "cu_seqlens is [0, 1, 2, 3, 2, 4, 4, 4, …]; it must"
    _fails(packed_attention, ValueError, message, cu_seqlens=cuts, initial_state=None)


# pools of states


@each(SERVING)
def test_state(of: Callable):
    wanted = "it must be [S, H, D, E] = [S, 2, 4, 3]"
    _fails(of, ValueError, f"state has shape [4, 2, 3, 4]; {wanted}", state=torch.zeros(S, H, E, D))
    _fails(of, ValueError, f"state has shape [2, 4, 3]; {wanted}", state=torch.zeros(H, D, E))
    for dtype in (torch.int16, torch.float64):
        name = str(dtype).removeprefix("torch.")
        message = f"state has dtype {name}; it must be float32 or bfloat16 or float16"
        _fails(of, TypeError, message, state=torch.zeros(S, H, D, E, dtype=dtype))


@each(SERVING)
def test_slots(of: Callable):
    message = "state has 4 rows; without slots it must have one per sequence, 3"
    snapshots = dict.fromkeys(["snapshot_at", "snapshot_slots"]) if of is prefill else {}
    _fails(of, ValueError, message, slots=None, **snapshots)
    _fails(of, ValueError, "slots has shape [2]; it must be [N] = [3]", slots=torch.tensor([0, 1]))
    _fails(of, TypeError, "slots has dtype bool; it must be int32 or int64", slots=torch.ones(3, dtype=torch.bool))
    message = "slots holds 4; state has 4 rows (negative slots are padding)"
    _fails(of, ValueError, message, slots=torch.tensor([0, 4, -1]))
    message = "slots is [2, 0, 2]; a slot must not be given twice in one call"
    _fails(of, ValueError, message, slots=torch.tensor([2, 0, 2]))


@each_argument(SERVING, "q", "k", "v", "log_decay", "state")
def test_no_gradients(of: Callable, name: str):
    message = f"{name} requires grad; this operation has no derivative, call it under torch.no_grad()"
    _fails(of, ValueError, message, **{name: of()[name].requires_grad_()})
    with torch.no_grad():
        OPERATIONS[of](**of() | {name: of()[name].requires_grad_()})


def test_states_after_drafts():
    message = "snapshots came without snapshot_slots; states after drafts want both"
    _fails(verify, ValueError, message, snapshot_slots=None)
    message = "snapshot_slots came without snapshots; states after drafts want both"
    _fails(verify, ValueError, message, snapshots=None)
    message = "snapshots has shape [4, 2, 3, 4]; it must be [R, H, D, E] = [R, 2, 4, 3]"
    _fails(verify, ValueError, message, snapshots=torch.zeros(4, H, E, D))
    message = "snapshots has dtype float64; it must be float32 or bfloat16 or float16"
    _fails(verify, TypeError, message, snapshots=torch.zeros(4, H, D, E).double())
    message = "snapshot_slots has shape [2, 2]; it must be [N, P] = [3, 2]"
    _fails(verify, ValueError, message, snapshot_slots=torch.zeros(2, 2).long())
    message = "snapshot_slots holds 4; snapshots has 4 rows (negative slots are padding)"
    _fails(verify, ValueError, message, snapshot_slots=torch.tensor([[0, 4], [9, 9], [1, 2]]))
    message = "snapshot_slots is [0, 1, 0, 2]; a slot must not be given twice in one call"
    _fails(verify, ValueError, message, snapshot_slots=torch.tensor([[0, 1], [9, 9], [0, 2]]))


@each([decode, prefill, verify])
def test_out(of: Callable):
    out = of()["out"]
    n = len(out)
    _fails(of, ValueError, f"out has shape [{n}, 6]; it must be the shape of v = [{n}, 2, 3]", out=out.flatten(1))
    _fails(of, TypeError, "out has dtype bfloat16; it must be float32", out=out.bfloat16())
    message = "out has strides [12, 6, 2]; it must be contiguous"
    _fails(of, ValueError, message, out=torch.zeros(n, 2, 6)[..., ::2])
    message = "out requires grad; this operation has no derivative, call it under torch.no_grad()"
    _fails(of, ValueError, message, out=out.requires_grad_())


def test_fresh():
    _fails(prefill, ValueError, "fresh has shape [6]; it must be [N] = [3]", fresh=torch.zeros(T, dtype=torch.bool))
    _fails(prefill, TypeError, "fresh has dtype int64; it must be bool", fresh=torch.zeros(N).long())


def test_snapshots():
    at, slots = torch.tensor([[1], [0], [2]]), torch.tensor([[1], [-1], [3]])
    _fails(prefill, ValueError, "snapshot_at came without snapshot_slots; snapshots want both", snapshot_slots=None)
    _fails(prefill, ValueError, "snapshot_slots came without snapshot_at; snapshots want both", snapshot_at=None)
    for name, x in (("snapshot_at", at), ("snapshot_slots", slots)):
        flat = f"{name} has shape [3]; it must be [N, P]"
        _fails(prefill, ValueError, flat, **{name: x.flatten()})
        _fails(prefill, ValueError, f"{name} has shape []; it must be [N, P]", **{name: x[0, 0]})
        _fails(prefill, ValueError, f"{name} has shape [2, 1]; it must be [N, P] = [3, 1]", **{name: x[:2]})
        _fails(prefill, TypeError, f"{name} has dtype float32; it must be int32 or int64", **{name: x.float()})
    message = "snapshot_slots has shape [3, 2]; it must be [N, P] = [3, 1]"
    _fails(prefill, ValueError, message, snapshot_slots=slots.repeat(1, 2))
    message = "snapshot_slots holds 4; state has 4 rows"
    _fails(prefill, ValueError, message, snapshot_slots=torch.tensor([[4], [-1], [3]]))
    message = "snapshot_slots is [3, -1, 3]; a slot must not be given twice in one call"
    _fails(prefill, ValueError, message, snapshot_slots=torch.tensor([[3], [-1], [3]]))
    message = "snapshot_slots holds 2, the row of a sequence of the call; it must be another"
    _fails(prefill, ValueError, message, snapshot_slots=torch.tensor([[1], [2], [3]]))
    alone = {"state": torch.zeros(N, H, D, E), "slots": None}
    message = "snapshot_slots holds 1, the row of a sequence of the call; it must be another"
    _fails(prefill, ValueError, message, snapshot_slots=torch.tensor([[1], [-1], [-1]]), **alone)


def test_parents():
    message = "parents has shape [5]; it must be [T] = [6]"
    _fails(verify, ValueError, message, parents=torch.zeros(5).long())
    _fails(verify, TypeError, "parents has dtype float32; it must be int32 or int64", parents=torch.zeros(T))
    message = "parents[3] is 1; draft 1 of its sequence wants an earlier draft or -1"
    _fails(verify, ValueError, message, parents=torch.tensor([-1, 0, -1, 1, 1, 99]))
    message = "parents[0] is -2; draft 0 of its sequence wants an earlier draft or -1"
    _fails(verify, ValueError, message, parents=torch.tensor([-2, 0, -1, 0, 1, 99]))


def test_accepted():
    message = "accepted has shape [5]; it must be [T] = [6]"
    _fails(commit, ValueError, message, accepted=torch.zeros(5, dtype=torch.bool))
    _fails(commit, TypeError, "accepted has dtype int64; it must be bool", accepted=torch.zeros(T).long())


@pytest.mark.parametrize("value", [0.5, 1e-30, float("nan"), float("inf")])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_decay_above_one_is_refused_where_looking_is_free(value: float, requires_grad: bool):
    message = f"log_decay[1] is {value}" if value != 1e-30 else "log_decay[1] is 1"
    rate = torch.tensor([-0.5, value], requires_grad=requires_grad)
    q, pool, cu = torch.ones(1, 4, 2, 3), torch.zeros(1, 2, 3, 3), {"cu_seqlens": torch.tensor([0, 4])}
    for backend in ("tiled", "reference"):
        with pytest.raises(ValueError, match=re.escape(message)):
            lightning_attention(q, q, q, rate, backend=backend)
    compiled = torch.compile(lightning_attention, fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match=re.escape(message)):
        compiled(q, q, q, rate)
    accepted = torch.ones(4, dtype=torch.bool)
    with torch.no_grad():
        for call in (
            lambda: lightning_attention_decode(q[0, :1], q[0, :1], q[0, :1], rate, pool),
            lambda: lightning_attention_prefill(*[q[0]] * 3, rate, pool, **cu),
            lambda: lightning_attention_verify(*[q[0]] * 3, rate, pool, **cu),
            lambda: lightning_attention_commit(q[0], q[0], rate, pool, accepted=accepted, **cu),
        ):
            with pytest.raises(ValueError, match=re.escape(message)):
                call()
    assert not pool.any()


def test_states_in_float64_are_for_float64_inputs():
    q, pool = torch.ones(1, 2, 3), torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    with pytest.raises(TypeError, match="state has dtype float64; it must be float32 or bfloat16 or float16"):
        lightning_attention_decode(q, q, q, None, pool)


def test_every_row_of_a_pool_has_a_place_of_its_own():
    x, shared = torch.zeros(2, H, D), torch.zeros(1, H, D, D).expand(2, -1, -1, -1)
    cuts, taken = torch.tensor([0, 1, 2]), torch.tensor([True, True])
    message = r"state has strides \[0, 16, 4, 1\]; its numbers must each have a place of their own"
    for call in (
        lambda: lightning_attention_decode(x, x, x, None, shared),
        lambda: lightning_attention_prefill(x, x, x, None, shared, cu_seqlens=cuts),
        lambda: lightning_attention_commit(x, x, None, shared, cu_seqlens=cuts, accepted=taken),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    # Of a size of one the stride says nothing.
    lightning_attention_decode(x[:1], x[:1], x[:1], None, shared[:1])


@pytest.mark.parametrize("name", ["log_decay", "state", "slots"])
def test_sparse_and_nested_small_tensors_are_named(name: str):
    x = torch.zeros(2, H, D)
    args = {"log_decay": torch.zeros(H), "state": torch.zeros(2, H, D, D), "slots": torch.tensor([0, 1])}
    with pytest.raises(TypeError, match=f"{name} has layout sparse_coo"):
        lightning_attention_decode(x, x, x, **args | {name: args[name].to_sparse()})
    nested = torch.nested.nested_tensor(list(args[name]), layout=torch.jagged) if name == "state" else None
    if nested is not None:
        with pytest.raises(TypeError, match="state is a nested tensor"):
            lightning_attention_decode(x, x, x, **args | {"state": nested})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nested_tensors_beside_others_are_named(name: str, layout: torch.layout):
    given = dict.fromkeys("qkv", torch.zeros(2, H, D))
    given[name] = torch.nested.nested_tensor([torch.zeros(1, D), torch.zeros(H, D)], layout=layout)
    with pytest.raises(TypeError, match=f"{name} is a nested tensor"):
        lightning_attention_decode(**given, log_decay=None, state=torch.zeros(2, H, D, D))


def test_commit_looks_at_the_parents_of_rejected_drafts_too():
    x = torch.zeros(3, H, D)
    with pytest.raises(ValueError, match=r"parents\[1\] is 5"):
        lightning_attention_commit(
            x, x, None, torch.zeros(1, H, D, D), cu_seqlens=torch.tensor([0, 3]),
            accepted=torch.tensor([True, False, True]), parents=torch.tensor([-1, 5, 0]),
        )  # fmt: skip


@pytest.mark.filterwarnings("error")
def test_boundaries_with_strides_bring_no_warning():
    x, pool = torch.zeros(3, H, D), torch.zeros(2, H, D, D)
    cuts = torch.tensor([0, 9, 2, 9, 3])[::2]
    lightning_attention_verify(x, x, x, None, pool, cu_seqlens=cuts)
    lightning_attention_prefill(x, x, x, None, pool, cu_seqlens=cuts, slots=torch.tensor([0, 1]))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf"), 10**400])
def test_a_scale_that_is_no_finite_number(scale: float):
    q = torch.ones(1, 2, 3)
    with pytest.raises(ValueError, match="it must be a finite float"):
        lightning_attention(q[None], q[None], q[None], scale=scale)
    with pytest.raises(ValueError, match="it must be a finite float"):
        lightning_attention_decode(q, q, q, None, torch.zeros(1, 2, 3, 3), scale=scale)


def test_a_pool_of_no_rows_serves_padding():
    q, pool, slots = torch.ones(2, 2, 3), torch.zeros(0, 2, 3, 3), torch.tensor([-1, -1])
    cu = {"cu_seqlens": torch.tensor([0, 1, 2]), "slots": slots}
    assert not lightning_attention_decode(q, q, q, None, pool, slots=slots).any()
    assert not lightning_attention_prefill(q, q, q, None, pool, **cu).any()
    assert not lightning_attention_verify(q, q, q, None, pool, **cu).any()
    lightning_attention_commit(q, q, None, pool, accepted=torch.ones(2, dtype=torch.bool), **cu)
