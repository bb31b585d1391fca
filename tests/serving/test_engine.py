import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from lightning_attention import lightning_attention_fold
from lightning_attention.models.transnormer import TransnormerForCausalLM
from lightning_attention.serving import engine
from lightning_attention.serving.engine import ContinuousBatch, Request, Token
from tests.kernels.triton.support.device import no_waiting

PAD = 0


def run(batch: ContinuousBatch, requests: list[Request], joins: list[int] | None = None) -> dict[int, list[Token]]:
    """Submit request i after joins[i] steps, and step until all have ended; each request's tokens."""
    joins, steps, given, numbers = joins or [0] * len(requests), 0, {}, {}
    while batch.busy or len(numbers) < len(requests):
        for i, request in enumerate(requests):
            if i not in numbers and joins[i] <= steps:
                numbers[i] = batch.submit(request)
        for token in batch.step():
            given.setdefault(token.request, []).append(token)
        steps += 1
        assert steps < 2000
    return {i: given[number] for i, number in numbers.items()}


def words(tokens: list[Token]) -> list[int]:
    return [token.token for token in tokens]


@torch.no_grad()
def greedy(model: TransnormerForCausalLM, request: Request) -> list[int]:
    """By the definition: the whole text anew for every token."""
    ids = [*request.prompt]
    while len(ids) < len(request.prompt) + request.max_tokens:
        logits = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1]
        logits[PAD] = -torch.inf
        ids.append(int(logits.argmax()))
        if ids[-1] in request.stop:
            break
    return ids[len(request.prompt) :]


def draw_requests(source: random.Random, count: int, **settings) -> list[Request]:
    """Prompts of very different lengths, one token among them."""
    lengths = [source.choice([1, 2, source.randint(3, 20), source.randint(20, 120)]) for _ in range(count)]
    return [
        Request([source.randrange(1, 97) for _ in range(n)], source.choice([1, 2, source.randint(3, 25)]), **settings)
        for n in lengths
    ]


# A GPU is always one step ahead of the host; a CPU can be. For so few states neither takes rings unasked.
@pytest.mark.parametrize(("seed", "ahead", "recent"), [(0, 0, None), (1, 0, 16), (2, 1, 4), (3, 1, 0)])
def test_each_request_gets_what_it_gets_alone_whoever_joins_and_leaves(
    model, seed: int, ahead: int, recent: int | None
) -> None:
    check_random_requests(model, seed, ahead, recent)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
@pytest.mark.parametrize(("seed", "recent"), [(0, None), (1, 16), (2, 4), (3, 0)])
def test_each_request_gets_what_it_gets_alone_on_a_gpu(model, seed: int, recent: int | None) -> None:
    batch = check_random_requests(model.cuda(), seed, 1, recent)
    assert batch._graphs  # decode steps were replayed


def check_random_requests(model: TransnormerForCausalLM, seed: int, ahead: int, recent: int | None) -> ContinuousBatch:
    source = random.Random(seed)
    requests = draw_requests(source, 15, stop=(5, 6, 7))
    batch = ContinuousBatch(
        model, max_batch=source.randint(2, 7), prefill_tokens=source.choice([1, 16, 64]), suppress=[PAD],
        recent_tokens=recent,
    )  # fmt: skip
    batch._ahead = ahead
    joins = [source.randint(0, 40) for _ in requests]
    given = run(batch, requests, joins)
    for i, request in enumerate(requests):
        assert words(given[i]) == greedy(model, request), i
    ends = [tokens[-1].finished for tokens in given.values()]
    assert {*ends} == {"stop", "length"}
    assert all(token.finished is None for tokens in given.values() for token in tokens[:-1])
    assert batch.step() == []
    assert [ring is not None for ring in batch.recent] == [bool(recent)] * 3
    assert all(ring.k.shape[2] == recent and ring.count.any() for ring in batch.recent if ring is not None)
    return batch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_gpu_is_waited_for_once_a_step(model) -> None:
    batch = ContinuousBatch(model.cuda(), max_batch=4, prefill_tokens=16, suppress=[PAD])
    requests = [Request([3] * n, 9, temperature=t) for n in (1, 40, 7, 2, 30) for t in (0.0, 1.0)]
    run(batch, requests)  # compiled and captured
    for request in requests:
        batch.submit(request)
    with no_waiting():  # an event's synchronize, the one wait there is, is not among its errors
        while batch.busy:
            batch.step()


