"""The training run, from the first step or from a checkpoint, to the last step or to a signal."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_attention.training import checkpoint
from lightning_attention.training.config import DEFAULT_STEPS, InputError, make_config, resumed_config
from lightning_attention.training.data import Windows, discard_data, open_data, prepare_data, validation_batches
from lightning_attention.training.interrupt import StopRequest
from lightning_attention.training.metrics import MetricsLog, read_metrics
from lightning_attention.training.model import load_model, new_model, new_optimizer, save_model
from lightning_attention.training.plot import plot_loss
from lightning_attention.training.runtime import Runtime
from lightning_attention.training.schedule import learning_rate, steps_in_budget
from lightning_attention.training.tokenizer import as_pretrained


class DivergedError(Exception):
    """The loss or its gradient is not a finite number any more."""


@dataclass(frozen=True)
class Progress:
    """What there is to show after a step. The loss and the speed are those of the last logged step."""

    step: int
    planned_steps: int | None  # None while a time budget is still being measured
    bits_per_byte: float | None
    tokens_per_second: float | None
    val_bits_per_byte: float | None


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    planned_steps: int | None
    val_bits_per_byte: float | None
    stopped_by: str | None  # a signal's name, or None when the run is complete
    checkpoint: Path
    plot: Path
    metrics: Path


class Trainer:
    """One training run in the folder `config.out`."""

    def __init__(self, settings: dict[str, Any], *, resume: bool = False, overwrite: bool = False) -> None:
        """Set a run up: from its newest whole checkpoint with `resume` where there is one, else from the start.

        Args:
            settings: names and values for TrainConfig; the rest are defaults, or what the checkpoint says.
            resume: go on from the newest whole checkpoint in the output folder, if there is one.
            overwrite: delete an earlier run's files in the output folder first.

        Raises:
            InputError: a setting, the text, the output folder or a checkpoint cannot be used.
        """
        self.config = make_config(settings)
        self.out = Path(self.config.out)
        self._checkpoints = self.out / "checkpoints"
        self._tokens = self.out / "tokens"
        self._metrics_path = self.out / "metrics.jsonl"
        state = self._open_folder(resume, overwrite)
        if state:
            self.config = resumed_config(state["config"], settings)
        config = self.config
        self.runtime = Runtime.choose(config.device, config.precision)
        self.data = open_data(config, self._tokens) if state else prepare_data(config, self._tokens)
        self._tokenizer = as_pretrained(self.data.tokenizer)
        self._windows = Windows(self.data.train, config.seq_len, config.batch_size * config.accumulate, config.seed)

        torch.manual_seed(config.seed)
        model = load_model(self.resumed_from) if self.resumed_from else new_model(config, self.data.vocab_size)
        self.model = model.to(self.runtime.device).train()
        self.optimizer = new_optimizer(config, self.model)
        # Only calls go through the compiled module: the weights keep the plain module's names.
        self._forward = torch.compile(self.model) if config.compile else self.model

        self.step = 0
        self.planned_steps = None if config.max_minutes else self._within_epochs(config.steps or DEFAULT_STEPS)
        self.seconds = 0.0  # spent on this run by all the processes that worked on it
        self.val_bits_per_byte: float | None = None
        self._eval_seconds = 0.0
        self._step_seconds: deque[float] = deque(maxlen=50)  # of the latest steps
        self._latest: tuple[Tensor, ...] = (torch.zeros(()), torch.zeros(()))  # loss and gradient norm
        self._shown: tuple[float | None, float | None] = (None, None)
        if state:
            self._restore(state)

    def fit(self, report: Callable[[Progress], None] | None = None) -> Outcome:
        """Train to the last step, or until SIGINT or SIGTERM asks to save and stop.

        Args:
            report: called after every step.

        Raises:
            DivergedError: the loss or the gradient became infinite or NaN; the newest checkpoint is from before that.
        """
        self._started = time.perf_counter() - self.seconds
        self._metrics = MetricsLog(self._metrics_path, self.step if self.resumed_from else None)
        checkpoint.atomic_text(self.out / "config.toml", self.config.as_toml())
        try:
            with StopRequest() as stop:
                if self.val_bits_per_byte is None:  # before the first step
                    self._validate()
                while not self._complete() and not stop.signal_name:
                    self._train_step()
                    self._plan()
                    if self._complete() or self._due(self.config.eval_every):
                        self._validate()
                    if self._complete() or self._due(self.config.save_every):
                        self._save()
                    if report:
                        report(Progress(self.step, self.planned_steps, *self._shown, self.val_bits_per_byte))
                self._save()
        finally:
            self._metrics.close()
            plot_loss(read_metrics(self._metrics_path), self.out / "loss.png")
        return Outcome(
            step=self.step,
            planned_steps=self.planned_steps,
            val_bits_per_byte=self.val_bits_per_byte,
            stopped_by=None if self._complete() else stop.signal_name,
            checkpoint=checkpoint.checkpoint_path(self._checkpoints, self.step),
            plot=self.out / "loss.png",
            metrics=self._metrics_path,
        )

    def _complete(self) -> bool:
        return self.planned_steps is not None and self.step >= self.planned_steps

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _train_step(self) -> None:
        """One update of the weights, and a line in the record when it is time for one."""
        began = time.perf_counter()
        rate = learning_rate(self.config, self.step, self.planned_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        tokens = self._windows.step(self.step)
        loss = torch.zeros((), device=self.runtime.device)
        for batch in tokens.split(self.config.batch_size):
            part = self._loss(batch) / self.config.accumulate
            part.backward()
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

        self._latest = (loss, norm)
        logged = self._complete() or self._due(self.config.log_every)
        if logged or self.planned_steps is None:
            self._check_finite()  # waits for the device, so that the clock below has seen all of the work
        self._step_seconds.append(time.perf_counter() - began)
        if logged:
            self._log_training(float(loss), float(norm), rate, tokens)

    def _check_finite(self) -> None:
        """Raise DivergedError when the latest loss or gradient is not finite: the weights are lost then."""
        for name, value in zip(("loss", "gradient norm"), self._latest, strict=True):
            if not math.isfinite(value):
                lr = self.config.lr
                raise DivergedError(f"the {name} is {float(value)} at step {self.step}; try a lower lr than {lr:g}")

    def _loss(self, batch: Tensor) -> Tensor:
        """Mean negative log-likelihood, in nats per token, of windows [b, t]."""
        batch = batch.to(self.runtime.device)
        with self.runtime.autocast():
            loss: Tensor = self._forward(input_ids=batch, labels=batch, use_cache=False).loss
        return loss

    def _log_training(self, nats: float, norm: float, rate: float, tokens: Tensor) -> None:
        bits_per_byte = self.data.bits_per_byte(nats * tokens.numel(), tokens)
        recent = list(self._step_seconds)[-self.config.log_every :]
        speed = self.config.tokens_per_step * len(recent) / sum(recent)
        self._shown = (bits_per_byte, speed)
        self._write(loss=nats, bits_per_byte=bits_per_byte, lr=rate, grad_norm=norm, tokens_per_second=speed)

    def _plan(self) -> None:
        """Fit the number of steps to the time budget, if there is one: after the warm-up, then at every logged step.

        What else the machine does may change, and a plan from the first seconds alone has missed the budget by half.
        The plan is in every checkpoint and in the record. Runs of given steps never come here.
        """
        if self.config.max_minutes is None or self.step < self.config.warmup_steps or self._complete():
            return
        if self.planned_steps is None or self._due(self.config.log_every):
            steps = steps_in_budget(
                self.config.max_minutes * 60,
                spent=time.perf_counter() - self._started,
                step=self.step,
                per_step=statistics.median(self._step_seconds),
                eval_seconds=self._eval_seconds,
                eval_every=self.config.eval_every,
            )
            self.planned_steps = self._within_epochs(steps)

    def _within_epochs(self, steps: int) -> int:
        """At most as many steps as `max_epochs` allows, and at least those already taken."""
        if self.config.max_epochs is None:
            return steps
        per_step = self.config.batch_size * self.config.accumulate
        most = math.ceil(self.config.max_epochs * self._windows.per_epoch / per_step)
        return max(self.step, min(steps, most))

    @torch.no_grad()
    def _validate(self) -> None:
        """Measure the loss on the held-out text: the length in bits of its code under the model, per byte."""
        began = time.perf_counter()
        config = self.config
        self.model.eval()
        nats, tokens, text_bytes = 0.0, 0, 0
        for batch in validation_batches(self.data.val, config.seq_len, config.batch_size, config.eval_tokens):
            predicted = batch[:, 1:]
            nats += float(self._loss(batch)) * predicted.numel()
            tokens += predicted.numel()
            text_bytes += self.data.count_bytes(predicted)
        self.model.train()
        self.val_bits_per_byte = nats / math.log(2) / max(1, text_bytes)
        self._eval_seconds = time.perf_counter() - began
        self._write(val_loss=nats / tokens, val_bits_per_byte=self.val_bits_per_byte)

    def _write(self, **values: float) -> None:
        tokens = self.step * self.config.tokens_per_step
        seconds = round(time.perf_counter() - self._started, 3)
        plan = {"planned_steps": self.planned_steps} if self.config.max_minutes else {}
        self._metrics.write({"step": self.step, "tokens": tokens, "seconds": seconds, **plan, **values})

    def _save(self) -> None:
        """Write a checkpoint of this step, unless there is one, and drop the oldest."""
        target = checkpoint.checkpoint_path(self._checkpoints, self.step)
        if not target.exists():
            self._check_finite()
            with checkpoint.atomic_folder(target) as folder:
                save_model(self.model, folder)
                self._tokenizer.save_pretrained(folder)
                checkpoint.save_state(folder, self._state())
        checkpoint.prune(self._checkpoints, self.config.keep)

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,  # the position in the data too: what a step reads depends on its number alone
            "planned_steps": self.planned_steps,
            "seconds": time.perf_counter() - self._started,
            "val_bits_per_byte": self.val_bits_per_byte,
            "eval_seconds": self._eval_seconds,
            "config": self.config.as_dict(),
            "data_fingerprint": self.data.fingerprint,
            "optimizer": self.optimizer.state_dict(),
            "rng": self.runtime.rng_state(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        if state["data_fingerprint"] != self.data.fingerprint:
            raise InputError(f"the token files in {self._tokens} are not those that {self.resumed_from} was trained on")
        self.optimizer.load_state_dict(state["optimizer"])
        self.runtime.set_rng_state(state["rng"])
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.val_bits_per_byte = state["val_bits_per_byte"]
        self._eval_seconds = state["eval_seconds"]
        if self.config.max_minutes:
            self.planned_steps = state["planned_steps"]

    def _open_folder(self, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """Make the output folder ready; the state to go on from, if any, which sets `resumed_from`."""
        self.resumed_from: Path | None = None
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the folder {self.out}: {error.strerror}") from error
        if overwrite:
            for folder in checkpoint.checkpoints(self._checkpoints):
                checkpoint.remove_folder(folder)
        found = checkpoint.checkpoints(self._checkpoints)
        if found and not resume:
            raise InputError(f"{self.out} holds checkpoints; add --resume to go on or --overwrite to start again")
        for root in (self.out, self._checkpoints):
            checkpoint.clear_leftovers(root)
        if not found:
            # Token files without a checkpoint may be of another text, and are cheap to make again.
            discard_data(self._tokens)
            return None
        self.resumed_from = found[-1]
        return checkpoint.load_state(self.resumed_from)
