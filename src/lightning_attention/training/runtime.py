"""The one place that knows what device a run is on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from lightning_attention.errors import InputError


@dataclass(frozen=True)
class Runtime:
    """A device and the precision its matrix products run in. Weights and optimizer state are float32 always."""

    device: torch.device
    bf16: bool

    @classmethod
    def choose(cls, device: str, precision: str, local_rank: int | None = None) -> Runtime:
        """The runtime for the settings of the same names. Raises InputError when the device is unknown or not there.

        With a `local_rank`, which process of this host it is, `cuda` is the GPU of that number.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if local_rank is not None and device != "cpu":
            if device != "cuda":
                raise InputError(f"device must be auto, cpu or cuda in several processes; got {device!r}")
            chosen = torch.device("cuda", local_rank)
            there = torch.cuda.device_count()
            if local_rank >= there:
                raise InputError(f"process {local_rank} of a host wants a GPU of its own; torch sees {there} there")
            torch.cuda.set_device(chosen)
        else:
            try:
                chosen = torch.device(device)
            except (RuntimeError, ValueError) as error:
                raise InputError(f"device must be auto, cpu, cuda or cuda:N; got {device!r}") from error
            if chosen.type not in ("cpu", "cuda"):
                raise InputError(f"device must be auto, cpu, cuda or cuda:N; got {device!r}")
            if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
                raise InputError(f"device {device} is not there: torch sees {torch.cuda.device_count()} GPUs")
        has_bf16 = chosen.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "bf16" and chosen.type == "cuda" and not has_bf16:
            raise InputError(f"precision is bf16, but {torch.cuda.get_device_name(chosen)} has no bf16; use float32")
        return cls(chosen, has_bf16 if precision == "auto" else precision == "bf16")

    def autocast(self) -> AbstractContextManager[Any]:
        """The context that forward passes run in."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def rng_state(self) -> dict[str, torch.Tensor]:
        """The random state of the CPU and of the device."""
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def set_rng_state(self, state: dict[str, torch.Tensor]) -> None:
        """Go back to what `rng_state` returned; a GPU's state is left out when the run has moved to a CPU."""
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)
