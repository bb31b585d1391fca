import ctypes
import shutil
import subprocess
import sys

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.harness import nothing

built_for_cuda = torch.version.cuda is not None


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
def test_what_is_asked_is_answered_and_all_else_succeeds(tmp_path):
    names = {name for answers in nothing.ANSWERS.values() for name in answers.split()}
    nothing.build(
        tmp_path / "libnothing.so", {*names, "cudaGetDeviceProperties_v2", "cuMemAlloc_v2", "cuLaunchKernelEx"}
    )
    library = ctypes.CDLL(str(tmp_path / "libnothing.so"))
    count = ctypes.c_int()
    assert library.cudaGetDeviceCount(ctypes.byref(count)) == 0
    assert count.value == 1
    properties = (ctypes.c_char * 1200)()
    assert library.cudaGetDeviceProperties_v2(properties, 0) == 0
    assert properties.value == b"H200 of which nothing is there"
    assert int.from_bytes(properties[360:364], sys.byteorder) == 9
    first, second = ctypes.c_uint64(), ctypes.c_uint64()
    for address in (first, second):
        assert library.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(3 << 20)) == 0
    assert second.value - first.value == 3 << 20  # of which no two overlap
    assert library.cuLaunchKernelEx(None, None, None, None) == 0


def test_the_driver_has_what_triton_is_linked_with():
    pytest.importorskip("triton")
    found = nothing._driver_functions()
    assert {"cuLaunchKernelEx", "cuModuleLoadData", "cuTensorMapEncodeTiled", "cuMemAlloc_v2"} <= found


@pytest.mark.skipif(built_for_cuda, reason="PyTorch is built for CUDA")
def test_a_pytorch_that_is_not_built_for_cuda_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["host", "--driver", "none"])
    assert "--driver none needs a PyTorch that is built for CUDA" in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(
    not built_for_cuda or nothing.missing() is not None, reason="needs a PyTorch built for CUDA, and gcc"
)
def test_pytorch_and_triton_run_on_it(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "host", "--driver", "none", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "lightning_attention  forward+backward  us " in done.stdout
