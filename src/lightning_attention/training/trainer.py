"""The training run, from the first step or from a checkpoint, to the last step or to a signal."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_attention.errors import DivergedError, InputError
from lightning_attention.models.transnormer.pretrained import load_model, save_model
from lightning_attention.training import checkpoint
from lightning_attention.training.config import DEFAULT_STEPS, make_config, resumed_config
from lightning_attention.training.data import Windows, open_data, prepare_data, validation_batches
from lightning_attention.training.disk import writing
from lightning_attention.training.interrupt import StopRequest
from lightning_attention.training.metrics import MetricsLog, read_metrics
from lightning_attention.training.model import new_model, new_optimizer
from lightning_attention.training.plot import plot_loss
from lightning_attention.training.progress import HeldOutLoss, MeanLoss, Outcome, Progress
from lightning_attention.training.run_folder import RunFolder
from lightning_attention.training.runtime import Runtime
from lightning_attention.training.schedule import learning_rate, steps_in_budget
from lightning_attention.training.tokenizer import as_pretrained


class Trainer:
    """One training run in the folder `config.out`."""

    def __init__(
        self,
        settings: dict[str, Any],
        *,
        resume: bool | Literal["auto"] = False,
        overwrite: bool = False,
        report: Callable[[str], None] | None = None,
    ) -> None:
        """Set a run up from the start or, with `resume`, from its newest whole checkpoint.

        The output folder is held until `fit` ends: no other process can train in it.

        Args:
            settings: names and values for TrainConfig; the rest are defaults, or what the checkpoint says.
            resume: go on from the newest whole checkpoint in the output folder; "auto" starts where there is none.
            overwrite: delete an earlier run's files in the output folder, once the new run's text and model are there.
            report: called with every line of what was read and what was left out.

        Raises:
            InputError: a setting, the text, the output folder or a checkpoint cannot be used.
            DiskError: there is no room for the text.
        """
        self.config = make_config(settings)
        self.out = Path(self.config.out)
        self._folder = RunFolder(self.out)
        if resume is True:  # before a folder is made
            self._require_checkpoint()
        self._folder.claim()
        try:
            self._set_up(settings, resume, overwrite, report)
        except BaseException:
            self._folder.release()
            raise

    def _set_up(
        self,
        settings: dict[str, Any],
        resume: bool | Literal["auto"],
        overwrite: bool,
        report: Callable[[str], None] | None,
    ) -> None:
        state = self._find_checkpoint(resume, overwrite)
        if state:
            self.config = resumed_config(state["config"], settings)
        config = self.config
        self.runtime = Runtime.choose(config.device, config.precision)
        if state:
            self.data = open_data(config, self._folder.tokens)
        else:
            self.data = prepare_data(config, self._folder.fresh_tokens, report)
        torch.manual_seed(config.seed)
        model = load_model(self.resumed_from) if self.resumed_from else new_model(config, self.data.vocab_size)
        self.model = model.to(self.runtime.device).train()
        self.optimizer = new_optimizer(config, self.model)
        # Only calls go through the compiled module: the weights keep the plain module's names.
        self._forward = torch.compile(self.model) if config.compile else self.model
        if not state:  # the new run's text and model are there, so the one before may go
            self._replace_earlier_run()
            self.data = open_data(config, self._folder.tokens)
        self._tokenizer = as_pretrained(self.data.tokenizer)
        self._windows = Windows(self.data.train, config.seq_len, config.batch_size * config.accumulate, config.seed)

        self.step = 0
        self.planned_steps = None if config.max_minutes else self._within_epochs(config.steps or DEFAULT_STEPS)
        self.seconds = 0.0  # spent on this run by all the processes that worked on it
        self.held_out: HeldOutLoss | None = None
        self._eval_seconds = 0.0
        self._step_seconds: deque[float] = deque(maxlen=50)  # of the latest steps
        self._mean_loss = MeanLoss()
        nothing = torch.zeros((), device="cpu")
        self._latest: tuple[Tensor, ...] = (nothing, nothing)  # loss and gradient norm
        self._shown: tuple[float | None, float | None] = (None, None)
        if state:
            self._restore(state)

    def kept(self) -> str:
        """What there is to go on from, in words."""
        return self._folder.kept()

    def fit(
        self,
        report: Callable[[Progress], None] | None = None,
        acknowledge: Callable[[str, bool], None] | None = None,
    ) -> Outcome:
        """Train to the last step, or until SIGINT, SIGTERM or SIGHUP asks to save and stop.

        Args:
            report: called after every step.
            acknowledge: called at once, in another thread, with a signal's name and whether it is the second.

        Raises:
            DivergedError: the loss or the gradient became infinite or NaN; the newest checkpoint is from before that.
            DiskError: something could not be written; the newest checkpoint is whole.
            StoppedAtOnce: a second signal came before the run had been saved.
        """
        try:
            outcome = self._fit(report, acknowledge)
        except Exception:
            with suppress(Exception):  # the error that ended the run is the one to tell
                self._plot()
            raise
        finally:
            self._folder.release()
        return outcome

    def _fit(
        self, report: Callable[[Progress], None] | None, acknowledge: Callable[[str, bool], None] | None
    ) -> Outcome:
        self._started = time.perf_counter() - self.seconds
        self._metrics = MetricsLog(self._folder.metrics, self.step if self.resumed_from else None)
        with StopRequest(acknowledge) as stop:
            try:
                with writing(self._folder.settings):
                    checkpoint.atomic_text(self._folder.settings, self.config.as_toml())
                if self.held_out is None:  # before the first step
                    self._validate()
                while not self._complete() and not stop.signal_name:
                    self._train_step()
                    self._plan()
                    if self._complete() or self._due(self.config.eval_every):
                        self._validate()
                    if self._complete() or self._due(self.config.save_every):
                        self._save()
                    if report:
                        logged = self._complete() or self._due(self.config.log_every)
                        report(Progress(self.step, self.planned_steps, logged, *self._shown, self.held_out))
                self._save()
            finally:
                self._metrics.close()
            self._plot()
        return Outcome(
            step=self.step,
            planned_steps=self.planned_steps,
            held_out=self.held_out,
            stopped_by=None if self._complete() else stop.signal_name,
            checkpoint=checkpoint.checkpoint_path(self._folder.checkpoints, self.step),
            plot=self._folder.plot,
            metrics=self._folder.metrics,
        )

    def _plot(self) -> None:
        with writing(self._folder.plot):
            plot_loss(read_metrics(self._folder.metrics), self._folder.plot)

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
        self._mean_loss.add(loss, tokens.numel(), self.data.count_bytes(tokens))
        logged = self._complete() or self._due(self.config.log_every)
        if logged or self.planned_steps is None:
            self._check_finite()  # waits for the device, so that the clock below has seen all of the work
        self._step_seconds.append(time.perf_counter() - began)
        if logged:
            self._log_training(float(norm), rate)

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

    def _log_training(self, norm: float, rate: float) -> None:
        nats, bits_per_byte = self._mean_loss.take()
        recent = list(self._step_seconds)[-self.config.log_every :]
        speed = self.config.tokens_per_step * len(recent) / sum(recent)
        self._shown = (bits_per_byte, speed)
        self._write(loss=nats, bits_per_byte=bits_per_byte, lr=rate, grad_norm=norm, tokens_per_second=speed)

    def _plan(self) -> None:
        """Fit the number of steps to the time budget, if there is one: after the warm-up, then at every logged step.

        What else the machine does may change, and a plan from the first seconds alone has missed the budget by half.
        The plan is in every checkpoint and in the record. Runs of given steps never come here. A warm-up that takes all
        of the budget ends with it.
        """
        if self.config.max_minutes is None or self._complete():
            return
        spent = time.perf_counter() - self._started
        if self.step < self.config.warmup_steps and spent < self.config.max_minutes * 60:
            return
        if self.planned_steps is None or self._due(self.config.log_every):
            steps = steps_in_budget(
                self.config.max_minutes * 60,
                spent=spent,
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
        most = self.config.max_epochs * self._windows.per_epoch / per_step
        return max(self.step, math.ceil(min(steps, most)))

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
        self.held_out = HeldOutLoss(nats / math.log(2) / max(1, text_bytes), self.step)
        self._eval_seconds = time.perf_counter() - began
        self._write(val_loss=nats / tokens, val_bits_per_byte=self.held_out.bits_per_byte)

    def _write(self, **values: float) -> None:
        tokens = self.step * self.config.tokens_per_step
        seconds = round(time.perf_counter() - self._started, 3)
        plan = {"planned_steps": self.planned_steps} if self.config.max_minutes else {}
        self._metrics.write({"step": self.step, "tokens": tokens, "seconds": seconds, **plan, **values})

    def _save(self) -> None:
        """Write a checkpoint of this step, unless there is one, and drop the oldest."""
        target = checkpoint.checkpoint_path(self._folder.checkpoints, self.step)
        if not target.exists():
            self._check_finite()
            # The inner one tells how much room there was before what is unfinished is deleted.
            with writing(target), checkpoint.atomic_folder(target) as folder, writing(target):
                save_model(self.model, folder)
                self._tokenizer.save_pretrained(folder)
                checkpoint.save_state(folder, self._state())
        checkpoint.prune(self._folder.checkpoints, self.config.keep)

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,  # the position in the data too: what a step reads depends on its number alone
            "planned_steps": self.planned_steps,
            "seconds": time.perf_counter() - self._started,
            "held_out": self.held_out and asdict(self.held_out),
            "mean_loss": self._mean_loss.state(),
            "eval_seconds": self._eval_seconds,
            "config": self.config.as_dict(),
            "data_fingerprint": self.data.fingerprint,
            "optimizer": self.optimizer.state_dict(),
            "rng": self.runtime.rng_state(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        if state["data_fingerprint"] != self.data.fingerprint:
            raise InputError(
                f"the token files in {self._folder.tokens} are not those that {self.resumed_from} was trained on"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self.runtime.set_rng_state(state["rng"])
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.held_out = HeldOutLoss(**state["held_out"]) if state["held_out"] else None
        self._mean_loss.restore(state["mean_loss"])
        self._eval_seconds = state["eval_seconds"]
        if self.config.max_minutes:
            self.planned_steps = state["planned_steps"]

    def _find_checkpoint(self, resume: bool | Literal["auto"], overwrite: bool) -> dict[str, Any] | None:
        """The state to go on from, if any; its folder becomes `resumed_from`."""
        self.resumed_from: Path | None = None
        found = checkpoint.checkpoints(self._folder.checkpoints)
        if found and not resume and not overwrite:
            raise InputError(f"{self.out} holds checkpoints; add --resume to go on or --overwrite to start again")
        self._folder.clear_leftovers()
        if resume and found:
            self.resumed_from = found[-1]
            return checkpoint.load_state(self.resumed_from)
        for folder in self._earlier_run():
            checkpoint.refuse_foreign_files(folder)
        return None

    def _require_checkpoint(self) -> None:
        if not checkpoint.checkpoints(self._folder.checkpoints):
            raise InputError(f"there is no checkpoint in {self.out} to go on from; --auto-resume starts where none is")

    def _earlier_run(self) -> list[Path]:
        """The folders that a new run replaces."""
        # Token files without a checkpoint may be of another text, and are cheap to make again.
        tokens = [self._folder.tokens] if self._folder.tokens.exists() else []
        return [*checkpoint.checkpoints(self._folder.checkpoints), *tokens]

    def _replace_earlier_run(self) -> None:
        """Delete what there is of an earlier run, now that the new one can begin."""
        for folder in self._earlier_run():
            checkpoint.remove_folder(folder)
        checkpoint.rename(self._folder.fresh_tokens, self._folder.tokens)
