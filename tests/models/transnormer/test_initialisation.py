"""The model as torchtitan makes it: on the meta device, sharded, emptied, initialised."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_attention.models.transnormer import TransnormerConfig, TransnormerForCausalLM

SIZES = {
    "vocab_size": 301,
    "decoder_embed_dim": 32,
    "decoder_layers": 3,
    "decoder_attention_heads": 2,
    "glu_dim": 40,
    "linear_use_lrpe_list": [1, 0, 1],
    "init_std": 0.2,
}


def on_meta() -> TransnormerForCausalLM:
    with torch.device("meta"):
        return TransnormerForCausalLM(TransnormerConfig(**SIZES))


def spoil(model: TransnormerForCausalLM) -> None:
    """to_empty leaves whatever lay there; here something that cannot be missed."""
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            getattr(parameter, "to_local", lambda parameter=parameter: parameter)().fill_(torch.nan)


def check(model: TransnormerForCausalLM) -> None:
    expected = TransnormerForCausalLM(TransnormerConfig(**SIZES))
    for name, parameter in model.named_parameters():
        whole = getattr(parameter, "full_tensor", lambda parameter=parameter: parameter)().detach()
        if "theta" in name:
            assert torch.equal(whole, expected.get_parameter(name)), name
            continue
        assert math.isclose(float(whole.std()), 0.2, rel_tol=0.1), name
        if "embed_tokens" in name:
            assert not whole[0].any()
            assert whole[1:].any(1).all()
    for layer, other in zip(model.model.layers, expected.model.layers, strict=True):
        assert torch.equal(layer.token_mixer.log_decay, other.token_mixer.log_decay)
    ids = torch.randint(3, 97, (2, 20))
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        gradient = getattr(parameter.grad, "full_tensor", lambda parameter=parameter: parameter.grad)()
        assert gradient.isfinite().all(), name


def test_initialised_after_the_meta_device() -> None:
    model = on_meta()
    spoil(model)
    model.init_weights()
    check(model)


def _sharded(rank: int, ranks: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    mesh = dist.device_mesh.init_device_mesh("cpu", (ranks,))
    model = on_meta()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    spoil(model)
    model.init_weights()
    check(model)
    dist.barrier()  # a rank that leaves while the other receives can abort it
    dist.destroy_process_group()


def test_initialised_after_being_sharded_on_the_meta_device(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_sharded, (2, str(tmp_path)), nprocs=2)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_with_a_length_left_open(model: TransnormerForCausalLM, strict: bool) -> None:
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=4096)

    def inputs(rows: int, tokens: int) -> dict:
        mask = (torch.rand(rows, tokens) > 0.2).long()
        return {"input_ids": torch.randint(3, 97, (rows, tokens)), "attention_mask": mask, "use_cache": False}

    open_sizes = {0: batch, 1: length}
    shapes = {"input_ids": open_sizes, "attention_mask": open_sizes, "use_cache": None}
    with torch.no_grad():
        exported = torch.export.export(model, (), inputs(2, 20), dynamic_shapes=shapes, strict=strict).module()
        for rows, tokens in ((1, 2), (3, 64), (2, 333)):
            given = inputs(rows, tokens)
            real = given["attention_mask"].bool()
            torch.testing.assert_close(exported(**given).logits[real], model(**given).logits[real])