def test_the_comparison_sees_a_state_that_is_not_the_requests_own(model, monkeypatch) -> None:
    requests = draw_requests(random.Random(1), 6)
    batch = ContinuousBatch(model, max_batch=2, suppress=[PAD])
    prefill = type(model.model.layers[0].token_mixer).prefill
    monkeypatch.setattr(
        type(model.model.layers[0].token_mixer), "prefill", lambda *a, fresh, **k: prefill(*a, fresh=None, **k)
    )
    given = run(batch, requests)
    assert [words(given[i]) for i in range(6)] != [greedy(model, request) for request in requests]


def test_rows_are_reused_and_the_pool_does_not_grow(model) -> None:
    batch = ContinuousBatch(model, max_batch=3)
    addresses = [state.data_ptr() for state in batch.states]
    assert [tuple(state.shape) for state in batch.states] == [(3, 2, 48, 24), (3, 2, 24, 24), (3, 2, 48, 24)]
    given = run(batch, draw_requests(random.Random(0), 25))
    assert len(given) == 25
    assert [state.data_ptr() for state in batch.states] == addresses


def test_a_long_prompt_holds_up_nobody(model) -> None:
    batch = ContinuousBatch(model, max_batch=4, prefill_tokens=8)
    talking = batch.submit(Request([3, 4], 60))
    assert [token.request for token in batch.step()] == [talking]
    long = batch.submit(Request([5] * 300, 2))
    short = batch.submit(Request([6, 7, 8], 4))
    order = []
    while batch.busy:
        tokens = [token.request for token in batch.step()]
        if long not in order and order.count(talking) < 59:
            assert talking in tokens  # a token every step, whatever is being read
        order += tokens
    assert order.index(short) < 4
    assert order.count(talking) == 60 - 1
    assert order.index(long) > 303 / 8


def test_prompts_are_read_within_the_budget_and_by_all(model) -> None:
    lengths = []
    prefill = ContinuousBatch._prefill

    class Watched(ContinuousBatch):
        def _prefill(self, decoding, chunks):
            lengths.append({s.number: n for s, n in chunks.items()})
            return prefill(self, decoding, chunks)

    batch = Watched(model, max_batch=8, prefill_tokens=20)
    run(batch, [Request([3] * n, 1) for n in (100, 90, 5, 40)])
    assert lengths[0] == {0: 10, 2: 5, 3: 5}  # half to the first, half to the shortest
    assert all(sum(step.values()) == 20 for step in lengths[:-1])
    assert {i: sum(step.get(i, 0) for step in lengths) for i in range(4)} == {0: 100, 1: 90, 2: 5, 3: 40}
    one = Watched(model, prefill_tokens=1)
    lengths.clear()
    run(one, [Request([3] * 4, 1), Request([3], 1)])
    assert lengths == [{0: 1}] * 4 + [{1: 1}]  # the first is never overtaken by all


def test_sampling_draws_from_the_requests_own_seed(model) -> None:
    def request(seed: int, **settings) -> Request:
        return Request([9, 8, 7], 90, **{"temperature": 1.0, "top_p": 0.9, "seed": seed, **settings})

    requests = [request(1), request(2), request(1), request(3, temperature=0), request(4, temperature=3.0)]
    together = run(ContinuousBatch(model, max_batch=3, suppress=[PAD]), requests, [0, 0, 4, 2, 7])
    for i, alone in enumerate(requests):
        assert words(together[i]) == words(run(ContinuousBatch(model, suppress=[PAD]), [alone])[0])
    assert words(together[0]) == words(together[2]) != words(together[1])
    assert words(together[3]) == greedy(model, requests[3])
    assert all(PAD not in words(tokens) for tokens in together.values())


@pytest.mark.parametrize("ahead", [0, 1])
def test_cancelling_frees_the_row_and_leaves_the_others_alone(model, ahead: int) -> None:
    requests = draw_requests(random.Random(3), 3)
    requests = [Request(r.prompt, 12) for r in requests]
    batch = ContinuousBatch(model, max_batch=2, suppress=[PAD])
    batch._ahead = ahead
    first, second, third = (batch.submit(r) for r in requests)
    given = [token for _ in range(3) for token in batch.step()]
    batch.cancel(first)
    assert batch.room == 0  # the row is free, and the third waits for it
    batch.cancel(99)
    had = len([t for t in given if t.request == first])
    while batch.busy:
        given += batch.step()
    assert len([t for t in given if t.request == first]) == had
    assert batch.room == 2
    for number, request in ((second, requests[1]), (third, requests[2])):
        assert words([t for t in given if t.request == number]) == greedy(model, request)
    batch.submit(requests[0])
    waiting = [batch.submit(r) for r in requests[1:]]
    batch.step()
    batch.cancel(waiting[-1])
    while batch.busy:
        assert all(token.request != waiting[-1] for token in batch.step())


