"""The model and its optimizer on a device: what a step does to them, and what a checkpoint keeps of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lightning_attention.distributed.mesh import Mesh
from lightning_attention.distributed.parallelize import parallelize, reshard, synchronise_gradients
from lightning_attention.errors import DivergedError
from lightning_attention.training.config import TrainConfig
from lightning_attention.training.data import separate_documents
from lightning_attention.training.runtime import Runtime
from lightning_attention.training.weights import materialise


class Learner:
    """A model in training, whole or sharded over a mesh. Its weights and the optimizer's state are float32."""

    def __init__(
        self,
        config: TrainConfig,
        runtime: Runtime,
        model: PreTrainedModel,
        mesh: Mesh | None = None,
        given: Callable[[str, torch.Size], Tensor | None] | None = None,
    ) -> None:
        """Make the model ready on the device of `runtime`, with a new optimizer.

        Args:
            config: the settings of the run.
            runtime: device and precision.
            model: on the meta device; its weights are drawn with the seed of the run.
            mesh: the processes that share the work; None for this one.
            given: weights to go on with, by name and shape.
        """
        self._config = config
        self.runtime = runtime
        self.mesh = mesh or Mesh()
        parallelize(
            model,
            self.mesh,
            activation_checkpointing=config.activation_checkpointing,
            compile=config.compile,
            bf16=runtime.bf16,
        )
        torch.manual_seed(config.seed)
        materialise(model, runtime.device, given)
        self.model = model.train()
        self._sharded = self.mesh.shard_mesh is not None
        self._optimizer = _new_optimizer(config, self.model)
        nothing = torch.zeros((), device="cpu")
        self._latest = {"loss": nothing, "gradient norm": nothing}

    def predicted(self, windows: Tensor) -> int:
        """How many tokens of windows [b, t] have a loss: all but the first of each window."""
        return windows[:, 1:].numel()

    def loss(self, windows: Tensor, predicted: int) -> Tensor:
        """Negative log-likelihood of windows [b, t] int64, in nats, over `predicted`.

        Ranks that share the windows, a slice each, all get the loss of the whole. Its gradient is the mean of theirs.
        """
        inputs = {"input_ids": windows, "labels": windows}
        if self._config.documents == "separate":
            inputs |= separate_documents(windows, self.model.config.eos_token_id)
        inputs = {name: self._own_slice(name, whole).to(self.runtime.device) for name, whole in inputs.items()}
        options: dict[str, Any] = {"use_cache": False, "num_items_in_batch": predicted, "skip_logits": True}
        if self.mesh.sp_group is not None:
            options["group"] = self.mesh.sp_group
        with nullcontext() if self._sharded else self.runtime.autocast():
            loss: Tensor = self.model(**inputs, **options).loss
        return loss

    def _own_slice(self, name: str, whole: Tensor) -> Tensor:
        """A rank's slice of an input [b, t]: at least one token, however short a validation's last window is."""
        missing = max(0, self.mesh.sp - whole.shape[1])
        padded = F.pad(whole, (0, missing), value=-100 if "labels" in name else 0)
        return padded.tensor_split(self.mesh.sp, 1)[self.mesh.sp_rank]

    def step(self, windows: Tensor, learning_rate: float, predicted: int | None = None) -> tuple[Tensor, Tensor]:
        """One update of the weights. Collective.

        Args:
            windows: this data-parallel rank's share of the step, [b, t] int64; as many on each.
            learning_rate: of this step.
            predicted: tokens of the step that have a loss, over all ranks; None in one process.

        Returns:
            The mean loss in nats per token over all ranks before the update, and the norm of its gradient: scalars on
            the device.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        predicted = predicted or self.predicted(windows)
        loss = torch.zeros((), device=self.runtime.device)
        parts = windows.split(self._config.batch_size)
        for number, part in enumerate(parts, 1):
            synchronise_gradients(self.model, number == len(parts))
            share = self.loss(part, predicted)
            # FSDP takes the mean over all processes: right for those that share windows; what data-parallel ones have
            # adds up.
            (share * self.mesh.dp_size).backward()
            loss += share.detach()
        loss = self._over_ranks(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._config.clip or math.inf)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._latest = {"loss": loss, "gradient norm": norm}
        return loss, norm

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Tensor], count_bytes: Callable[[Tensor], int]) -> tuple[float, float]:
        """The loss on a text, in nats per token and bits per byte. Collective.

        Args:
            batches: windows [b, t] int64, of which all but the first tokens are predicted; the same on every rank.
                The data-parallel ranks share the windows of a batch.
            count_bytes: how many bytes of text tokens stand for.
        """
        nats = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        tokens = text_bytes = 0
        self.model.eval()
        for windows in batches:
            own = windows.tensor_split(self.mesh.dp_size)[self.mesh.dp_rank]
            # Every rank takes part in every forward pass, since weights are gathered in it.
            loss = self.loss(own if len(own) else windows[:1], 1)
            if len(own):
                nats += loss.double()
            tokens += self.predicted(windows)
            text_bytes += count_bytes(windows[:, 1:])
        self.model.train()
        total = float(self._over_ranks(nats))
        return total / tokens, total / math.log(2) / max(1, text_bytes)

    def _over_ranks(self, loss: Tensor) -> Tensor:
        """The sum over the data-parallel ranks of a loss that those that share windows have in common."""
        if self._sharded:
            dist.all_reduce(loss)
            loss = loss / self.mesh.sp
        return loss

    def check_step(self, step: int) -> None:
        """Wait for the device. Raises DivergedError when the latest loss or gradient is not finite."""
        for name, value in self._latest.items():
            self.require_finite(name, float(value), step)

    def reshard(self) -> None:
        """Make the model's parameters this process's shards again, whatever was computed before."""
        reshard(self.model)

    def largest_weight(self) -> float:
        """The largest weight of this process's shards, NaN if one is NaN: after the last step no loss would show it."""
        shards = [p.to_local() if isinstance(p, DTensor) else p for p in self.model.parameters()]
        return float(torch.nn.utils.get_total_norm([shard for shard in shards if shard.numel()], math.inf))

    def require_finite(self, name: str, value: float, step: int) -> None:
        """Raises DivergedError when `value`, as it was after `step` steps, is not finite."""
        if not math.isfinite(value):
            raise DivergedError(f"the {name} is {value} at step {step}; try a lower lr than {self._config.lr:g}")

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's own tensors by weight and name, for a checkpoint to copy or to be read into."""
        return {
            f"{name}.{key}": value
            for name, weight in self.model.named_parameters()
            for key, value in self._optimizer.state[weight].items()
        }

    def state(self) -> dict[str, Any]:
        """All but the weights and the optimizer's tensors, for a checkpoint."""
        return {"rng": self.runtime.rng_state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.runtime.set_rng_state(state["rng"])


def _new_optimizer(config: TrainConfig, model: PreTrainedModel) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone: decaying LRPE's frequencies would move what positions mean."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    betas = (config.beta1, config.beta2)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=betas, weight_decay=config.weight_decay, fused=True)
    for weight in model.parameters():  # what the first step would make, so that a checkpoint can be read into it
        optimizer.state[weight] = {
            "step": torch.zeros((), dtype=torch.float32, device=weight.device),
            "exp_avg": torch.zeros_like(weight),
            "exp_avg_sq": torch.zeros_like(weight),
        }
    return optimizer
