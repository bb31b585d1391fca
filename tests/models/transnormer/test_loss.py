"""The loss with labels in training, for which no logits are made, is the one that logits have."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from lightning_attention.models.transnormer import TransnormerConfig, TransnormerForCausalLM
from tests.support.calls import MODULE, Calls
from tests.support.numerics import relative_error

MASK = torch.ones(3, 90, dtype=torch.long)
MASK[0, :20], MASK[1, 50:], MASK[2, 30:33] = 0, 0, 0


def batches(ids: Tensor) -> dict[str, dict[str, Any]]:
    labels = ids.clone()
    labels[:, 40:50] = -100
    some = {"input_ids": ids, "labels": labels}
    packed = {"input_ids": ids[:1], "labels": labels[:1]}
    return {
        "plain": some,
        "padded": {**some, "attention_mask": MASK},
        "documents": {**packed, "cu_seqlens": torch.tensor([0, 7, 7, 60, 90])},
        "positions": {**packed, "position_ids": torch.cat([torch.arange(30), torch.arange(60)])[None]},
        "items": {**some, "num_items_in_batch": 1000},
        "items on a device": {**some, "num_items_in_batch": torch.tensor(1000)},
        "shifted": {"input_ids": ids, "shift_labels": labels.flip(1)},
        "shifted too": {**some, "shift_labels": labels.flip(1)},
        "not shifted": {**some, "shift_labels": None},
        "another number is ignored": {"input_ids": ids, "labels": ids, "ignore_index": int(ids[0, 50])},
        "and padding": {"input_ids": ids, "labels": ids, "ignore_index": 5, "attention_mask": MASK},
        "and documents": {**packed, "labels": ids[:1], "ignore_index": 5, "cu_seqlens": torch.tensor([0, 7, 90])},
    }


def step(model: TransnormerForCausalLM, batch: dict[str, Any], **how: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch, **how).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: TransnormerForCausalLM, batch: dict[str, Any]) -> None:
    loss, gradients = step(model, batch)
    wanted, exact = step(model, batch, skip_logits=False)
    assert relative_error(loss, wanted) <= 1e-6
    assert gradients.keys() == exact.keys()
    for name, gradient in gradients.items():
        assert relative_error(gradient, exact[name]) <= 1e-5, name


@pytest.mark.parametrize("name", batches(torch.zeros(3, 90, dtype=torch.long)))
def test_the_loss_and_its_gradients(model: TransnormerForCausalLM, ids: Tensor, name: str) -> None:
    assert_same(model.train(), batches(ids)[name])


def test_every_one_of_those_is_another_loss(model: TransnormerForCausalLM, ids: Tensor) -> None:
    losses = {name: float(model.train()(**batch).loss.detach()) for name, batch in batches(ids).items()}
    same = {("items", "items on a device"), ("shifted", "shifted too"), ("plain", "not shifted")}
    for a in losses:
        for b in losses:
            if a < b:
                assert (losses[a] == losses[b]) == ((a, b) in same or (b, a) in same), (a, b)


def test_when_there_are_logits(model: TransnormerForCausalLM, ids: Tensor) -> None:
    labels = {"input_ids": ids, "labels": ids}

    def logits(**how: Any) -> bool:
        return model(**how).logits is not None

    assert logits(**labels)
    assert not logits(**labels, skip_logits=True)
    loss, *_ = model(**labels, skip_logits=True, return_dict=False)
    assert relative_error(loss, model(**labels).loss) <= 1e-6
    model.train()
    assert not logits(**labels)
    assert not logits(input_ids=ids, shift_labels=ids)
    assert logits(**labels, skip_logits=False)
    assert logits(input_ids=ids)
    model.config.skip_logits = False
    assert logits(**labels)
    model.eval()
    model.config.skip_logits = True
    assert not logits(**labels)
    assert logits(input_ids=ids)
    assert logits(**labels, skip_logits=False)


def test_what_is_refused(model: TransnormerForCausalLM, ids: Tensor) -> None:
    for labels in ({"labels": ids}, {"shift_labels": ids}):
        for keep in (5, torch.tensor([3])):
            with pytest.raises(ValueError, match="logits_to_keep is given with labels"):
                model(ids, **labels, logits_to_keep=keep)
    with pytest.raises(ValueError, match="skip_logits is True, and there are no labels"):
        model(ids, skip_logits=True)


def test_no_tensor_has_tokens_times_vocabulary(ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "BUDGET", 20 * 3000 * 4)
    config = TransnormerConfig(
        vocab_size=3000, decoder_embed_dim=16, decoder_layers=1, decoder_attention_heads=2, glu_dim=16
    )
    model = TransnormerForCausalLM(config).train()
    with Calls() as seen:
        model(ids, labels=ids).loss.backward()
    assert seen.largest <= 20 * 3000
    with Calls() as seen:
        model(ids, labels=ids, skip_logits=False).loss.backward()
    assert seen.largest >= ids.numel() * 3000


@pytest.mark.parametrize("trained", ["head", "body", "embedding"])
def test_a_part_is_frozen(model: TransnormerForCausalLM, ids: Tensor, trained: str) -> None:
    parts = {"head": model.lm_head, "body": model.model.layers, "embedding": model.model.embed_tokens}
    model.requires_grad_(False)
    parts[trained].requires_grad_(True)
    assert_same(model.train(), batches(ids)["plain"])
    assert {p for p in model.parameters() if p.grad is not None} == set(parts[trained].parameters())


def test_a_tied_head(ids: Tensor) -> None:
    config = TransnormerConfig(
        vocab_size=97, decoder_embed_dim=32, decoder_layers=1, decoder_attention_heads=2, glu_dim=24, init_std=0.2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = TransnormerForCausalLM(config).train()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same(model, batches(ids)["plain"])


def test_in_bfloat16_and_under_autocast(model: TransnormerForCausalLM, ids: Tensor) -> None:
    exact, gradients = step(model.train(), batches(ids)["plain"])
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batches(ids)["plain"]).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert relative_error(loss, exact) <= 2e-3
    assert relative_error(model.lm_head.weight.grad, 2 * gradients["lm_head.weight"]) <= 0.05
    loss, gradients16 = step(model.bfloat16(), batches(ids)["plain"])
    assert loss.dtype == torch.float32
    assert relative_error(loss, exact) <= 5e-3
    assert relative_error(gradients16["lm_head.weight"], gradients["lm_head.weight"]) <= 0.05


class Doubled(nn.Linear):
    """A head that is more than its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_head_of_another_kind_makes_logits_for_the_loss(model: TransnormerForCausalLM, ids: Tensor) -> None:
    before = model.train()(ids, labels=ids).loss
    head = Doubled(32, 97, bias=False)
    head.load_state_dict(model.lm_head.state_dict())
    model.lm_head = head
    out = model(ids, labels=ids)
    assert out.logits is None
    assert relative_error(out.loss, model(ids, labels=ids, skip_logits=False).loss) <= 1e-6
    assert relative_error(out.loss, before) > 0.01


