import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import matplotlib.image
import pytest
import torch

from benchmarks.cases import serving
from benchmarks.cases.serving import EIGHT_BITS, HOST, RINGS, SUITE, Problem, Row, Scale, rows_of
from benchmarks.harness import find
from benchmarks.harness.pool import DECODE, EAGER, PREFILL, SPECULATE
from benchmarks.peers import _sglang, engines, vllm_layer
from lightning_attention import decay, lightning_attention
from lightning_attention.bench.peers import OURS
from tests.benchmarks.stand_ins import CULA

PACKINGS = (("equal", (5,) * 8, True), ("mixed", (40, 1, 1, 23), False))
SCALE = Scale(2, 16, torch.float32, (1, 3), PACKINGS, drafts=(3, 4), seconds=0.001)
RATE = 1e9

SEG_LA = """
from dataclasses import dataclass
import torch
from lightning_attention import lightning_attention

@dataclass
class SegLaMeta:
    batch_size: int
    max_q_length: int
    q_offsets: torch.Tensor
    s_offsets: torch.Tensor
    q_lengths: torch.Tensor
    s_scales: torch.Tensor
    mask: "torch.Tensor | None" = None

def seg_la_fwd(q, k, v, s, decay_scales, meta, caches=None, cache_indices=None, softmax_scale=None):
    assert meta.q_lengths.tolist() == meta.q_offsets.diff().tolist()
    assert meta.batch_size == len(meta.s_offsets) == len(meta.s_scales)
    slots = meta.s_offsets.long()
    initial = s[slots].to(q.dtype) * meta.s_scales[:, None, None, None]
    out, final = lightning_attention(q[None], k[None], v[None], -decay_scales, scale=softmax_scale,
        initial_state=initial, cu_seqlens=meta.q_offsets, output_final_state=True)
    if caches is None:
        s[slots] = final.to(s.dtype)
    else:  # the state after every draft; the last one is what is committed
        caches[cache_indices.long(), -1] = final.to(s.dtype)
    return out[0]
"""
LIGHTNING_ATTN = """
import torch

def linear_decode_forward_triton(q, k, v, kv_caches, slope_rate, slot_idx, BLOCK_SIZE=32):
    slots = slot_idx.long()
    new = kv_caches[slots] * torch.exp(-slope_rate)[:, None, None] + k.transpose(2, 3) * v
    kv_caches[slots] = new.to(kv_caches.dtype)
    return (q @ new).squeeze(2).flatten(1)
"""


def fused_recurrent_simple_gla(q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False):
    assert g is None
    return lightning_attention(
        q, k, v, g_gamma, scale=scale, initial_state=initial_state, output_final_state=output_final_state
    )


def peers(*names: str) -> list:
    return [p for name in names for p in find.peers()[name]]


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """A copy rate and a time on the host that take no time to measure."""
    monkeypatch.setattr(serving, "copy_rate", lambda _: RATE)
    monkeypatch.setattr(serving, "host_us", lambda call, _: call() is None or 7.0)


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """The peers need a GPU; modules with their signatures show that the arguments mean the same.

    SGLang's package refuses to be imported: only the files that have the kernels may be.
    """
    folder = tmp_path / "site" / "sglang" / "kernels" / "ops" / "attention" / "linear"
    folder.mkdir(parents=True)
    (tmp_path / "site" / "sglang" / "__init__.py").write_text("raise ImportError('a server was imported')")
    (folder / "seg_la.py").write_text(SEG_LA)
    (folder / "lightning_attn.py").write_text(LIGHTNING_ATTN)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for name in ("seg_la", "lightning_attn"):
        monkeypatch.setitem(sys.modules, f"_sglang_{name}", None)  # put back what was there
        monkeypatch.delitem(sys.modules, f"_sglang_{name}")
    fla, ops, simple_gla = (ModuleType(name) for name in ("fla", "fla.ops", "fla.ops.simple_gla"))
    simple_gla.fused_recurrent_simple_gla = fused_recurrent_simple_gla
    cula, lightning = ModuleType("cula"), ModuleType("cula.lightning")
    vars(lightning).update(CULA)
    for module in (fla, ops, simple_gla, cula, lightning):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield folder
    for name in ("seg_la", "lightning_attn"):
        sys.modules.pop(f"_sglang_{name}", None)


def output_error(r: dict) -> float:
    return 1e-2 if r["implementation"] == EIGHT_BITS else 1e-6


