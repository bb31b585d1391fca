"""Models and layers over slices of rows against themselves over the whole rows, on 2 and 3 gloo processes."""

import json
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers")

from lightning_attention.distributed import sequence_parallel
from lightning_attention.models.arguments import CACHE
from lightning_attention.models.transnormer import TransnormerConfig, TransnormerForCausalLM, slices
from lightning_attention.nn import LightningAttention, token_positions
from tests.distributed.ranks import run_cases, spawn
from tests.support.examples import load
from tests.support.numerics import relative_error

DOCS = Path(__file__).parents[2] / "docs" / "distributed.md"
RANKS = 3
TOLERANCE = 2e-5  # float32, three blocks
WRONG = 1e-3


@dataclass(frozen=True)
class Case:
    """lengths[r] is rank r's T; cuts has the borders of documents in each of the rows."""

    lengths: tuple[int, ...]
    rows: int = 1
    cuts: tuple[tuple[int, ...], ...] | None = None
    by: str = "cu_seqlens"  # what says where documents begin
    padded: bool = False
    unlearned: bool = False  # the second rank has no labels
    items: int | None = None
    checkpointed: bool = False
    compiled: bool = False
    skip_logits: bool = False
    hidden: bool = False  # hidden states are returned too
    break_with: str = ""

    @property
    def length(self) -> int:
        return sum(self.lengths)


STREAM = (0, 7, 30, 30, 31, 58, 60)
CASES = [
    Case((30, 30)),
    Case((20, 20, 20), rows=2, hidden=True),
    Case((1, 40, 2), rows=2),
    Case((30, 30), items=17),
    Case((20, 20, 20), unlearned=True),
    Case((20, 20, 20), cuts=(STREAM,)),
    Case((20, 20, 20), cuts=(STREAM,), checkpointed=True, hidden=True),
    Case((20, 20, 20), cuts=((0, 20, 40, 60),)),  # borders of documents are borders of slices
    Case((20, 20, 20), cuts=((0, 5, 60),)),  # one has all of the second slice, and begins before it
    Case((20, 20, 20), cuts=((0, 60),)),
    Case((10, 41, 9), cuts=((0, 9, 10, 11, 50, 51, 52, 60),)),
    Case((1, 1, 1), cuts=((0, 2, 3),)),
    Case((20, 20, 20), cuts=(STREAM,), by="position_ids"),
    Case((20, 20, 20), rows=3, cuts=(STREAM, (0, 60), (0, 20, 21, 60)), by="position_ids", hidden=True),
    Case((30, 30), rows=2, cuts=((0, 60), (0, 60)), by="position_ids"),
    Case((20, 20, 20), rows=3, padded=True, checkpointed=True),
    Case((10, 30, 20), skip_logits=True),
    Case((20, 20, 20), cuts=(STREAM,), skip_logits=True, items=17),
]
COMPILED = [Case((20, 25), cuts=((0, 7, 30, 45),), compiled=True, skip_logits=True)]
BROKEN = [
    Case((10, 20, 30), break_with="no exchange"),
    Case((20, 20, 20), cuts=(STREAM,), break_with="no exchange"),
    Case((20, 20, 20), cuts=((0, 5, 60),), by="position_ids", break_with="no exchange"),
    Case((20, 20, 20), break_with="no next label"),
]


def tiny(layers: int = 3) -> TransnormerForCausalLM:
    """Weights so large that every part matters, and LRPE in the first block and the last."""
    torch.manual_seed(0)
    config = TransnormerConfig(
        vocab_size=97, decoder_embed_dim=32, decoder_layers=layers, decoder_attention_heads=2, hidden_dim=48,
        glu_dim=40, linear_use_lrpe_list=[1, 0, 1][:layers],
    )  # fmt: skip
    model = TransnormerForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and "embed" not in name:
                p.normal_(std=0.15)
    return model


def whole_batch(case: Case) -> dict[str, Tensor]:
    ids = torch.randint(3, 97, (case.rows, case.length))
    batch = {"input_ids": ids, "labels": ids.clone()}
    if case.cuts is not None:
        if case.by == "cu_seqlens":
            batch["cu_seqlens"] = torch.tensor(case.cuts[0])
        else:
            batch["position_ids"] = torch.stack(
                [torch.cat([torch.arange(n) for n in torch.tensor(cuts).diff().tolist()]) for cuts in case.cuts]
            )
    if case.padded:
        batch["attention_mask"] = torch.randint(0, 4, ids.shape).clamp(max=1)
        batch["attention_mask"][0] = 1
        batch["attention_mask"][1, : case.lengths[0] + 3] = 0  # more than the first slice
        batch["labels"][batch["attention_mask"] == 0] = -100
    if case.unlearned:
        batch["labels"][:, case.lengths[0] : sum(case.lengths[:2])] = -100
    if case.items is not None:
        batch["num_items_in_batch"] = torch.tensor(case.items)
    return batch


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def broken(case: Case) -> AbstractContextManager:
    """What forgetting something would change."""
    if case.break_with == "no exchange":  # every rank takes the others for copies of itself
        return mock.patch.object(sequence_parallel, "gathered", lambda x, group: x[None].expand(group.size(), *x.shape))
    if case.break_with == "no next label":
        return mock.patch.object(slices, "next_tokens", lambda labels, *_: F.pad(labels[:, 1:], (0, 1), value=-100))
    return nullcontext()