@pytest.mark.parametrize("recent", [0, 4])
def test_states_of_16_bits_are_near(model, recent: int) -> None:
    """After a prompt, and after nine steps, each of which rounds them where there are no rings."""
    for tokens, times in ((1, 1), (10, 5)):
        pools: dict[torch.dtype, list[Tensor]] = {}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            batch = ContinuousBatch(model, max_batch=2, state_dtype=dtype, recent_tokens=recent)
            run(batch, [Request([*range(3, 60)], tokens)])
            for block, state, rings in zip(model.blocks, batch.states, batch.recent, strict=True):
                if rings is not None:
                    lightning_attention_fold(state, rings, block.token_mixer.log_decay)
            pools[dtype] = batch.states
        for dtype, roundoff in ((torch.bfloat16, 4e-3), (torch.float16, 5e-4)):
            for exact, rounded in zip(pools[torch.float32], pools[dtype], strict=True):
                assert rounded.dtype == dtype
                assert 0 < (rounded - exact).norm() < times * roundoff * exact.norm()


def test_decode_steps_come_in_few_sizes(model, monkeypatch) -> None:
    sizes = []
    decode_rows = ContinuousBatch._decode_rows
    monkeypatch.setattr(
        ContinuousBatch,
        "_decode_rows",
        lambda self, rows, *a: sizes.append(rows.shape[1]) or decode_rows(self, rows, *a),
    )
    run(ContinuousBatch(model, max_batch=11), [Request([3], n) for n in range(1, 13)])
    assert {*sizes} == {1, 2, 4, 8, 11}
    assert all(a >= b for a, b in pairwise(sizes))


