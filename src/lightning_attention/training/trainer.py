"""The training run, from the first step or from a checkpoint, to the last step or to a signal."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from lightning_attention.models.transnormer.pretrained import load_model, save_model
from lightning_attention.training import checkpoint
from lightning_attention.training.config import TrainConfig, resumed_config
from lightning_attention.training.data import TokenData, Windows, open_data, prepare_data, validation_batches
from lightning_attention.training.disk import writing
from lightning_attention.training.interrupt import StopRequest
from lightning_attention.training.learner import Learner
from lightning_attention.training.metrics import Record, read_metrics
from lightning_attention.training.model import new_model
from lightning_attention.training.plot import plot_loss
from lightning_attention.training.progress import Outcome, Progress
from lightning_attention.training.run_folder import RunFolder
from lightning_attention.training.runtime import Runtime
from lightning_attention.training.schedule import Schedule, learning_rate
from lightning_attention.training.shards import TokenShards
from lightning_attention.training.tokenizer import as_pretrained


class Trainer:
    """One training run in the folder `config.out`.

    `folder` owns the run's files, `data` its text, `learner` the model and the optimizer, `schedule` the number of
    steps, `record` what has been measured. The trainer says what comes next.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        resume: bool | Literal["auto"] = False,
        overwrite: bool = False,
        report: Callable[[str], None] | None = None,
    ) -> None:
        """Set a run up from the start or, with `resume`, from its newest whole checkpoint.

        The output folder is held until `fit` ends: no other process can train in it.

        Args:
            config: the settings. Where the run is resumed those that were not given are what the checkpoint says.
            resume: go on from the newest whole checkpoint in the output folder; "auto" starts where there is none.
            overwrite: delete an earlier run's files in the output folder, once the new run's text and model are there.
            report: called with every line of what was read and what was left out.

        Raises:
            InputError: a setting, the text, the output folder or a checkpoint cannot be used.
            DiskError: there is no room for the text.
        """
        self.folder = RunFolder(Path(config.out))
        if resume is True:  # before a folder is made
            self.folder.require_checkpoint()
        self.folder.claim()
        try:
            self.resumed_from = self.folder.find_start(bool(resume), overwrite)
            if self.resumed_from:
                self._go_on(config, self.resumed_from)
            else:
                self._begin(config, report)
        except BaseException:
            self.folder.release()
            raise

    def _begin(self, config: TrainConfig, report: Callable[[str], None] | None) -> None:
        runtime = Runtime.choose(config.device, config.precision)
        data = prepare_data(config, self.folder.fresh_tokens, report)
        if isinstance(data.train, TokenShards):
            config = replace(config, vocab_size=data.vocab_size)
        torch.manual_seed(config.seed)
        learner = Learner(config, runtime, new_model(config, data.vocab_size, data.end_id, data.pad_id))
        self.folder.replace_earlier_run()  # the new run's text and model are there, so the one before may go
        self._assemble(config, open_data(config, self.folder.tokens), learner)

    def _go_on(self, asked: TrainConfig, folder: Path) -> None:
        state = checkpoint.load_state(folder)
        config = resumed_config(state["config"], asked)
        runtime = Runtime.choose(config.device, config.precision)
        data = open_data(config, self.folder.tokens, state["data_fingerprint"])
        torch.manual_seed(config.seed)  # for a GPU that the run did not have before; the rest is restored below
        self._assemble(config, data, Learner(config, runtime, load_model(folder)))
        self.step = state["step"]
        self.record.restore(state["record"])
        self.learner.restore(state["learner"])
        if config.max_minutes:
            self.schedule.planned_steps = state["planned_steps"]

    def _assemble(self, config: TrainConfig, data: TokenData, learner: Learner) -> None:
        self.config, self.data, self.learner, self.model = config, data, learner, learner.model
        self._tokenizer = as_pretrained(data.tokenizer, data.end_id, data.pad_id)
        self._windows = Windows(data.train, config.seq_len, config.windows_per_step, config.seed)
        self.schedule = Schedule(config, self._windows.per_epoch)
        self.record = Record(config, self.schedule)
        self.step = 0

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
            DivergedError: a loss, the gradient or a weight became infinite or NaN; it is in no checkpoint.
            DiskError: something could not be written; the newest checkpoint is whole.
            StoppedAtOnce: a second signal came before the run had been saved.
        """
        try:
            return self._fit(report, acknowledge)
        except Exception:
            with suppress(Exception):  # the error that ended the run is the one to tell
                self._plot()
            raise
        finally:
            self.folder.release()

    def _fit(
        self, report: Callable[[Progress], None] | None, acknowledge: Callable[[str, bool], None] | None
    ) -> Outcome:
        config, schedule, record = self.config, self.schedule, self.record
        with (
            closing(record.open(self.folder.metrics, self.step if self.resumed_from else None)),
            StopRequest(acknowledge) as stop,
        ):
            checkpoint.atomic_text(self.folder.settings, config.as_toml())
            if record.held_out is None:  # before the first step
                self._validate()
            while not schedule.is_complete(self.step) and not stop.signal_name:
                self._train_step()
                schedule.fit_to_budget(self.step, record.spent(), record.eval_seconds)
                if schedule.is_due(config.eval_every, self.step):
                    self._validate()
                if schedule.is_due(config.save_every, self.step):
                    self._save()
                if report:
                    logged = schedule.is_due(config.log_every, self.step)
                    shown = (record.bits_per_byte, record.tokens_per_second, record.held_out)
                    report(Progress(self.step, self.planned_steps, logged, *shown))
            self._save()
            self._plot()
        return Outcome(
            step=self.step,
            planned_steps=self.planned_steps,
            held_out=record.held_out,
            stopped_by=None if schedule.is_complete(self.step) else stop.signal_name,
            checkpoint=self.folder.checkpoint(self.step),
            plot=self.folder.plot,
            metrics=self.folder.metrics,
        )

    @property
    def planned_steps(self) -> int | None:
        """How many steps the run has in all; None while a time budget is still being measured."""
        return self.schedule.planned_steps

    def _train_step(self) -> None:
        """One update of the weights, and a line in the record when it is time for one."""
        began = time.perf_counter()
        windows = self._windows.step(self.step)
        rate = learning_rate(self.config, self.step, self.planned_steps)
        loss, norm = self.learner.step(windows, rate)
        self.step += 1
        self.record.mean_loss.add(loss, windows.numel(), self.data.count_bytes(windows))
        logged = self.schedule.is_due(self.config.log_every, self.step)
        if logged or self.planned_steps is None:
            self.learner.check_step(self.step)  # waits for the device, so that the clock below has seen all of the work
        self.schedule.step_seconds.append(time.perf_counter() - began)
        if logged:
            self.record.log_training(self.step, lr=rate, grad_norm=float(norm))

    def _validate(self) -> None:
        """Measure the loss on the held-out text."""
        began = time.perf_counter()
        config = self.config
        data = self.data
        batches = validation_batches(data.val, config.seq_len, config.batch_size, config.eval_tokens, data.end_id)
        loss = self.learner.evaluate(batches, data.count_bytes)
        self.learner.require_finite("held-out loss", loss[0], self.step)
        self.record.log_validation(self.step, loss, time.perf_counter() - began)

    def _plot(self) -> None:
        with writing(self.folder.plot):
            plot_loss(read_metrics(self.folder.metrics), self.folder.plot)

    def _save(self) -> None:
        """Write a checkpoint of this step, unless there is one, and drop the oldest."""
        target = self.folder.checkpoint(self.step)
        if not target.exists():
            self.learner.check_step(self.step)
            self.learner.check_weights(self.step)
            state = checkpoint.State(
                step=self.step,
                planned_steps=self.planned_steps,
                config=self.config.as_dict(),
                data_fingerprint=self.data.fingerprint,
                record=self.record.state(),
                learner=self.learner.state(),
            )
            with checkpoint.atomic_folder(target) as folder:
                save_model(self.model, folder)
                self._tokenizer.save_pretrained(folder)
                checkpoint.save_state(folder, state)
        checkpoint.prune(self.folder.checkpoints, self.config.keep)