# peft 0.21 asks transformers 5.23 by names that it calls old.
@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
def test_an_adapter_on_the_head(model: TransnormerForCausalLM, ids: Tensor) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["lm_head", "out_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).train()
    loss, gradients = step(adapted, batches(ids)["plain"])
    assert relative_error(loss, adapted(**batches(ids)["plain"], skip_logits=False).loss) <= 1e-6
    assert any("lm_head" in name for name in gradients)
    with adapted.disable_adapter():
        assert relative_error(loss, adapted(**batches(ids)["plain"]).loss) > 1e-3


def test_a_hook_on_the_head(model: TransnormerForCausalLM, ids: Tensor) -> None:
    seen = []
    handle = model.lm_head.register_forward_hook(lambda _m, _i, out: seen.append(out.shape))
    model.train()(ids, labels=ids)
    assert seen == [(3, 90, 97)]
    handle.remove()
    model(ids, labels=ids)
    assert len(seen) == 1


def test_a_loss_function_of_ones_own_gets_logits(model: TransnormerForCausalLM, ids: Tensor) -> None:
    def halved(logits: Tensor, labels: Tensor, vocab_size: int, **how: Any) -> Tensor:
        return ForCausalLMLoss(logits, labels, vocab_size, **how) / 2

    whole = model.train()(ids, labels=ids).loss
    model.loss_function = halved
    assert relative_error(model(ids, labels=ids).loss, whole / 2) <= 1e-6


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer(model: TransnormerForCausalLM, ids: Tensor, tmp_path: Path, smoothing: float) -> None:
    """Accumulating, so that the number of labels is Trainer's; smoothed labels, which want logits, are its own."""
    pytest.importorskip("accelerate")
    initial = {name: x.clone() for name, x in model.state_dict().items()}

    def train(skip_logits: bool | None) -> list[float]:
        model.load_state_dict(initial)
        model.config.skip_logits = skip_logits
        arguments = TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
            learning_rate=1e-2, label_smoothing_factor=smoothing, report_to=[], use_cpu=True, disable_tqdm=True,
            save_strategy="no",
        )  # fmt: skip
        rows = [{"input_ids": row[: 60 + i], "labels": row[: 60 + i]} for i, row in enumerate(ids.repeat(4, 1))]
        run = Trainer(model, arguments, train_dataset=rows, data_collator=pad, eval_dataset=rows[:2])
        run.train()
        entries = [*run.state.log_history, run.evaluate()]
        return [entry[name] for entry in entries for name in ("loss", "eval_loss") if name in entry]

    curve = train(None)
    assert len(curve) == 4
    assert curve == pytest.approx(train(False), rel=1e-5)
    assert curve[0] - curve[2] > 0.1


def pad(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    def together(name: str, value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)

    ids, labels = together("input_ids", 0), together("labels", -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": (labels != -100).long()}
