"""The model and its optimizer on a device: what a step does to them, and what a checkpoint keeps of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_attention.errors import DivergedError
from lightning_attention.models.transnormer import TransnormerForCausalLM
from lightning_attention.training.config import TrainConfig
from lightning_attention.training.data import separate_documents
from lightning_attention.training.metrics import MeanLoss
from lightning_attention.training.runtime import Runtime


class Learner:
    """A model in training. Its weights and the optimizer's state are float32."""

    def __init__(self, config: TrainConfig, runtime: Runtime, model: TransnormerForCausalLM) -> None:
        """Move the model to the device of `runtime` and give it a new optimizer."""
        self._config = config
        self.runtime = runtime
        self.model = model.to(runtime.device).train()
        self._optimizer = _new_optimizer(config, self.model)
        # Only calls go through the compiled module: the weights keep the plain module's names.
        self._forward = torch.compile(self.model) if config.compile else self.model
        nothing = torch.zeros((), device="cpu")
        self._latest = {"loss": nothing, "gradient norm": nothing}

    def loss(self, windows: Tensor) -> Tensor:
        """Mean negative log-likelihood, in nats per token, of windows [b, t] int64."""
        separate = self._config.documents == "separate"
        borders = separate_documents(windows, self.model.config.eos_token_id) if separate else {}
        inputs = {"input_ids": windows, "labels": windows, **borders}
        inputs = {name: tensor.to(self.runtime.device) for name, tensor in inputs.items()}
        with self.runtime.autocast():
            loss: Tensor = self._forward(**inputs, use_cache=False).loss
        return loss

    def step(self, windows: Tensor, learning_rate: float) -> tuple[Tensor, Tensor]:
        """One update of the weights from windows [windows_per_step, t] int64.

        Returns:
            The mean loss in nats per token before the update, and the norm of its gradient: scalars on the device.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        loss = torch.zeros((), device=self.runtime.device)
        for batch in windows.split(self._config.batch_size):
            part = self.loss(batch) / self._config.accumulate
            part.backward()
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._config.clip or math.inf)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._latest = {"loss": loss, "gradient norm": norm}
        return loss, norm

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Tensor], count_bytes: Callable[[Tensor], int]) -> tuple[float, float]:
        """The length of a text's code under the model, in nats per token and bits per byte.

        Args:
            batches: windows [b, t] int64, of which all but the first tokens are predicted.
            count_bytes: how many bytes of text tokens stand for.
        """
        mean = MeanLoss()
        self.model.eval()
        for windows in batches:
            predicted = windows[:, 1:]
            mean.add(self.loss(windows), predicted.numel(), count_bytes(predicted))
        self.model.train()
        return mean.take()

    def check_step(self, step: int) -> None:
        """Wait for the device. Raises DivergedError when the latest loss or gradient is not finite."""
        for name, value in self._latest.items():
            self.require_finite(name, float(value), step)

    def check_weights(self, step: int) -> None:
        """Raises DivergedError when what the latest step made of the weights is not finite: no later loss shows it."""
        norms = torch.nn.utils.get_total_norm(self.model.parameters(), math.inf)
        self.require_finite("largest weight", float(norms), step)

    def require_finite(self, name: str, value: float, step: int) -> None:
        """Raises DivergedError when `value`, as it was after `step` steps, is not finite."""
        if not math.isfinite(value):
            raise DivergedError(f"the {name} is {value} at step {step}; try a lower lr than {self._config.lr:g}")

    def state(self) -> dict[str, Any]:
        """All but the weights, for a checkpoint."""
        return {"optimizer": self._optimizer.state_dict(), "rng": self.runtime.rng_state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._optimizer.load_state_dict(state["optimizer"])
        self.runtime.set_rng_state(state["rng"])


def _new_optimizer(config: TrainConfig, model: TransnormerForCausalLM) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone: decaying LRPE's frequencies would move what positions mean."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, weight_decay=config.weight_decay, fused=True)