def run_case(case: Case, seed: int, rank: int, group: dist.ProcessGroup) -> dict[str, float]:
    """The largest error of loss, logits and gradients over the ranks."""
    model = tiny(1 if case.compiled else 3).train()
    torch.manual_seed(seed)
    batch = whole_batch(case)
    whole = model(**batch, use_cache=False, output_hidden_states=case.hidden, skip_logits=False)
    whole.loss.backward()
    expected = gradients(model)

    start = sum(case.lengths[:rank])
    own = slice(start, start + case.lengths[rank])
    part = {name: x[:, own] if x.ndim == 2 else x for name, x in batch.items()}
    if case.checkpointed:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if case.compiled else model
    with broken(case):
        out = call(**part, group=group, output_hidden_states=case.hidden, skip_logits=case.skip_logits)
        out.loss.backward()
    real = torch.ones(case.rows, case.lengths[rank], dtype=torch.bool)
    if case.padded:
        real = part["attention_mask"].bool()
    errors = {"loss": relative_error(out.loss, whole.loss)}
    pairs = {} if case.skip_logits else {"logits": (out.logits, whole.logits)}
    if case.hidden:
        assert len(out.hidden_states) == len(whole.hidden_states) == 4
        pairs |= {f"hidden {i}": (out.hidden_states[i], whole.hidden_states[i]) for i in range(4)}
    errors |= {name: relative_error(x[real], y[:, own][real]) for name, (x, y) in pairs.items()}
    for name, grad in gradients(model).items():
        dist.all_reduce(grad, group=group)  # the mean over the ranks
        errors[name] = relative_error(grad / len(case.lengths), expected[name])
    worst = torch.tensor([*errors.values()], dtype=torch.double).nan_to_num(nan=torch.inf)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=group)
    return dict(zip(errors, worst.tolist(), strict=True))


def hybrid_errors(rank: int, group: dist.ProcessGroup) -> dict[str, float]:
    """The example of a hybrid model, whose eighth layer has softmax attention; its labels come shifted."""
    hybrid, T = load("hybrid"), 10
    torch.manual_seed(1)
    model = hybrid.Hybrid(40, width=32, heads=2)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(std=0.2)
    ids = torch.randint(40, (2, RANKS * T + 1))
    whole = model(ids[:, :-1])[0]
    F.cross_entropy(whole.flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected, own = gradients(model), slice(rank * T, (rank + 1) * T)
    logits, carried = model(ids[:, :-1][:, own], group=group)
    assert carried == [None] * 8
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:][:, own].flatten()).backward()
    errors = {"logits": relative_error(logits, whole[:, own])}
    for name, grad in gradients(model).items():
        dist.all_reduce(grad, group=group)
        errors[name] = relative_error(grad / RANKS, expected[name])
    return errors


def layer_errors(rank: int, group: dist.ProcessGroup) -> dict[str, float]:
    """A layer with rope over slices of packed sequences, as the operation takes them; the third is on one alone."""
    lengths = torch.tensor([[9, 4, 1], [0, 7, 0], [8, 3, 0]])  # ranks, sequences
    layer = LightningAttention.bailing(32, 4, layer=0, num_layers=2).double()
    torch.manual_seed(2)
    x, weight = torch.randn(2, 1, int(lengths.sum()), 32, dtype=torch.double)
    torch.manual_seed(0)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    whole_cuts = F.pad(lengths.sum(0).cumsum(0), (1, 0))
    starts = whole_cuts[:-1] + lengths[:rank].sum(0)
    places = torch.cat([torch.arange(s, s + n) for s, n in zip(starts.tolist(), lengths[rank].tolist(), strict=True)])
    whole, state = layer(x, cu_seqlens=whole_cuts, output_state=True)
    (whole * weight).sum().backward()
    expected = gradients(layer)
    cuts = F.pad(lengths[rank].cumsum(0), (1, 0))
    positions = token_positions(x[:, places], cu_seqlens=cuts, group=group)
    assert torch.equal(positions, token_positions(x, cu_seqlens=whole_cuts)[places])
    padded = token_positions(torch.empty(1, len(places) + 2), cu_seqlens=cuts.int(), group=group)
    assert torch.equal(padded[: len(places)], positions)
    out, last = layer(x[:, places], positions=positions, cu_seqlens=cuts, output_state=True, group=group)
    (out * weight[:, places]).sum().backward()
    errors = {"output": relative_error(out, whole[:, places]), "state": relative_error(last, state)}
    for name, grad in gradients(layer).items():
        dist.all_reduce(grad, group=group)
        errors[name] = relative_error(grad, expected[name])
    return errors


