"""Products with what stands around them, in Triton's interpreter, against float64."""

from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
import triton

from lightning_attention.kernels.triton import tiling
from lightning_attention.kernels.triton.matmul import tile
from lightning_attention.kernels.triton.projection import is_faster, project
from tests.kernels.triton.support.interpreter import Interpreter, interpreted
from tests.kernels.triton.support.offline import CHIPS, launched_by
from tests.support.numerics import relative_error

WIDTHS = [(64, 96), (100, 72), (40, 40)]
EPS = 1e-6


def wanted(x, weight, second=None, gate=None, residual=None, eps=None, silu=0):
    """The same in float64."""
    x, weight, second, gate, residual = (None if t is None else t.double() for t in (x, weight, second, gate, residual))
    y = x if eps is None else F.rms_norm(x, x.shape[-1:], eps=eps)
    y = y if gate is None else y * gate
    out = y @ weight.T
    out = out if second is None else out * (y @ second.T)
    out = torch.cat([F.silu(out[:, :silu]), out[:, silu:]], 1)
    return out if residual is None else out + residual


def calls(N, K, O):
    """What a block of TransNormerLLM asks for, q, k, v and u being parts of one tensor."""
    torch.manual_seed(N)
    x, parts, residual = 2 * torch.randn(N, K), 2 * torch.randn(N, 3 * K), torch.randn(N, O)
    weight, second = torch.randn(2, O, K) / K**0.5
    yield x, weight, None, None, None, EPS, O // 2
    yield parts[:, K : 2 * K], weight, None, parts[:, 2 * K :], residual, EPS, 0
    yield x, weight, second, None, None, EPS, 0
    yield x, weight, None, None, residual, None, 0


@interpreted
@pytest.mark.parametrize("N", [1, 2, 3, 8])
@pytest.mark.parametrize(("K", "O"), WIDTHS)
def test_products_are_those_of_float64(interpreter: Interpreter, N: int, K: int, O: int):
    for args in calls(N, K, O):
        found = interpreter.call(project, *args)
        assert relative_error(found, wanted(*args)) < 1e-5
        forgotten = (*args[:5], None if args[5] else EPS, args[6])
        assert relative_error(found, wanted(*forgotten)) > 1e-2


@interpreted
@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("N", [9, 70, 130])
@pytest.mark.parametrize(("K", "O"), [(64, 96), (100, 72), (200, 136)])
def test_many_rows(interpreter: Interpreter, multiprocessors: int, N: int, K: int, O: int):
    for args in calls(N, K, O):
        args = [x.half() if isinstance(x, torch.Tensor) else x for x in args]
        found = interpreter.call(_project_on, multiprocessors, *args)
        assert found.dtype == torch.float16
        assert relative_error(found, wanted(*args)) < 5e-4  # half a unit of float16 is 4.9e-4
        forgotten = (*args[:5], None if args[5] else EPS, args[6])
        assert relative_error(found, wanted(*forgotten)) > 1e-2


def _project_on(multiprocessors: int, *args):
    with patch.object(tiling, "device", lambda x: ((9, 0), multiprocessors)):
        return project(*args)


def test_which_products_these_kernels_take():
    """Of the 385M's and the 7B's block, on Hopper and elsewhere."""

    def taken(capability: tuple[int, int], N: int, K: int, O: int) -> list[bool]:
        with patch.object(tiling, "device", lambda x: (capability, 132)):
            return [is_faster(args[0], *args[1:4], *args[5:]) for args in calls(N, K, O)]

    assert taken((8, 0), 8, 1024, 64) == [True] * 4
    assert taken((8, 0), 9, 1024, 64) == [False] * 4
    assert taken((9, 0), 256, 1024, 2816) == [True, True, True, False]
    assert taken((9, 0), 600, 1024, 4096) == [True, True, False, False]
    assert taken((9, 0), 2000, 1024, 4096) == [False] * 4


@pytest.mark.parametrize("O", [40, 1024, 4096, 11008])
@pytest.mark.parametrize("twin", [False, True])
def test_tiles_have_room(O: int, twin: bool):
    for N in (9, 64, 65, 256, 512):
        rows, columns, width, stages = tile(N, O, twin, 132)
        assert stages >= 3
        programs = -(-N // rows) * -(-O // columns)
        assert stages * width * (rows + columns * (1 + twin)) * 2 * (1 + (programs > 132)) <= 226 << 10


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1: Triton compiles nothing")
@pytest.mark.parametrize("N", [8, 64, 512])
def test_nothing_spills_on_hopper(N: int):
    for args in calls(N, 1024, 2816):
        args = [x.to("meta", torch.bfloat16) if isinstance(x, torch.Tensor) else x for x in args]
        *_, launch = launched_by(partial(project, *args), CHIPS["sm_90"])
        assert launch.name == ("project_kernel" if N == 8 else "matmul_kernel")
        assert launch.stack == 0
        assert launch.shared <= CHIPS["sm_90"].shared


@interpreted
def test_no_rows(interpreter: Interpreter):
    none = torch.empty(0, 64)
    found = interpreter.call(project, none, torch.ones(8, 64), *[None] * 4, 0)
    assert found.shape == (0, 8)
