"""A model made ready for training: activation checkpointing, then compiled blocks, then sharded weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from lightning_attention.distributed.mesh import Mesh

_BF16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32)


def parallelize(
    model: nn.Module,
    mesh: Mesh,
    *,
    activation_checkpointing: str = "none",
    compile: bool = False,
    bf16: bool = False,
) -> None:
    """Change a model in place; it may be on the meta device. Names of modules and weights stay as they are.

    Args:
        model: any model with one list of blocks, such as TransnormerForCausalLM or transformers' LlamaForCausalLM.
        mesh: over which processes the weights are sharded; without groups nothing is. A block is a unit: its weights
            are gathered before it runs and freed after. What is outside of blocks, tied embeddings too, is one more.
        activation_checkpointing: ``none``; ``block``: keep only the inputs of blocks and recompute the rest in the
            backward pass; or a number n, which does that to every n-th block.
        compile: run each block through ``torch.compile``.
        bf16: gather and compute in bfloat16, reduce gradients in float32. For a mesh with groups; autocast does that
            for one without. A block with a module that ``needs_float32``, such as LRPE, is gathered in float32 and
            computed under autocast.

    Raises:
        ValueError: ``activation_checkpointing`` is something else, the model has no list of blocks, or a block that is
            to be sharded, or what is outside of blocks, learns weights of several dtypes, as a block with LRPE in a
            model made in bfloat16. Frozen ones may have another.
    """
    every = checkpointed_every(activation_checkpointing)
    blocks = find_blocks(model)
    # Only `forward` is replaced: no name changes, and what FSDP does around a block stays out of compiled graphs. That
    # is why nothing within a block is a unit of its own: its weights are gathered in one precision.
    if mesh.shard_mesh is not None:
        _check_dtypes(model, blocks)
    policies = dict.fromkeys(blocks, MixedPrecisionPolicy())
    if mesh.shard_mesh is not None and bf16:
        for block in blocks:
            if any(getattr(module, "needs_float32", False) for module in block.modules()):
                block.forward = _in_bf16(block.forward, mesh.shard_mesh.device_type)
            else:
                policies[block] = _BF16
    if every:
        for block in blocks[every - 1 :: every]:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if compile:
        for block in blocks:
            block.forward = torch.compile(block.forward)
    if mesh.shard_mesh is not None:
        for block, policy in policies.items():
            fully_shard(block, mesh=mesh.shard_mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh.shard_mesh, mp_policy=_BF16 if bf16 else MixedPrecisionPolicy())


def _check_dtypes(model: nn.Module, blocks: list[nn.Module]) -> None:
    """Refuse two dtypes in a unit: FSDP reduces its gradients in one tensor, and FSDP's own error names no weight."""
    unit_of = {weight: i for i, block in enumerate(blocks) for weight in block.parameters()}
    dtypes: dict[int, dict[torch.dtype, str]] = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            dtypes.setdefault(unit_of.get(weight, -1), {}).setdefault(weight.dtype, name)
    for unit, known in dtypes.items():
        if len(known) > 1:
            where = "outside of blocks" if unit < 0 else "in one block"
            found = ", ".join(f"{name} {dtype}" for dtype, name in known.items())
            raise ValueError(
                f"model learns weights of several dtypes {where} ({found}), which cannot be sharded together; "
                "give it float32 weights, and bf16=True to compute in bfloat16"
            )


def _in_bf16(forward: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """The forward pass under autocast."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device_type, torch.bfloat16):
            return forward(*args, **kwargs)

    return run


def checkpointed_every(choice: str) -> int:
    """Every how many blocks activations are recomputed; 0 for none. Raises ValueError for an unknown choice."""
    named = {"none": 0, "block": 1}
    if choice in named:
        return named[choice]
    if not choice.isdecimal() or int(choice) < 1:
        raise ValueError(f"activation_checkpointing is {choice!r}; it must be none, block or a number, at least 1")
    return int(choice)


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model: the members of the list of modules that has the most weights. Raises ValueError."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no nn.ModuleList of blocks to compile, checkpoint or shard")
    return max(lists, key=lambda blocks: sum(_weights(block) for block in blocks))


def synchronise_gradients(model: nn.Module, wanted: bool) -> None:
    """Whether the next backward pass reduces gradients over the mesh; between the parts of a step there is no need."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)


def reshard(model: nn.Module) -> None:
    """Make a model's parameters its shards again, after forward passes without a backward pass.

    FSDP would leave what is outside of blocks gathered, in the precision that it computes in.
    """
    if isinstance(model, FSDPModule):
        model.reshard()


def _weights(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