def test_a_request_keeps_its_tokens_whatever_kind_they_came_in(model) -> None:
    ids = [3, 96, 5]
    wanted = words(run(ContinuousBatch(model, suppress=[PAD]), [Request(ids, 8)])[0])
    for prompt in (
        tuple(ids),
        torch.tensor(ids),
        torch.tensor(ids, dtype=torch.int32),
        np.array(ids),
        list(np.array(ids)),
    ):
        request = Request(prompt, np.int64(8), stop=torch.tensor([PAD]))
        assert words(run(ContinuousBatch(model, suppress=np.array([PAD])), [request])[0]) == wanted
        assert request == Request(ids, 8, stop={PAD})
    request = Request(ids, 8)
    ids[1] = 10**9  # the list is the caller's: what becomes of it is not the request's
    assert words(run(ContinuousBatch(model, suppress=[PAD]), [request])[0]) == wanted


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"prompt": []}, ValueError, "prompt is empty; it must have at least one token"),
        ({"prompt": torch.ones(0)}, ValueError, "prompt is empty"),
        ({"prompt": 3}, TypeError, "prompt is a int; it must be a collection of token ids"),
        ({"prompt": None}, TypeError, "prompt is a NoneType; it must be a collection of token ids"),
        ({"prompt": "text"}, TypeError, "prompt is a str; it must be a collection of token ids"),
        ({"prompt": b"text"}, TypeError, "prompt is a bytes; it must be a collection of token ids"),
        ({"prompt": {3, 4}}, TypeError, "prompt is a set, which has no order"),
        ({"prompt": iter([3])}, TypeError, "prompt is a list_iterator; it must be a collection"),
        ({"prompt": [3, 4.0]}, TypeError, r"prompt\[1\] is a float; it must be an integer"),
        ({"prompt": [3, True]}, TypeError, r"prompt\[1\] is a bool; it must be an integer"),
        ({"prompt": [3, None]}, TypeError, r"prompt\[1\] is a NoneType; it must be an integer"),
        ({"prompt": ["3"]}, TypeError, r"prompt\[0\] is a str; it must be an integer"),
        ({"prompt": [[3, 4]]}, TypeError, r"prompt\[0\] is a list; it must be an integer"),
        ({"prompt": torch.tensor([[3, 4]])}, TypeError, r"prompt\[0\] is a list; it must be an integer"),
        ({"prompt": torch.tensor([3.0])}, TypeError, r"prompt\[0\] is a float; it must be an integer"),
        ({"prompt": torch.tensor([True])}, TypeError, r"prompt\[0\] is a bool; it must be an integer"),
        ({"prompt": [3, -1]}, ValueError, "prompt has token -1; ids must be 0 or more"),
        ({"max_tokens": 0}, ValueError, "max_tokens is 0; it must be at least 1"),
        ({"max_tokens": 5.0}, TypeError, "max_tokens is a float; it must be an integer"),
        ({"max_tokens": True}, TypeError, "max_tokens is a bool; it must be an integer"),
        ({"max_tokens": "5"}, TypeError, "max_tokens is a str; it must be an integer"),
        ({"temperature": float("nan")}, ValueError, "temperature is nan; it must be between 0 and 3.4"),
        ({"temperature": -0.1}, ValueError, "temperature is -0.1; it must be between 0 and 3.4"),
        ({"temperature": float("inf")}, ValueError, "temperature is inf; it must be between 0 and 3.4"),
        ({"temperature": 1e39}, ValueError, r"temperature is 1e\+39; it must be between 0 and 3.4"),
        ({"temperature": 10**400}, ValueError, "temperature is inf; it must be between 0 and 3.4"),
        ({"temperature": None}, TypeError, "temperature is a NoneType; it must be a float"),
        ({"temperature": "1"}, TypeError, "temperature is a str; it must be a float"),
        ({"temperature": True}, TypeError, "temperature is a bool; it must be a float"),
        ({"top_p": 1.5}, ValueError, "top_p is 1.5; it must be between 0 and 1"),
        ({"top_p": float("nan")}, ValueError, "top_p is nan; it must be between 0 and 1"),
        ({"top_p": [0.9]}, TypeError, "top_p is a list; it must be a float"),
        ({"seed": None}, TypeError, "seed is a NoneType; it must be an integer"),
        ({"seed": 1.0}, TypeError, "seed is a float; it must be an integer"),
        ({"seed": 1 << 64}, ValueError, "seed is 18446744073709551616; it must be at most 18446744073709551615"),
        (
            {"seed": -(1 << 63) - 1},
            ValueError,
            "seed is -9223372036854775809; it must be at least -9223372036854775808",
        ),
        ({"stop": 5}, TypeError, "stop is a int; it must be a collection of token ids"),
        ({"stop": None}, TypeError, "stop is a NoneType; it must be a collection of token ids"),
        ({"stop": "."}, TypeError, "stop is a str; it must be a collection of token ids"),
        ({"stop": ["."]}, TypeError, r"stop\[0\] is a str; it must be an integer"),
        ({"stop": [None]}, TypeError, r"stop\[0\] is a NoneType; it must be an integer"),
        ({"stop": [[5]]}, TypeError, r"stop\[0\] is a list; it must be an integer"),
        ({"stop": [-5]}, ValueError, "stop has token -5; ids must be 0 or more"),
    ],
)
def test_a_request_that_is_wrong_is_not_made(settings: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        Request(**{"prompt": [3, 4], "max_tokens": 3, **settings})


def test_the_ends_of_what_a_request_may_be_do_run(model) -> None:
    settings = [
        {"seed": (1 << 64) - 1, "temperature": 1.0},
        {"seed": -(1 << 63), "temperature": 1.0},
        {"temperature": float(torch.finfo(torch.float32).max)},
        {"temperature": 5e-324, "top_p": 0.0},
        {"temperature": 1e-42},
        {"temperature": np.float32(0.5), "top_p": 1},
        {"max_tokens": 1 << 80, "stop": range(97)},
    ]
    requests = [Request(**{"prompt": [9, 8], "max_tokens": 4, **s}) for s in settings]
    given = run(ContinuousBatch(model, suppress=[PAD]), requests)
    assert [len(given[i]) for i in range(len(requests))] == [4] * 6 + [1]
    for i in (3, 4):  # as good as none
        assert words(given[i]) == greedy(model, Request([9, 8], 4))


@pytest.mark.parametrize(
    ("request_", "kind", "message"),
    [
        (Request([3, 97], 1), ValueError, "prompt has token 97; ids must be from 0 to 96"),
        (Request([3], 1, stop=[1, 1 << 70]), ValueError, f"stop has token {1 << 70}; ids must be from 0 to 96"),
        ([3, 4], TypeError, "request is a list; it must be a Request"),
    ],
)
def test_a_bad_request_costs_the_others_nothing(model, request_, kind: type[Exception], message: str) -> None:
    batch, good = ContinuousBatch(model, max_batch=2, suppress=[PAD]), Request([3, 4], 6)
    first = batch.submit(good)
    given = batch.step()
    with pytest.raises(kind, match=f"^{message}"):
        batch.submit(request_)
    second = batch.submit(good)
    while batch.busy:
        given += batch.step()
    for number in (first, second):
        assert words([t for t in given if t.request == number]) == greedy(model, good)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"max_batch": 0}, ValueError, "max_batch is 0; it must be at least 1"),
        ({"max_batch": 2.0}, TypeError, "max_batch is a float; it must be an integer"),
        ({"prefill_tokens": 0}, ValueError, "prefill_tokens is 0; it must be at least 1"),
        ({"prefill_tokens": None}, TypeError, "prefill_tokens is a NoneType; it must be an integer"),
        (
            {"state_dtype": torch.float8_e4m3fn},
            TypeError,
            "state_dtype is torch.float8_e4m3fn; for a model in torch.float32 it must",
        ),
        (
            {"state_dtype": torch.float64},
            TypeError,
            "state_dtype is torch.float64; for a model in torch.float32 it must",
        ),
        ({"recent_tokens": -1}, ValueError, "recent_tokens is -1; it must be at least 0"),
        ({"recent_tokens": 65}, ValueError, "recent_tokens is 65; it must be at most 64"),
        ({"recent_tokens": True}, TypeError, "recent_tokens is a bool; it must be an integer"),
        ({"suppress": 0}, TypeError, "suppress is a int; it must be a collection of token ids"),
        ({"suppress": [97]}, ValueError, "suppress has token 97; ids must be from 0 to 96"),
        ({"suppress": [-1]}, ValueError, "suppress has token -1; ids must be 0 or more"),
        ({"suppress": range(97)}, ValueError, "suppress has all 97 tokens; there must be one to generate"),
    ],
)
def test_refuses(model, settings: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        ContinuousBatch(model, **settings)


@pytest.mark.parametrize(("prefill_tokens", "recent"), [(7, 0), (2048, 0), (7, 3)])
@torch.no_grad()
def test_nan_in_a_request_stays_in_it(model, prefill_tokens: int, recent: int) -> None:
    bad = [Request([3] * n + [50] + [4] * 9, 6, temperature=t) for n in (0, 70) for t in (0.0, 1.0)]
    good = [Request([*range(5, 5 + n)], m, temperature=t) for n, m, t in ((1, 9, 0.0), (30, 12, 1.0), (40, 5, 0.0))]
    both = [*bad, *good, *bad, *good]  # in few rows: those of the bad ones come to the good ones
    given = []
    for value in (0.0, torch.nan, torch.inf):
        model.model.embed_tokens.weight[50] = value
        batch = ContinuousBatch(
            model, max_batch=5, prefill_tokens=prefill_tokens, suppress=[PAD, 50], recent_tokens=recent
        )
        tokens = run(batch, both, [3 * i for i in range(len(both))])
        given.append([words(tokens[i]) for i in range(len(both)) if both[i] in good])
    assert given[0] == given[1] == given[2]


def test_a_float64_model_generates(model) -> None:
    request = Request([*range(3, 40)], 12)
    batch = ContinuousBatch(model.double(), max_batch=2, prefill_tokens=16, suppress=[PAD])
    assert {state.dtype for state in batch.states} == {torch.float64}
    assert words(run(batch, [request])[0]) == greedy(model, request)
    assert ContinuousBatch(model, state_dtype=torch.float32).states[0].dtype == torch.float32
    with pytest.raises(TypeError, match=r"torch.int32; for a model in torch.float64 it must be torch.float64 or "):
        ContinuousBatch(model, state_dtype=torch.int32)


def test_a_vocabulary_that_has_grown_is_known(model) -> None:
    model.resize_token_embeddings(103)
    batch = ContinuousBatch(model, suppress=[PAD])
    assert words(run(batch, [Request([102, 5], 6)])[0]) == greedy(model, Request([102, 5], 6))
    with pytest.raises(ValueError, match=r"^prompt has token 103; ids must be from 0 to 102"):
        batch.submit(Request([103], 1))


def test_rings_are_for_many_states_on_a_gpu():
    def pool(rows, dtype=torch.float32, device="meta"):
        return torch.empty(rows, 8, 16, 16, dtype=dtype, device=device)

    assert engine._is_worth_rings(pool(64))
    assert engine._is_worth_rings(pool(256, torch.bfloat16))
    others = pool(63), pool(255, torch.float16), pool(256, torch.float64), pool(256, device="cpu"), None, [pool(256)]
    for other in others:
        assert not engine._is_worth_rings(other)