def state_error(r: dict) -> float:
    if r["implementation"] == EIGHT_BITS:
        return 1e-3
    return 1e-6 if r["state"] == "float32" else 3e-3


def test_ours_is_measured_everywhere_beside_the_training_forward(report, run, tmp_path):
    serving.measure(run(SCALE))
    found = [(r["what"], r["size"], r["state"], r["implementation"]) for r in report.find(SUITE)]
    assert found == [
        *(
            (DECODE, f"N = {N}", state, name)
            for state in ("float32", "bfloat16")
            for N in (1, 3)
            for name in (OURS, RINGS, EIGHT_BITS)
            if (state, name) != ("bfloat16", EIGHT_BITS)
        ),
        *((HOST, "N = 1", "float32", name) for name in (OURS, RINGS, EIGHT_BITS)),
        *((PREFILL, size, "float32", name) for size in ("equal", "mixed") for name in (OURS, "forward", "dense")),
        (SPECULATE, "N = 3, 4 drafts", "float32", OURS),
        *((SPECULATE, "N = 3, 4 drafts", "float32", name) for name in (RINGS, EIGHT_BITS, "decodes")),
    ]
    for r in report.find(SUITE):
        if r["implementation"] != "dense":  # another function
            assert 0 < r["output_error"] < output_error(r)
            assert 0 < r["state_error"] < state_error(r)
        assert r["us"] == 7 if r["what"] == HOST else r["ms"] > 0

    unit, state = 2 * 16 * 4, 2 * 16 * 16 * 4  # bytes of a row of q, and of a state
    for (what, size), moved in {
        (DECODE, "N = 3"): 4 * 3 * unit + 2 * 3 * state,
        (PREFILL, "equal"): 4 * 40 * unit + 8 * state,  # the states are only written
        (PREFILL, "mixed"): 4 * 65 * unit + 2 * 4 * state,
    }.items():
        (r,) = report.find(SUITE, what=what, size=size, state="float32", implementation=OURS)
        assert r["copy_fraction"] == pytest.approx(moved / RATE / (r["ms"] * 1e-3), rel=1e-4)

    (r,) = report.find(SUITE, what=DECODE, size="N = 3", state="bfloat16", implementation=RINGS)
    moved = 6 * 3 * unit + 15 * 3 * unit + 17 / 16 * 3 * state / 2  # of 16 steps, on average
    assert r["copy_fraction"] == pytest.approx(moved / RATE / (r["ms"] * 1e-3), rel=1e-4)
    assert r["slowest_ms"] >= r["ms"]

    records = report.find(SUITE)
    assert len(next(serving.tables(records)).rows) == 8
    serving.figure(records, report.environment).save(tmp_path / "decode.png")
    assert matplotlib.image.imread(tmp_path / "decode.png").shape[1] > 1500


@pytest.mark.usefixtures("stand_ins")
def test_the_peers_signatures_give_the_same_functions(report, run):
    serving.measure(run(SCALE, peers("seg_la", "fla", "vllm", "cula")))
    assert not [r for r in report.find(SUITE) if "error" in r]
    found = {(r["what"], r["state"]): [] for r in report.find(SUITE)}
    for r in report.find(SUITE):
        found[r["what"], r["state"]].append(r["implementation"])
        if r["implementation"] != "dense":
            assert r["output_error"] < output_error(r)
            assert r["state_error"] < state_error(r)
    assert found[DECODE, "float32"] == [OURS, "seg_la", "fla", "vllm", "cula", RINGS, EIGHT_BITS] * 2
    assert found[DECODE, "bfloat16"] == [OURS, "seg_la", "vllm", RINGS] * 2  # fla's states leave in float32, cuLA's are
    assert found[PREFILL, "float32"] == [OURS, "seg_la", "cula", "forward", "dense"] * 2
    assert found[SPECULATE, "float32"] == [OURS, "seg_la", "cula", RINGS, EIGHT_BITS, "decodes"]


def _vllms_prefill(q, k, v, kv_cache, rows, meta, slopes, block_size, decode_fn, _, layer_idx=None):
    """Its loop over prompts, from their definition: token i of a block, from 0, weighs what is older by λ^i."""
    slots, decay_of_heads = meta.state_indices_tensor_p, torch.exp(-slopes)[:, None, None]
    bounds, out = meta.query_start_loc[meta.num_decodes :].tolist(), []
    for n in range(meta.num_prefills):
        states = kv_cache[slots[n].item()]
        state, older, within = states.clone(), states, torch.zeros_like(states)
        for t in range(bounds[n], bounds[n + 1]):
            i = (t - bounds[n]) % block_size
            if i == 0:
                older, within = state, torch.zeros_like(states)
            new = k[t][:, :, None] * v[t][:, None, :]
            state, within = state * decay_of_heads + new, within * decay_of_heads + new
            out.append(torch.einsum("hd,hde->he", q[t], within + decay_of_heads**i * older).flatten())
        states.copy_(state)
    decoded = [decode_fn(q, k, v, kv_cache, rows, meta)] if meta.num_decodes else []
    return torch.cat([*decoded, torch.stack(out)])


