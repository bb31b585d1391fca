"""What a call would launch on a chip that is not here, compiled for it.

A driver that answers for the chip, and calls on tensors without memory: what Triton makes of the arguments, and so what
is compiled, is what a call on the chip gets.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from lightning_attention.kernels.triton import dispatch, tiling
from lightning_attention.kernels.triton.attention import attention, attention_backward
from lightning_attention.kernels.triton.sequence_parallel import sequence_parallel, sequence_parallel_backward
from tests.kernels.triton.support.cutting import cutting


@dataclass(frozen=True)
class Chip:
    """capability: as ``tiling.device`` has it; shared: bytes of shared memory that a program may have; multiprocessor:
    and all programs on one multiprocessor together, with 1 KB more for each."""

    target: GPUTarget
    capability: tuple[int, int]
    multiprocessors: int
    shared: int
    multiprocessor: int


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), (8, 0), 108, 163 << 10, 164 << 10),
    "sm_86": Chip(GPUTarget("cuda", 86, 32), (8, 6), 84, 99 << 10, 100 << 10),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), (9, 0), 132, 227 << 10, 228 << 10),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), (10, 0), 148, 227 << 10, 228 << 10),
    "sm_120": Chip(GPUTarget("cuda", 120, 32), (12, 0), 170, 99 << 10, 100 << 10),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), (0, 0), 304, 64 << 10, 64 << 10),
}


@dataclass(frozen=True)
class Launch:
    """A kernel that a call launches: its constants and the arguments that are None, and what Triton compiled."""

    name: str
    constants: dict[str, Any]
    compiled: Any

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return self.compiled.metadata.shared

    @property
    def registers(self) -> int:
        """32-bit registers a thread, on an NVIDIA chip."""
        return self._usage("REG")

    @property
    def stack(self) -> int:
        """Bytes a thread keeps in memory for want of registers."""
        if "amdgcn" in self.compiled.asm:
            found = re.search(r"\.private_segment_fixed_size:\s*(\d+)", self.compiled.asm["amdgcn"])
            assert found
            return int(found[1])
        return self._usage("STACK")

    def _usage(self, resource: str) -> int:
        cuobjdump = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.compiled.asm["cubin"])
            file.flush()
            command = [cuobjdump, "-res-usage", file.name]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.search(rf"\b{resource}:(\d+)", report)
        assert found, report
        return int(found[1])

    def __str__(self) -> str:
        flags = " ".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{self.name}: {self.shared / 1024:.1f} KB shared, {self.stack} bytes of stack; {flags}"


class _Driver:
    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # Triton keeps what it compiled by device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def _on(chip: Chip, segments: bool) -> Iterator[list[Launch]]:
    launches: list[Launch] = []
    run: Callable[..., Any] = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        constants = {p.name: x for p, x in zip(kernel.params, args, strict=True) if p.is_constexpr or x is None}
        launches.append(Launch(kernel.fn.__name__, constants, compiled))

    with (
        patch.object(driver, "_active", _Driver(chip.target)),
        patch.object(JITFunction, "run", compile_only),
        patch.object(tiling, "device", lambda x: (chip.capability, chip.multiprocessors)),
        cutting(segments),
        patch.object(dispatch, "_launches", {}),
    ):
        yield launches


def launched_by(call: Callable[[], object], chip: Chip) -> list[Launch]:
    """What a call on tensors without memory launches."""
    with _on(chip, False) as launches:
        call()
    return launches


def launched(
    chip: Chip,
    D: int,
    E: int,
    dtype: torch.dtype,
    *,
    backward: bool = True,
    segments: bool = False,
    packed: bool = False,
    states: bool = True,
    learnable: bool = True,
    B: int = 1,
    T: int = 4096,
    N: int = 3,
    Hk: int = 4,
) -> list[Launch]:
    """What forward (and backward) launch, for 4 heads, Hk of them of q and k; ``states``: initial and final ones;
    ``learnable``: the decay; N: sequences, where they are ``packed``."""
    H, N = 4, N if packed else B

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v, dout = tensor(B, T, Hk, D), tensor(B, T, Hk, D), tensor(B, T, H, E), tensor(B, T, H, E)
    log_decay = tensor(H, dtype=torch.float32)
    state = tensor(N, H, D, E, dtype=torch.float32) if states else None
    cu_seqlens = tensor(N + 1, dtype=torch.int32) if packed else None
    with _on(chip, segments) as launches:
        attention(q, k, v, log_decay, state, cu_seqlens, 1.0, states, False)
        if backward:
            attention_backward(dout, state, q, k, v, log_decay, state, cu_seqlens, 1.0, False, learnable)
    return launches


class _SecondOfTwo:
    """A rank whose messages go nowhere."""

    rank, size = 1, 2

    def gather(self, message: torch.Tensor, gathered: torch.Tensor, *, meanwhile: bool = False) -> Callable[[], None]:
        return lambda: None


def launched_in_slices(chip: Chip, D: int, packed: bool) -> list[Launch]:
    """What a rank's forward and backward launch, in bfloat16, with states at both ends; sequences are split."""
    B, T, H, N = (1, 4096, 4, 3) if packed else (2, 4096, 4, 2)
    q, k, v, dout = (torch.empty(B, T, H, D, dtype=torch.bfloat16, device="meta") for _ in range(4))
    log_decay, state, lengths = (torch.empty(shape, device="meta") for shape in ((H,), (N, H, D, D), (2, N)))
    cu_seqlens = torch.empty(N + 1, dtype=torch.int32, device="meta") if packed else None
    with _on(chip, True) as launches:
        sequence_parallel(q, k, v, log_decay, state, cu_seqlens, 1.0, True, False, _SecondOfTwo())
        sequence_parallel_backward(
            dout, state, q, k, v, log_decay, state, cu_seqlens, lengths, 1.0, False, False, _SecondOfTwo()
        )
    return launches