def work(rank: int, ranks: int, cases: list[Case], folder: str) -> None:
    groups = run_cases(rank, ranks, cases, folder, run_case)
    if ranks < RANKS:
        dist.destroy_process_group()
        return
    others = {"hybrid": hybrid_errors(rank, groups[-1]), "layer": layer_errors(rank, groups[-1])}
    Path(folder, f"others{rank}.json").write_text(json.dumps(others))
    os.environ["WORLD_SIZE"] = str(ranks)
    example = DOCS.read_text(encoding="utf-8").split("## Layers and models")[1].split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(example, names)  # which ends the process group
    assert names["difference"] < TOLERANCE


def failures(results: list[tuple[Case, dict[str, float]]]) -> list[tuple[Case, dict[str, float]]]:
    far = [(case, {name: e for name, e in errors.items() if e > TOLERANCE}) for case, errors in results]
    return [(case, errors) for case, errors in far if errors]


def test_slices_of_rows_are_the_rows(tmp_path: Path) -> None:
    """And the example in the documentation runs."""
    results = spawn(work, CASES + BROKEN, tmp_path)
    assert not failures(results[: len(CASES)])
    for case, errors in results[len(CASES) :]:
        for name in ["lm_head.weight"] if case.break_with == "no next label" else ["logits", "lm_head.weight"]:
            assert errors[name] > WRONG, (case.break_with, name)
    for rank in range(RANKS):
        others = json.loads((tmp_path / f"others{rank}.json").read_text())
        assert max(others["hybrid"].values()) <= TOLERANCE, others["hybrid"]
        assert max(others["layer"].values()) <= 1e-13, others["layer"]


@pytest.mark.slow
def test_compiled_without_a_graph_break(tmp_path: Path) -> None:
    assert not failures(spawn(work, COMPILED, tmp_path))


def test_wrong_use_of_the_model(group: dist.ProcessGroup) -> None:
    model, ids = tiny(), torch.randint(3, 97, (1, 12))
    cache = model(ids, use_cache=True)[CACHE]
    assert getattr(model(ids, group=group), CACHE) is None  # though the configuration asks for one, in evaluation
    for wrong, error, message in (
        ({"group": "sp"}, TypeError, r"group is a str; it must be a torch\.distributed ProcessGroup"),
        ({"use_cache": True}, ValueError, "use_cache is True together with group"),
        ({CACHE: cache}, ValueError, "cache is given together with group"),
        ({"attention_mask": torch.ones(1, 24)}, ValueError, r"attention_mask is \[1, 24\]; with group .* \[1, 12\]"),
        ({"position_ids": torch.arange(24)[None]}, ValueError, r"position_ids is \[1, 24\]"),
        (
            {"cu_seqlens": torch.tensor([0, 6])},
            ValueError,
            "cu_seqlens ends at 6 and the slices have 12 tokens",
        ),
        ({"cu_seqlens": torch.tensor([0, 12]), "attention_mask": torch.ones(1, 12)}, ValueError, "cu_seqlens is given"),
        ({"input_ids": ids[:, :0]}, ValueError, "a slice has 0 tokens"),
    ):
        with pytest.raises(error, match=message):
            model(**{"input_ids": ids, "group": group} | wrong)
        with pytest.raises(error, match=message):
            model.model(**{"input_ids": ids, "group": group} | wrong)


def test_wrong_use_of_a_layer_and_of_the_hybrid(group: dist.ProcessGroup) -> None:
    layer, x, cuts = LightningAttention.minicpm_sala(16, 2), torch.randn(1, 6, 16), torch.tensor([0, 2, 4])
    with pytest.raises(ValueError, match=r"positions is None and group is given; .* nn\.token_positions"):
        layer(x, group=group)
    at = token_positions(x)
    with pytest.raises(TypeError, match="group is a str"):
        layer(x, positions=at, group="sp")
    with pytest.raises(TypeError, match="group is a str"):
        token_positions(x, group="sp")
    with pytest.raises(ValueError, match="local_cu_seqlens is given without group"):
        layer(x, cu_seqlens=cuts, local_cu_seqlens=cuts)
    with pytest.raises(ValueError, match="local_cu_seqlens is given without cu_seqlens"):
        layer(x, positions=at, local_cu_seqlens=cuts, group=group)
    model, ids = load("hybrid").Hybrid(width=16), torch.randint(256, (1, 6))
    with pytest.raises(ValueError, match="cache is given together with group"):
        model(ids, model(ids)[1], 6, group)