def _clear(kv_cache, rows, meta):
    slots = meta.state_indices_tensor_p
    lengths, read = meta.query_start_loc.diff()[meta.num_decodes :], meta.seq_lens[meta.num_decodes :]
    for n in range(meta.num_prefills):
        if lengths[n] == read[n]:
            kv_cache[slots[n].item()] = 0


@pytest.fixture
def vllms(monkeypatch):
    """Functions that do what vLLM's do, in their place."""
    functions = {**vars(engines._VLLM), "linear_attention_prefill_and_mix": _vllms_prefill,
                 "clear_linear_attention_cache_for_new_sequences": _clear}  # fmt: skip
    theirs = SimpleNamespace(minimax=SimpleNamespace(**functions), bailing=SimpleNamespace())
    monkeypatch.setattr(vllm_layer, "vllm", lambda: theirs)
    return theirs.minimax


TOKENS_FIRST = replace(SCALE, packings=(("equal", (5,) * 8, True), ("mixed", (1, 1, 600, 23), False)))


@pytest.mark.usefixtures("vllms", "stand_ins")
def test_ours_by_the_engines_signatures_beside_the_engines(report, run):
    serving.measure(run(TOKENS_FIRST, peers("seg_la", "vllm_layer", "engines")))
    assert not [r for r in report.find(SUITE) if "error" in r]
    for what in (DECODE, PREFILL, SPECULATE):
        found = {r["implementation"] for r in report.find(SUITE, what=what)}
        assert {"seg_la", "vllm_layer", "as_sglang", "as_vllm"} <= found
    eager = [r["implementation"] for r in report.find(SUITE, what=EAGER)]
    assert eager == [OURS, "vllm_layer", "as_vllm"] * 2
    for r in report.find(SUITE):
        if r["implementation"] in ("as_sglang", "as_vllm", "vllm_layer"):
            assert r["output_error"] < 2e-6
            assert r["state_error"] < (2e-6 if r["state"] == "float32" else 3e-3)


@pytest.mark.usefixtures("vllms", "stand_ins")
def test_ours_is_held_against_the_engines_own(report, run):
    serving.measure(run(TOKENS_FIRST, peers("seg_la", "vllm_layer", "engines")))
    held = {"as_sglang": "seg_la", "as_vllm": "vllm_layer"}
    for r in report.find(SUITE):
        assert r.get("against") == held.get(r["implementation"])
        if "ratio" in r:
            of_row = {key: r[key] for key in ("what", "size", "state")}
            (own,) = report.find(SUITE, **of_row, implementation=r["against"])
            unit = "us" if r["what"] == HOST else "ms"
            assert r["ratio"] == pytest.approx(r[unit] / own[unit], rel=1e-3)
    _, ratios = serving.tables(report.find(SUITE))
    assert ratios.columns[3:] == ["ours as SGLang's\nover seg_la", "ours as vLLM's\nover vllm_layer"]
    assert len(ratios.rows) == 10
    assert all(row[3] for row in ratios.rows if row[0] != EAGER)
    assert all(row[4] for row in ratios.rows)


def test_vllms_layer_gets_float32_and_is_checked_by_what_it_is_known_to_give(report, run, vllms):
    """Its kernels for prompts do not compile for 16 bits; its layers make q, k and v float32."""
    taken = []
    decode = vllms.linear_attention_decode
    vllms.linear_attention_decode = lambda q, *rest: (taken.append(q.dtype), decode(q, *rest))[1]
    serving.measure(run(replace(TOKENS_FIRST, dtype=torch.bfloat16), peers("vllm_layer")))
    assert set(taken) == {torch.float32}
    assert not [r for r in report.find(SUITE, implementation="vllm_layer") if "error" in r]
    vllms.linear_attention_prefill_and_mix = engines._VLLM.linear_attention_prefill_and_mix  # the right output
    serving.measure(run(TOKENS_FIRST, peers("vllm_layer")))
    wrong = [r for r in report.find(SUITE, implementation="vllm_layer") if "error" in r]
    assert [(r["what"], r["size"]) for r in wrong] == [(PREFILL, "mixed"), (EAGER, "mixed")]  # it has older tokens
    assert all(r["error"].startswith("ArithmeticError: output_error") for r in wrong)


