"""The weights of a model that may be sharded over processes: made, read and written, the same whatever the mesh."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from lightning_attention.errors import InputError

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Large enough that a small model is one file, small enough that the processes of a host write side by side.
FILE_BYTES = 2 << 30


@torch.no_grad()
def materialise(
    model: PreTrainedModel, device: torch.device, given: Callable[[str, torch.Size], Tensor | None] | None = None
) -> None:
    """Give a model on the meta device its weights and buffers on `device`.

    Weights are drawn whole on the CPU, one module after another, from torch's random state there: with the same seed
    they are the same on every device and mesh. A process keeps no more than its shards.

    Args:
        model: with parameters on the meta device, DTensors where they are sharded.
        device: where it goes.
        given: a weight by its name and shape, whole and on the CPU; None where it is to be drawn.
    """
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # by the identity of the first, so that ties stay
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)
        fresh: dict[str, nn.Parameter] = {}
        for name, meta in module._parameters.items():
            if meta is not None and id(meta) not in made:
                weight = nn.Parameter(torch.empty(meta.shape, dtype=meta.dtype, device="cpu"))
                whole = given(f"{prefix}.{name}".lstrip("."), meta.shape) if given else None
                if whole is not None:
                    weight.copy_(whole)
                    _leave(weight)
                made[id(meta)] = (meta, weight)
                fresh[name] = meta
                module._parameters[name] = weight
            elif meta is not None:
                module._parameters[name] = made[id(meta)][1]
        model._init_weights(module)
        for name, meta in fresh.items():
            weight = nn.Parameter(_laid_out(module._parameters[name], meta, device), requires_grad=meta.requires_grad)
            _leave(weight)  # where it is tied to another module's, which comes later
            made[id(meta)] = (meta, weight)
            module._parameters[name] = weight
    for _, weight in made.values():
        _leave(weight, False)


def _leave(weight: nn.Parameter, leave: bool = True) -> None:
    """Tell transformers' initialisation that a weight has its values already."""
    weight._is_hf_initialized = leave  # type: ignore[attr-defined]


def _laid_out(whole: Tensor | None, like: Tensor, device: torch.device) -> Tensor:
    """On the device, and sharded as `like` is where it is a DTensor."""
    assert whole is not None
    moved = whole.detach().to(device)
    if not isinstance(like, DTensor):
        return moved
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


class WeightFiles:
    """The weights in a Hugging Face folder, read one at a time."""

    def __init__(self, folder: Path) -> None:
        """Open the folder. Raises InputError when it holds no weights that can be read."""
        self._folder = folder
        with self._reading():
            index = folder / INDEX
            if index.exists():
                self._files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            else:
                with safe_open(folder / ONE_FILE, framework="pt") as file:
                    self._files = dict.fromkeys(file.keys(), ONE_FILE)

    def __call__(self, name: str, shape: torch.Size) -> Tensor:
        """One weight, on the CPU. Raises InputError when it is not there, or has another shape."""
        with self._reading():
            if name not in self._files:
                raise InputError(f"{self._folder} has no weight {name}")
            with safe_open(self._folder / self._files[name], framework="pt") as file:
                weight: Tensor = file.get_tensor(name)
        if weight.shape != shape:
            raise InputError(f"{name} is {list(weight.shape)} in {self._folder}; it must be {list(shape)}")
        return weight

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # safetensors has a kind of its own
            reason = str(error).partition("\n")[0]
            raise InputError(f"cannot load the model in {self._folder}: {reason}") from error


class WeightsToWrite:
    """A copy of a model's weights on the CPU: this process's share, in files that do not depend on the mesh."""

    def __init__(self, model: PreTrainedModel, rank: int = 0, ranks: int = 1) -> None:
        """Copy the share. Collective where the model is sharded: every weight is gathered once, one at a time."""
        weights = list(model.named_parameters())
        sizes = [(name, weight.numel() * weight.element_size()) for name, weight in weights]
        self._model, self._rank, self._bytes = model, rank, sum(size for _, size in sizes)
        files = _in_files(sizes)
        self._file_of = {name: file for file, names in files.items() for name in names}
        writer = {file: number % ranks for number, file in enumerate(files)}
        self._share: dict[str, dict[str, Tensor]] = {file: {} for file in files if writer[file] == rank}
        for name, weight in weights:
            whole = weight.detach()
            if isinstance(whole, DTensor):
                whole = whole.full_tensor()
            if (file := self._file_of[name]) in self._share:
                self._share[file][name] = whole.to("cpu", copy=True)

    def write(self, folder: Path) -> None:
        """Write the share into a folder; the first rank also writes the configuration and the index."""
        if self._rank == 0:
            config = self._model.config
            config.architectures = [type(self._model).__name__.removeprefix("FSDP")]
            config.dtype = "float32"
            config.save_pretrained(folder)
            if self._model.can_generate():
                self._model.generation_config.save_pretrained(folder)
            if len(set(self._file_of.values())) > 1:
                index = {"metadata": {"total_size": self._bytes}, "weight_map": self._file_of}
                (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for file, weights in self._share.items():
            save_file(weights, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(folder.stat().st_mode & 0o666)  # safetensors lets nobody but the owner read


def _in_files(sizes: list[tuple[str, int]]) -> dict[str, list[str]]:
    """Which weights go into which file, in the model's order; transformers' names for files."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes:
        if groups[-1] and filled + size > FILE_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {ONE_FILE: groups[0]}
    return {f"model-{number:05}-of-{len(groups):05}.safetensors": names for number, names in enumerate(groups, 1)}
