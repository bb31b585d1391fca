"""Every kernel that the launch table asks for compiles, and fits the chip, for chips that are not here.

A compilation takes a second or more (Triton keeps it in its cache), so only the main sizes are compiled, and those that
are nearest to a chip's limits. ``LAUNCH_TABLE=full`` compiles the table (half an hour); ``-s`` shows what each takes.
"""

import itertools
import os

import pytest
import torch

from lightning_attention.kernels.triton import tiling
from lightning_attention.kernels.triton.cross_entropy import cross_entropy
from tests.kernels.triton.support.offline import CHIPS, Chip, Launch, launched, launched_by, launched_in_slices

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") == "1", reason="TRITON_INTERPRET=1: Triton compiles nothing"
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FULL = os.environ.get("LAUNCH_TABLE") == "full"
if FULL:
    WIDTHS = (16, 48, 64, 128, 192, 256)
    SIZES = list(itertools.product(CHIPS, WIDTHS, WIDTHS, (BF16, FP16, FP32)))
else:
    # 256 is nearest to the limit of the chips with the least shared memory; each kind of matrix unit is compiled for.
    widths = {"sm_80": 64, "sm_86": 256, "sm_90": 128, "sm_100": 64, "sm_120": 64, "gfx942": 256}
    SIZES = [(chip, width, width, BF16) for chip, width in widths.items()]


def assert_fits(launches: list[Launch], chip: Chip) -> None:
    for launch in launches:
        print(launch)
        assert launch.shared <= chip.shared, f"{launch}, and the chip has {chip.shared / 1024:.0f} KB"


@pytest.mark.parametrize(("chip", "D", "E", "dtype"), SIZES)
def test_compiles_and_fits(chip: str, D: int, E: int, dtype: torch.dtype):
    learnable = FULL or chip == "sm_90"
    launches = launched(CHIPS[chip], D, E, dtype, learnable=learnable)
    assert [x.name for x in launches] == ["forward_kernel", "backward_kernel"]
    assert_fits(launches, CHIPS[chip])
    if chip != "sm_90" and dtype != FP32:  # what Hopper spills, the test after next says
        assert all(x.stack <= 64 for x in launches)