def test_only_the_rows_that_are_asked_for(report, run):
    at_work = run(SCALE)
    at_work.only = ["decode, N = 3, bfloat16", "prefill, mixed, float32"]
    serving.measure(at_work)
    assert {(r["what"], r["size"], r["state"]) for r in report.find(SUITE)} == {
        (DECODE, "N = 3", "bfloat16"), (PREFILL, "mixed", "float32")
    }  # fmt: skip
    names = [row.name for row in rows_of(SCALE)]
    assert list(serving.CASE.rows(SCALE)) == names
    assert len(set(names)) == len(names)


def test_a_missing_peer_is_reported_and_the_others_are_measured(report, run, monkeypatch):
    monkeypatch.setattr(_sglang, "find_spec", lambda _: None)
    monkeypatch.setitem(sys.modules, "fla", None)
    said = []
    at_work = run(SCALE, peers("seg_la", "fla"))
    at_work.say = said.append
    serving.measure(at_work)
    missing = report.find(SUITE, what=DECODE, size="N = 1", state="float32")
    assert missing[1]["error"].startswith("ModuleNotFoundError: sglang is not installed")
    assert missing[2]["error"].startswith("ModuleNotFoundError")
    assert all("ms" in r or "us" in r for r in report.find(SUITE, implementation=OURS))
    assert any("sglang is not installed" in line for line in said)
    assert "failed" in str(next(serving.tables(report.find(SUITE))))


def test_a_wrong_peer_is_not_timed(report, run, stand_ins):
    wrong = LIGHTNING_ATTN.replace("* torch.exp(-slope_rate)[:, None, None]", "")
    (stand_ins / "lightning_attn.py").write_text(wrong)
    serving.measure(run(SCALE, peers("vllm")))
    records = report.find(SUITE, implementation="vllm")
    assert len(records) == 5
    assert all(r["error"].startswith("ArithmeticError: output_error is ") and "ms" not in r for r in records)


def test_a_peer_that_ignores_slots_is_not_timed(report, run, stand_ins, monkeypatch):
    """As cuLA's decode did before its pull request 75: right for one sequence alone."""
    step = CULA["linear_attention_decode"]

    def in_order(q, k, v, s, out, **rest):
        step(q, k, v, s, out, **rest | {"s_offsets": torch.arange(len(q), dtype=torch.int32)})

    monkeypatch.setattr(sys.modules["cula.lightning"], "linear_attention_decode", in_order)
    serving.measure(run(replace(SCALE, decode=(1, 8)), peers("cula")))
    one, eight = report.find(SUITE, implementation="cula", what=DECODE)
    assert one["ms"] > 0
    assert eight["error"].startswith("ArithmeticError: output_error is ")
    assert "ms" not in eight


def test_our_own_wrong_numbers_are_a_failure(report, run, monkeypatch):
    monkeypatch.setattr(serving, "lightning_attention_decode", lambda q, *_, **__: torch.zeros_like(q))
    serving.measure(run(SCALE))
    assert [r["what"] for r in report.find(SUITE, implementation=OURS) if "error" in r] == [DECODE] * 4 + [HOST]


def test_a_state_in_the_wrong_slot_is_past_the_budget(cpu):
    problem = Problem(SCALE, Row(PREFILL, "", (3, 1, 7)), cpu)
    b = problem.batch
    out, final = lightning_attention(
        b.q[None], b.k[None], b.v[None], decay.alibi(2), initial_state=b.initial(), cu_seqlens=b.cu_seqlens,
        output_final_state=True,
    )  # fmt: skip
    assert problem.errors(out[0], final)["state_error"] < 1e-6
    with pytest.raises(ArithmeticError, match="state_error"):
        problem.errors(out[0], final[[1, 0, 2]])
    with pytest.raises(ArithmeticError, match="output_error"):
        problem.errors(1.01 * out[0], final)


def test_the_gpu_scale_has_the_sizes_that_are_reported():
    scale = serving.SCALES["cuda"]
    assert (scale.H, scale.D, scale.dtype, scale.decode) == (64, 128, torch.bfloat16, (1, 8, 32, 64, 256))
    assert [(len(lengths), sum(lengths)) for _, lengths, _ in scale.packings] == [(8, 16384), (8, 16384), (202, 8392)]
