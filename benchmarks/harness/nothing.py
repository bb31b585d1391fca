"""A CUDA runtime and a CUDA driver that do nothing: what is left of a call's time is the host's.

PyTorch finds an H200 and allocates on it, Triton compiles for it and launches; no GPU need be there, and nothing is
computed: what a tensor holds means nothing. Left out is what NVIDIA's own code would do on the host, a few microseconds
a launch and one for encoding a descriptor. cuDNN does not start.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

#: By the function of nothing.c that answers, what is asked for. The rest returns success.
ANSWERS = {
    "handle": "cudaEventCreate cudaEventCreateWithFlags cudaStreamCreate cudaStreamCreateWithFlags "
    "cudaStreamCreateWithPriority __cudaGetKernel cudaLibraryLoadData cudaLibraryGetKernel cuCtxGetCurrent "
    "cuCtxPopCurrent cuDevicePrimaryCtxRetain cuModuleLoadData cuModuleGetFunction",
    "registered": "__cudaRegisterFatBinary",
    "zero": "cudaGetDevice cuDeviceGet cuCtxGetDevice",
    "one": "cudaGetDeviceCount cuDeviceGetCount cuOccupancyMaxActiveClusters "
    "cudaOccupancyMaxActiveBlocksPerMultiprocessor cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags",
    "one_float": "cudaEventElapsedTime",
    "version": "cudaRuntimeGetVersion cudaDriverGetVersion cuDriverGetVersion",
    "text": "cudaGetErrorName cudaGetErrorString",
    "write_text": "cuGetErrorName cuGetErrorString",
    "entry_point": "cudaGetDriverEntryPoint cudaGetDriverEntryPointByVersion cuGetProcAddress",
    "priorities": "cudaDeviceGetStreamPriorityRange",
    "capturing": "cudaStreamIsCapturing cudaStreamGetCaptureInfo",
    "pop": "__cudaPopCallConfiguration",
    "pointer": "cuPointerGetAttribute",
    "of_kernel": "cuFuncGetAttribute",
    "allocate": "cudaMalloc cudaMallocAsync cuMemAlloc",
    "allocate_host": "cudaHostAlloc cudaMallocHost",
    "memory": "cudaMemGetInfo cuMemGetInfo",
    "attribute": "cudaDeviceGetAttribute cuDeviceGetAttribute",
    "properties": "cudaGetDeviceProperties",
}
_ANSWERED = {name: answer for answer, names in ANSWERS.items() for name in names.split()}
_VERSION = re.compile(r"(_v\d+)?(_pts[dz])?$")  # of a function, behind its name
_IN_PLACE = "CUDA_OF_NOTHING"


def in_place() -> bool:
    """Whether this process runs on it."""
    return _IN_PLACE in os.environ


def missing() -> str | None:
    """What is not there that ``run`` needs, or None."""
    if torch.version.cuda is None:
        return "a PyTorch that is built for CUDA"
    return next((f"the command {name}" for name in ("gcc", "nm") if shutil.which(name) is None), None)


def run(arguments: Sequence[str]) -> int:
    """Run Python with these arguments on it; the exit status."""
    with TemporaryDirectory() as folder:
        runtime = _build_all(Path(folder))
        paths = f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(":")
        places = {"LD_PRELOAD": str(runtime), "LD_LIBRARY_PATH": paths, "TRITON_LIBCUDA_PATH": folder, _IN_PLACE: "1"}
        return subprocess.run([sys.executable, *arguments], env=os.environ | places, check=False).returncode


def _build_all(folder: Path) -> Path:
    """Both libraries; the runtime's path. PyTorch is linked with the one, Triton with the other."""
    names, library = _runtime_functions()
    versions = folder / "versions"
    versions.write_text(f"{library} {{ global: *; }};\n")
    build(folder / library, names, f"-Wl,--version-script={versions}")
    build(folder / "libcuda.so.1", _driver_functions())
    (folder / "libcuda.so").symlink_to("libcuda.so.1")
    return folder / library


def build(library: Path, names: Iterable[str], *options: str) -> None:
    """Compile a library of these functions."""
    lines = [(Path(__file__).parent / "nothing.c").read_text()]
    for name in sorted(names):
        answer = _ANSWERED.get(_VERSION.sub("", name), "nothing")
        lines.append(f'__typeof__({answer}) {name} __attribute__((alias("{answer}")));')
    source = library.with_suffix(".c")
    source.write_text("\n".join(lines) + "\n")
    command = ["gcc", "-O2", "-w", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", str(source), "-o", str(library)]
    subprocess.run([*command, *options], check=True)


def _runtime_functions() -> tuple[set[str], str]:
    """Those of the CUDA runtime that PyTorch is linked with, and the name of that library."""
    found: dict[str, str] = {}
    root = Path(torch.__file__).parent
    for library in [*root.glob("lib/*.so"), *root.glob("_C*.so")]:
        listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
        found |= re.findall(r" U (\w+)@(libcudart\.so\.\d+)$", listed.stdout, re.MULTILINE)
    (library_name,) = set(found.values())
    return set(found), library_name


def _driver_functions() -> set[str]:
    """All of the CUDA driver's, from the header that Triton brings."""
    import triton

    header = (Path(triton.__file__).parent / "backends/nvidia/include/cuda.h").read_text()
    declared = re.findall(r"\bCUDAAPI\s+(cu[A-Z]\w+)\s*\(", header)
    return {*declared, *re.findall(r"#define\s+cu[A-Z]\w+\s+(?:__CUDA_API_PT\w+\()?(cu[A-Z]\w+)", header)}