@pytest.mark.parametrize("chip", CHIPS if FULL else ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_packed_and_segmented(chip: str):
    launches = launched(CHIPS[chip], 16, 16, BF16, segments=True, packed=True, backward=False)
    names = ["plan_kernel", "states_kernel", "scan_kernel", "forward_kernel", "clear_padding_kernel"]
    assert [x.name for x in launches] == names
    assert_fits(launches, CHIPS[chip])


@pytest.mark.parametrize(("chip", "D", "dtype"), [("sm_80", 16, BF16), ("sm_90", 30, FP32), ("gfx942", 16, BF16)])
def test_documents_parted_by_masks(chip: str, D: int, dtype: torch.dtype):
    """Packed batches whose states nobody has or wants get no table of segments, and no spills for the masks."""
    launches = launched(CHIPS[chip], D, D, dtype, segments=True, packed=True, states=False, learnable=False)
    before, after = ["documents_kernel", "states_kernel", "scan_kernel"], ["clear_padding_kernel"]
    assert [x.name for x in launches] == [*before, "forward_kernel", *after, *before, "backward_kernel", *after]
    assert_fits(launches, CHIPS[chip])
    assert not any(x.stack for x in launches)


@pytest.mark.parametrize(
    ("D", "E", "segments", "Hk", "learnable"),
    [
        (64, 64, False, 4, False),
        (128, 128, False, 4, True),
        (128, 128, True, 4, False),
        (128, 128, True, 2, False),
        (80, 80, False, 4, False),
        (256, 128, False, 4, False),
    ],
)
def test_nothing_spills_on_hopper(D: int, E: int, segments: bool, Hk: int, learnable: bool):
    """The main configurations: every number in registers; two programs of four warps to a multiprocessor, or one."""
    chip = CHIPS["sm_90"]
    for launch in launched(chip, D, E, BF16, states=False, learnable=learnable, segments=segments, Hk=Hk):
        print(launch)
        if launch.name != "scan_kernel":
            assert "wgmma" in launch.compiled.asm["ptx"]
        assert launch.stack <= (64 if learnable else 0), launch  # none with Triton 3.6
        warps = launch.compiled.metadata.num_warps
        assert 8 // warps * (launch.shared + 1024) <= chip.multiprocessor
        assert 8 // warps * launch.registers * 32 * warps <= 65536


@pytest.mark.parametrize(("chip", "D", "packed"), [("sm_90", 128, False), ("sm_80", 16, True), ("gfx942", 16, True)])
def test_slices_on_several_ranks(chip: str, D: int, packed: bool):
    """What the slice leaves is of the pass over k and v that there is anyway; nothing spills on Hopper."""
    launches = launched_in_slices(CHIPS[chip], D, packed)
    plan, clear = (["plan_kernel"], ["clear_padding_kernel"]) if packed else ([], [])
    pass_ = ["states_kernel", "scan_kernel"]
    forward = [*plan, *pass_, "lengths_kernel", "start_kernel", "forward_kernel", *clear]
    backward = ["copy_kernel", *plan, *pass_, *pass_, "end_kernel", "backward_kernel", *clear]
    assert [x.name for x in launches] == [*forward, *backward]
    assert_fits(launches, CHIPS[chip])
    if chip == "sm_90":
        assert not any(x.stack for x in launches)


@pytest.mark.parametrize(("precision", "D", "spills"), [("high", 64, 0), ("high", 128, 400), ("highest", 128, 1024)])
def test_float32_on_hopper(precision: str, D: int, spills: int, monkeypatch: pytest.MonkeyPatch):
    """In bfloat16 parts, without TF32. What is spilled at 128 costs the loop 50 of 1900 instructions, or 75 of 2900."""
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    chip = CHIPS["sm_90"]
    launches = launched(chip, D, D, FP32, states=False, learnable=False, segments=True)
    swept = [x for x in launches if "TILES" in x.constants]
    assert [x.name for x in swept] == ["states_kernel", "forward_kernel", "states_kernel", "backward_kernel"]
    for launch in swept:
        print(launch)
        ptx = launch.compiled.asm["ptx"]
        assert "wgmma" in ptx
        assert "tf32" not in ptx
        assert launch.stack <= (0 if launch.name == "states_kernel" else spills), launch
        together = launch.constants["TILES"].per_multiprocessor
        assert together * (launch.shared + 1024) <= chip.multiprocessor
        assert together * launch.registers * 32 * launch.compiled.metadata.num_warps <= 65536


@pytest.mark.parametrize(
    ("chip", "V", "dtype"),
    [
        ("sm_80", 64000, FP16),
        ("sm_90", 64000, BF16),
        ("sm_90", 50257, BF16),
        ("sm_120", 97, FP32),
        ("gfx942", 64000, BF16),
    ],
)
def test_cross_entropy(chip: str, V: int, dtype: torch.dtype):
    """Rows that are multiples of 16 bytes are read and written in as many at a time; tokens compile nothing."""

    def compiled(n: int, gradient: bool) -> list[Launch]:
        logits = torch.empty(n, V, dtype=dtype, device="meta")
        targets = torch.empty(n, dtype=torch.int64, device="meta")
        return launched_by(lambda: cross_entropy(logits, targets, -100, gradient), CHIPS[chip])

    for gradient in (False, True):
        (launch,) = compiled(8192, gradient)
        assert launch.name == "cross_entropy_kernel"
        assert_fits([launch], CHIPS[chip])
        assert not launch.stack
        if "ptx" in launch.compiled.asm:
            assert ("ld.global.v4" in launch.compiled.asm["ptx"]) == (V * dtype.itemsize % 16 == 0)
        again = {id(compiled(n, gradient)[0].compiled) for n in (1, 33, 70_000)}
        # AMD's compiler wants to know of tensors past 2 GB.
        assert len(again | {id(launch.compiled)}) <= (2 if chip == "gfx942" else 1)


def test_a_new_length_or_batch_compiles_nothing():
    """On the chips whose kernels Triton chooses by the alignment of every argument."""

    def kernels(**shape: int) -> set[int]:
        launches = launched(CHIPS["sm_80"], 16, 16, BF16, learnable=False, **shape)
        return {id(x.compiled) for x in launches}

    first = kernels(B=2, T=300)
    for B, T in ((1, 1), (1, 65), (3, 64), (16, 4097), (1, 1_000_003)):
        assert kernels(B=B, T=T) == first, (B, T)
    documents = kernels(packed=True, states=False, T=300)
    for T, N in ((1, 1), (65, 40), (1_000_003, 9)):
        assert kernels(packed=True, states=False, T=T, N=N) == documents, (T, N)


@pytest.mark.parametrize(
    ("width", "dtype", "sweep"),
    [
        (20, BF16, "portable"),
        (24, BF16, "hopper"),
        (18, FP32, "portable"),
        (20, FP32, "hopper_float32"),
        (132, FP32, "portable"),
    ],
)
def test_one_token_is_swept_as_many_are(width: int, dtype: torch.dtype, sweep: str):
    """A prompt's only token, or its last chunk's, has the bits that it has amid others."""

    def swept(T: int) -> str:
        signature = ((1, T, 1, width), (T * width, width, width, 1)) * 3
        return tiling._tiling(((9, 0), 132), dtype, True, False, False, False, False, *signature).tiles.sweep

    assert swept(1) == swept(2) == sweep


@pytest.mark.parametrize("D", [64, 192])
def test_on_hopper_columns_of_v_are_nothing_to_a_forward_program(D: int):
    """It has all columns of q and k, and some of v, however many there are."""
    forward = [tiling.tiles((9, 0), D, E, BF16, True)._replace(BE=0) for E in (64, 256, 1000)]
    assert forward == [forward[0]] * 3
