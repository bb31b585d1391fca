"""transformers' Trainer: fine-tuning on text that every Python carries, resuming, documents without padding."""

import re
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
    pipeline,
)

from lightning_attention.cli.app import main
from lightning_attention.models.transnormer import TransnormerConfig, TransnormerForCausalLM
from tests.training.tiny import tiny_settings, train

pytest.importorskip("accelerate")

pytestmark = [
    # Trainer asks for pinned memory and autocast where there is no GPU, and accelerate for what torch calls old.
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def examples(count: int) -> list[dict[str, list[int]]]:
    """Sentences of Python's manual, of several lengths, as bytes; 0 is padding."""
    text = " ".join(topics.topics[name] for name in ("assert", "while", "if", "for"))
    sentences = [s.encode()[:90] for s in re.split(r"\.\s", text) if len(s) > 20]
    return [{"input_ids": list(s)} for s in (sentences * count)[:count]]


def pad(features: list[dict]) -> dict[str, Tensor]:
    rows = [torch.tensor(f["input_ids"]) for f in features]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": ids, "attention_mask": ids.ne(0).long(), "labels": ids.masked_fill(ids == 0, -100)}


def make() -> TransnormerForCausalLM:
    torch.manual_seed(0)
    config = TransnormerConfig(
        vocab_size=256, decoder_embed_dim=32, decoder_layers=2, decoder_attention_heads=2, glu_dim=64
    )
    return TransnormerForCausalLM(config)


def trainer(folder: Path, collator: Callable = pad, steps: int = 30, **arguments: object) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no", **arguments},
    )
    return Trainer(model=make(), args=arguments, train_dataset=examples(64), data_collator=collator)


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_falls_and_a_resumed_run_is_the_same_run(tmp_path: Path, checkpointing: bool) -> None:
    saving = {"save_strategy": "steps", "save_steps": 20, "gradient_checkpointing": checkpointing}
    whole = trainer(tmp_path / "a", **saving, gradient_accumulation_steps=2)
    whole.train()
    curve = losses(whole)
    assert len(curve) == 30
    assert sum(curve[:3]) > 3 * 4.5  # log 256 is 5.5
    assert sum(curve[-3:]) < 3 * 3.2
    resumed = trainer(tmp_path / "a", **saving, gradient_accumulation_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-20"))
    assert losses(resumed)[-10:] == curve[-10:]
    for expected, p in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, expected)
    loaded = TransnormerForCausalLM.from_pretrained(tmp_path / "a" / "checkpoint-30")
    ids = torch.tensor([examples(1)[0]["input_ids"]])
    assert torch.equal(loaded(ids).logits, whole.model.eval()(ids).logits)


@pytest.mark.parametrize("flash_names", [False, True])
def test_without_padding_it_learns_the_same(tmp_path: Path, flash_names: bool) -> None:
    padded = trainer(tmp_path, steps=6)
    flat = DataCollatorWithFlattening(return_flash_attn_kwargs=flash_names, return_position_ids=not flash_names)
    packed = trainer(tmp_path, flat, steps=6)
    padded.train()
    packed.train()
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-4)
    across = trainer(tmp_path, lambda batch: {k: v for k, v in flat(batch).items() if k in {"input_ids", "labels"}}, 6)
    across.train()
    assert losses(across)[-1] != pytest.approx(losses(padded)[-1], rel=1e-3)  # reading on is something else


def test_it_evaluates(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=1)
    run.train()
    few = examples(3)
    metrics = run.evaluate(eval_dataset=few)
    with torch.no_grad():
        alone = [run.model(torch.tensor([f["input_ids"]]), labels=torch.tensor([f["input_ids"]])).loss for f in few]
    lengths = torch.tensor([len(f["input_ids"]) - 1.0 for f in few])
    assert metrics["eval_loss"] == pytest.approx(float((torch.stack(alone) * lengths).sum() / lengths.sum()), rel=1e-4)


def test_a_run_of_the_command_goes_on_here_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = train(tiny_settings(tmp_path, steps=4, eval_every=4, save_every=4))[1].checkpoint
    tokenizer = AutoTokenizer.from_pretrained(begun)
    texts = [{"input_ids": tokenizer.encode(line)} for line in (tmp_path / "text.txt").read_text("utf-8").splitlines()]
    run = Trainer(
        model=AutoModelForCausalLM.from_pretrained(begun),
        args=TrainingArguments(
            str(tmp_path / "out"), max_steps=3, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True
        ),
        train_dataset=texts,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    run.train()
    folder = str(tmp_path / "saved")
    run.save_model(folder)
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--model", folder, "--max-tokens", "5", "--temperature", "0", "--ignore-eos", "the state"])
    assert not ended.value.code
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("the state")
    pipe = pipeline("text-generation", model=folder, device="cpu")
    mode = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "suppress_tokens": [tokenizer.pad_token_id]}
    assert pipe("the state", **mode)[0]["generated_text"].rstrip("\n") == said
