import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from lightning_attention.cli.train import _introduction, _numbers
from lightning_attention.models.transnormer import TransnormerConfig
from lightning_attention.training.config import make_config
from lightning_attention.training.flops import BLOCK, GpuMeter, Shape, flops_per_token, peak_flops
from lightning_attention.training.metrics import read_metrics
from lightning_attention.training.progress import GpuUse, Progress
from lightning_attention.training.runtime import Runtime
from lightning_attention.training.trainer import Trainer
from tests.training.tiny import tiny_settings, train

CONFIGS = {
    **{name: TransnormerConfig.from_name(name) for name in ("385M", "1B", "3B", "7B")},
    "biases": TransnormerConfig.from_name(
        "385M", bias=True, linear_use_lrpe_list=[1, 0] * 12, tie_word_embeddings=True
    ),
    "narrow heads": TransnormerConfig(decoder_layers=2, hidden_dim=512),
    "llama": LlamaConfig(hidden_size=1024, num_hidden_layers=3, num_attention_heads=8, intermediate_size=2816),
    "llama, few keys": LlamaConfig(
        hidden_size=512, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, intermediate_size=1408,
        tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_counted_as_the_model_has_them(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name])
    shape = Shape.of(CONFIGS[name])
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    multiplied = sum(p.numel() for p in model.parameters() if p.ndim == 2 and p is not embedding and p is not head)
    assert shape.multiplied == multiplied + head.numel()


def counted(model: torch.nn.Module, T: int) -> tuple[int, int]:
    """The products of a forward pass, and of both passes, as PyTorch counts them."""
    ids = torch.arange(T)[None] % 50
    with FlopCounterMode(display=False) as forward:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()


def test_flops_of_a_softmax_model_are_those_of_its_products():
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, attn_implementation="eager",
    )  # fmt: skip
    T = 40
    forward, both = counted(AutoModelForCausalLM.from_config(config), T)
    attention = Shape.of(config).attention_flops(T)
    # Eager attention computes all of T x T, where half of it is the model's. Some versions multiply rope's angles too.
    assert forward == pytest.approx(T * (2 * Shape.of(config).multiplied + 2 * attention), rel=1e-3)
    assert both == pytest.approx(T * (flops_per_token(config, T) + 3 * attention), rel=1e-3)


def test_flops_of_a_linear_model_are_those_of_its_products():
    config = TransnormerConfig(
        vocab_size=50, decoder_embed_dim=32, decoder_layers=3, decoder_attention_heads=4, glu_dim=48,
        linear_use_lrpe_list=[1, 0, 0],
    )  # fmt: skip
    T = 4 * BLOCK
    q, k, v = torch.randn(4, BLOCK, 8), torch.randn(4, BLOCK, 8), torch.randn(4, BLOCK, 8)
    wide = torch.randn(4, BLOCK, 16)

    def products(q: torch.Tensor, k: torch.Tensor) -> int:
        """The multiplications and additions of one block of four heads."""
        with FlopCounterMode(display=False) as within:
            (q @ k.mT) @ v
        with FlopCounterMode(display=False) as between:
            q @ (k.mT @ v)
        return within.get_total_flops() // 2 + between.get_total_flops()

    attention = (products(wide, wide) + 2 * products(q, k)) // BLOCK
    assert Shape.of(config).attention_flops(T) == Shape.of(config).attention_flops(10 * T) == attention
    # What the operator does within is not counted here, nor is the loss without logits; all else is.
    forward, both = counted(AutoModelForCausalLM.from_config(config).eval(), T)
    assert forward == T * 2 * Shape.of(config).multiplied
    assert both == T * (flops_per_token(config, T) - 3 * attention)


def test_the_released_385m():
    # 2.39 GFLOP a token by its matrices, and linear attention 2 % more.
    assert flops_per_token(CONFIGS["385M"], 1024) == pytest.approx(6 * 399e6 * 1.02, rel=2e-3)


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="config is of model type 'gpt2'; it must be 'transnormer' or 'llama'"):
        flops_per_token(GPT2Config(n_inner=12), 10)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 836),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_peaks_of_known_gpus(name, tera):
    assert peak_flops(name) == tera * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H20", "NVIDIA RTX A1000", "NVIDIA L4", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU", "",
    ],
)  # fmt: skip
def test_other_gpus_have_no_peak(name):
    assert peak_flops(name) is None


A_385M = SimpleNamespace(config=CONFIGS["385M"])


def pretend(monkeypatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 30)


def test_a_gpu_is_measured(monkeypatch):
    pretend(monkeypatch, "NVIDIA H200")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    meter = GpuMeter.of(Runtime(torch.device("cuda"), bf16=True), A_385M, 1024)
    use = meter.read(2 * 200_000)
    assert (use.tokens_per_second, use.peak_memory, meter.remark) == (200_000, 3 << 30, None)
    assert use.mfu == pytest.approx(200_000 * 6 * 399e6 * 1.02 / 989e12, rel=2e-3)
    # Of a float32 run there is no share of bf16's peak.
    assert GpuMeter.of(Runtime(torch.device("cuda"), bf16=False), A_385M, 1024).read(1.0).mfu is None


def test_an_unknown_gpu_is_named_once_and_has_no_mfu(monkeypatch, tmp_path):
    pretend(monkeypatch, "Chip 9")
    meter = GpuMeter.of(Runtime(torch.device("cuda"), bf16=True), A_385M, 1024)
    assert meter.read(1.0) == GpuUse(1.0, None, 3 << 30)
    monkeypatch.setattr(GpuMeter, "of", lambda *_: meter)
    trainer = Trainer(make_config(tiny_settings(tmp_path)))
    trainer.folder.release()
    assert _introduction(trainer).endswith("in a step; no MFU is shown: the peak of Chip 9 is not known")


def test_a_run_on_a_gpu_records_and_shows_it(monkeypatch, tmp_path):
    pretend(monkeypatch, "")
    meter = GpuMeter(torch.device("cuda"), 4, 1000, 1e9, None)
    monkeypatch.setattr(GpuMeter, "of", lambda *_: meter)
    seen: list[Progress] = []
    trainer = Trainer(make_config(tiny_settings(tmp_path)))
    trainer.fit(seen.append)
    lines = [line for line in read_metrics(trainer.folder.metrics) if "loss" in line]
    for line in lines:
        assert line["tokens_per_second_per_gpu"] == line["tokens_per_second"] / 4
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] / 4 * 1000 / 1e9)
        assert line["peak_memory"] == 3 << 30
    assert seen[-1].gpu == GpuUse(lines[-1]["tokens_per_second_per_gpu"], lines[-1]["mfu"], 3 << 30)
    shown = Progress(1, 9, True, 2.0, 4000.0, None, GpuUse(1000.0, 0.512, 3 << 30))
    assert _numbers(shown) == ("loss 2.000 bits/byte", "1,000 tokens/s/GPU, MFU 0.51, 3.0 GiB")


def test_on_a_cpu_nothing_of_it_shows(tmp_path):
    trainer, outcome = train(tiny_settings(tmp_path))
    assert trainer.meter is None
    keys = {key for line in read_metrics(outcome.metrics) for key in line}
    assert not keys & {"mfu", "peak_memory", "tokens_per_second_per_gpu"}
    assert json.loads(outcome.metrics.read_text().splitlines()[1])["tokens_per_second"] < math.inf
    assert _numbers(Progress(1, 9, True, 2.0, 4000.0, None))[1] == "4,000 tokens/s"
