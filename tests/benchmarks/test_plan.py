import contextlib
import io
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import plan
from lightning_attention import lightning_attention
from lightning_attention.distributed import sequence_parallel
from lightning_attention.models.transnormer import TransnormerConfig, TransnormerForCausalLM
from lightning_attention.training.flops import Shape

DOCUMENT = Path(plan.__file__).parents[1] / "docs" / "distributed.md"
CONFIG = TransnormerConfig(
    vocab_size=64, decoder_embed_dim=32, decoder_layers=3, decoder_attention_heads=4, glu_dim=48, hidden_dim=16,
)  # fmt: skip
SHAPE = Shape.of(CONFIG)


@pytest.fixture
def four_ranks():
    """The first of four processes, of which the others do not exist: collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield init_device_mesh("cpu", (4,), mesh_dim_names=("shard",))
    dist.destroy_process_group()


class Collectives(TorchDispatchMode):
    """Bytes of the whole tensors that are gathered or reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name.startswith("c10d."):
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            self.bytes["scatter" if "scatter" in name else "gather"] += max(x.nbytes for x in tensors)
        return func(*args, **(kwargs or {}))


def one_step(model: torch.nn.Module) -> dict[str, int]:
    """Bytes of weights, gradients and AdamW's moments on this rank, after a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
    ids = torch.arange(60)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()

    def local(tensors) -> int:
        return sum(getattr(x, "_local_tensor", x).nbytes for x in tensors)

    weights = list(model.parameters())
    moments = [x for state in optimizer.state.values() for x in state.values() if x.ndim]
    return {"weights": local(weights), "gradients": local(p.grad for p in weights), "optimizer": local(moments)}


def test_what_lasts_is_what_a_model_has():
    measured = one_step(TransnormerForCausalLM(CONFIG))
    assert measured == plan.state_bytes(SHAPE, plan.Job(1, 1, 1, 60, 60))


def test_a_sharded_model_has_its_share_and_moves_what_the_plan_says(four_ranks):
    model = TransnormerForCausalLM(CONFIG)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for block in model.model.layers:
        fully_shard(block, mesh=four_ranks, mp_policy=policy)
    fully_shard(model, mesh=four_ranks, mp_policy=policy)
    job = plan.Job(1, 2, 2, 60, 30)
    with Collectives() as seen:
        measured = one_step(model)
    assert measured == plan.state_bytes(SHAPE, job)
    planned = plan.fsdp_traffic(SHAPE, job)
    # A rank receives all but its own quarter.
    assert seen.bytes["gather"] * 3 / 4 == planned["weights"]
    assert seen.bytes["scatter"] * 3 / 4 == planned["gradients"]
    assert planned["replicas"] == 0


def test_a_block_keeps_what_the_plan_says():
    """But for three factors of norms a token, and the decays."""
    layer = TransnormerForCausalLM(CONFIG).model.layers[1]
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    T, kept = 256, {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x  # held, so that no address comes twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        layer(torch.randn(1, T, 32, requires_grad=True), positions=torch.arange(T))
    numbers = sum(x.untyped_storage().nbytes() for x in kept.values()) / 4
    assert 0 <= numbers - T * plan.kept_a_block(SHAPE) <= 3 * T + 4


@pytest.mark.parametrize(("every", "whole", "inputs"), [(0, 3, 0), (1, 1, 3), (2, 3, 1), (3, 3, 1), (4, 3, 0)])
def test_checkpointed_blocks_keep_their_inputs(every, whole, inputs):
    job = plan.Job(1, 2, 2, 60, 30)
    assert plan.activation_bytes(SHAPE, job, every) == 2 * 30 * (whole * plan.kept_a_block(SHAPE) + inputs * 32)


def test_states_are_what_the_operator_sends(four_ranks, monkeypatch):
    sent = []
    gather = sequence_parallel._all_gather
    monkeypatch.setattr(sequence_parallel, "_all_gather", lambda *a: (sent.append(a[2].nbytes), gather(*a))[1])
    q, k, v = (torch.randn(2, 32, 4, 4, requires_grad=True) for _ in range(3))
    log_decay = torch.full((4,), -0.1)
    out = lightning_attention(q, k, v, log_decay, group=four_ranks.get_group("shard")).output
    out.sum().backward()
    job = plan.Job(1, 1, 4, 4 * 32, 64)
    assert job.sequences == 2
    layer = Shape.of(TransnormerConfig(decoder_layers=1, decoder_attention_heads=4, decoder_embed_dim=16, glu_dim=8,
                                       linear_use_lrpe_list=[0]))  # fmt: skip
    assert len(sent) == 2
    assert 3 * sum(sent) == plan.sequence_traffic(layer, job, 0)["states"]
    again = 3 * (2 * sent[0] + sent[1])  # forward twice where the block is checkpointed
    assert again == plan.sequence_traffic(layer, job, 1)["states"]


def test_tokens_travel_in_softmax_models():
    job = plan.Job(1, 1, 4, 4 * 32, 64)
    own = plan.sequence_traffic(SHAPE, job, 0)
    # Each of 3 layers: k and v, of 16 numbers a token, three times to the next; backward with their gradients.
    assert own["ring"] == 3 * 3 * (2 * 64 * 16 * 2) * 3
    # q, k, v, out and their gradients, of which a quarter stays.
    assert own["Ulysses"] == 3 * (3 / 4) * (8 * 64 * 16 * 2)
    alone = plan.sequence_traffic(SHAPE, plan.Job(4, 1, 1, 64, 64), 0)
    assert set(alone.values()) == {0}


def test_replicas_add_their_shards_up():
    traffic = plan.fsdp_traffic(SHAPE, plan.Job(4, 2, 1, 60, 60))
    assert traffic["replicas"] == 2 * (3 / 4) * 4 * SHAPE.parameters / 2
    assert plan.fsdp_traffic(SHAPE, plan.Job(4, 1, 1, 60, 60))["weights"] == 0


def printed(arguments: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert plan.main(arguments) == 0
    return out.getvalue()


def test_the_document_shows_what_is_printed():
    text = DOCUMENT.read_text(encoding="utf-8")
    commands = re.findall(r"^    python -m benchmarks\.plan (.+)\n\n", text, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert f"    python -m benchmarks.plan {command}\n\n{printed(command.split())}\n" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["8B", "1x1x1:64"], "SIZE: name is '8B'; it must be one of "),
        (["7B", "1x1:64"], "MESH is '1x1:64'; it must be DP_REPLICATExDP_SHARDxSP:T, as 1x8x8:131072"),
        (["7B", "1x0x1:64"], "MESH is '1x0x1:64'; no size of it can be below 1"),
        (["7B", "1x1x2:1000"], "--tokens: 2 GPUs with 16384 tokens each have no whole number of sequences of 1000"),
        (["7B", "1x1x1:64", "--tokens", "0"], "--tokens must be at least 1, --checkpoint-every at least 0"),
    ],
)
def test_bad_arguments_say_what_is_wanted(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        plan.main(arguments)
    assert message in " ".join(capsys.readouterr().err.split())
