"""How trainers make a layer: on the meta device, emptied, sharded, initialised; its decays keep their numbers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_attention import decay
from lightning_attention.models.transnormer.mixer import TransnormerMixer
from lightning_attention.nn import LRPE, LightningAttention
from lightning_attention.nn.base import FixedDecayAttention

LAYERS: dict[str, Callable[[], FixedDecayAttention]] = {
    "minimax": lambda: LightningAttention.minimax(32, 4, layer=1, num_layers=4),
    "bailing": lambda: LightningAttention.bailing(32, 4, layer=1, num_layers=4, norm_groups=2),
    "minicpm_sala": lambda: LightningAttention.minicpm_sala(32, 4),
    "retnet": lambda: LightningAttention.retnet(32, 4),
    "transnormer": lambda: LightningAttention.transnormer(32, 4, layer=0, num_layers=4),
    "plain": lambda: LightningAttention(32, 4, decay.alibi(4)),
    "gated": lambda: TransnormerMixer(32, 4, decay.transnormer(4, 0, 4), lrpe=True),
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def reset(module: nn.Module) -> None:
    """What torchtitan and FSDP's documentation do after to_empty."""
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()


@pytest.fixture
def garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote holds what nobody wants."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: empty_like(*args, **kwargs).fill_(torch.nan))


@every_layer
def test_emptied_after_it_had_values(make: Callable[[], FixedDecayAttention], garbage: None) -> None:
    layer = make()
    decays, values, x = layer.log_decay.clone(), layer.state_dict(), torch.randn(2, 9, 32)
    values = {name: value.clone() for name, value in values.items()}
    expected = layer(x)[0]
    for emptied in (layer, nn.ModuleList([layer])):  # alone, and inside something
        emptied.to_empty(device="cpu")
        assert torch.equal(layer.log_decay, decays)
        assert next(layer.parameters()).isnan().all()
    layer.load_state_dict(values)
    assert torch.equal(layer(x)[0], expected)


@every_layer
def test_built_on_the_meta_device(make: Callable[[], FixedDecayAttention], garbage: None) -> None:
    expected, x = make(), torch.randn(2, 9, 32)
    with torch.device("meta"):
        layer = make()
    assert layer.log_decay.is_meta
    assert all(p.is_meta for p in layer.parameters())
    layer.to_empty(device="cpu")
    assert torch.equal(layer.log_decay, expected.log_decay)
    reset(layer)
    for name, parameter in layer.named_parameters():
        assert parameter.isfinite().all(), name
        if "norm" in name or "theta" in name:  # these start from a formula
            assert torch.equal(parameter, expected.get_parameter(name))
    layer.load_state_dict(expected.state_dict())
    assert torch.equal(layer(x)[0], expected(x)[0])


def test_a_schedule_has_numbers_on_the_meta_device_too() -> None:
    expected = [decay.alibi(6), decay.retnet(3), decay.minimax(4, 1, 4)]
    with torch.device("meta"):
        found = [decay.alibi(6), decay.retnet(3), decay.minimax(4, 1, 4)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_decays_that_were_changed_stay_changed() -> None:
    layer = LAYERS["minimax"]()
    layer.log_decay = layer.log_decay * 2
    decays = layer.log_decay.clone()
    for moved in (layer.bfloat16(), layer.float(), layer.double(), layer.to_empty(device="cpu")):
        assert torch.equal(moved.log_decay, decays)
        assert moved.log_decay.dtype == torch.float32


@pytest.mark.parametrize("cls", [LightningAttention, TransnormerMixer])
@pytest.mark.parametrize(
    ("log_decay", "error", "message"),
    [
        (0.9, TypeError, r"log_decay is a float; it must be a tensor, \[3\] torch.float32"),
        (torch.tensor(0.9), ValueError, r"log_decay is \[\] torch.float32 on cpu; it must be \[3\]"),
        (torch.tensor([-0.1, 0.9, 0.0]), ValueError, r"log_decay\[1\] is 0.89.*; it must be at most 0"),
        (torch.tensor([-0.1, -0.2, torch.nan]), ValueError, r"log_decay\[2\] is nan; it must be at most 0"),
        (torch.tensor([torch.inf, 0.0, 0.0]), ValueError, r"log_decay\[0\] is inf; it must be at most 0"),
        (torch.zeros(3, requires_grad=True), ValueError, "log_decay requires a gradient"),
    ],
)
def test_decays_that_are_none(cls: type, log_decay: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cls(24, 3, log_decay)


def test_heads_that_forget_at_once_or_never_are_decays() -> None:
    layer = LightningAttention(24, 3, torch.tensor([0.0, -torch.inf, torch.finfo(torch.float32).min]))
    assert layer.bfloat16().log_decay.tolist() == [0.0, -torch.inf, torch.finfo(torch.float32).min]


def _sharded(rank: int, ranks: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    x = torch.randn(2, 9, 32)
    for name, make in LAYERS.items():
        expected = make()
        with torch.device("meta"):
            layer = make()
        fully_shard(layer, mesh=dist.device_mesh.init_device_mesh("cpu", (ranks,)))
        layer.to_empty(device="cpu")
        reset(layer)
        assert torch.equal(layer.log_decay, expected.log_decay), name
        for parameter_name, parameter in layer.named_parameters():
            whole: Tensor = parameter.full_tensor()
            assert whole.isfinite().all(), (name, parameter_name)
            if "norm" in parameter_name or "theta" in parameter_name:
                assert torch.equal(whole, expected.get_parameter(parameter_name)), (name, parameter_name)
        layer(x)[0].square().mean().backward()
        assert all(p.grad.full_tensor().isfinite().all() for p in layer.parameters()), name
    dist.barrier()  # a rank that leaves while the other receives can abort it
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*barrier.*:UserWarning")
def test_sharded_from_the_meta_device(tmp_path: Path) -> None:
    """4 heads on 2 ranks, so that LRPE's frequencies are cut between them."""
    torch.multiprocessing.spawn(_sharded, (2, str(tmp_path)), nprocs=2)


def test_the_frequencies_are_reset() -> None:
    layer = LRPE(4, 8)
    expected = layer.theta.clone()
    nn.init.zeros_(layer.theta)
    layer.reset_parameters()
    assert torch.equal(layer.theta, expected)
