"""The training run, from the first step or from a checkpoint, to the last step or to a signal."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

import torch
from transformers import PreTrainedModel

from lightning_attention.distributed.mesh import Mesh
from lightning_attention.errors import DivergedError, InputError
from lightning_attention.models.presets import classes
from lightning_attention.training import checkpoint
from lightning_attention.training.config import OF_THE_LAUNCH, TrainConfig, resumed_config
from lightning_attention.training.data import TokenData, Windows, open_data, prepare_data, validation_batches
from lightning_attention.training.disk import writing
from lightning_attention.training.flops import GpuMeter
from lightning_attention.training.interrupt import NAMES, StopRequest
from lightning_attention.training.learner import Learner
from lightning_attention.training.metrics import Record, read_metrics
from lightning_attention.training.model import new_model
from lightning_attention.training.plot import plot_loss
from lightning_attention.training.progress import Outcome, Progress
from lightning_attention.training.run_folder import RunFolder
from lightning_attention.training.runtime import Runtime
from lightning_attention.training.samples import Samples
from lightning_attention.training.saving import Saver
from lightning_attention.training.schedule import Schedule, learning_rate
from lightning_attention.training.shards import TokenShards
from lightning_attention.training.team import Team
from lightning_attention.training.tokenizer import as_pretrained
from lightning_attention.training.tracking import require_tracker
from lightning_attention.training.weights import WeightFiles, WeightsToWrite

T = TypeVar("T")


class Trainer:
    """One training run in the folder `config.out`, in this process or in all that a launcher such as torchrun started.

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
            config: the settings. A resumed run takes those that were not given from the checkpoint.
            resume: go on from the newest whole checkpoint in the output folder; "auto": or a new run if there is none.
            overwrite: delete an earlier run's files in the output folder, once the new run's text and model are there.
            report: called with every line of what was read and what was left out, on the first rank.

        Raises:
            InputError: a setting, the text, the output folder or a checkpoint cannot be used, on whichever rank.
            DiskError: there is no room for the text.
        """
        self.team = Team.join(config.device)
        self.folder = RunFolder(Path(config.out))
        try:
            self.team.first(lambda: require_tracker(config.tracker))
            self.resumed_from = self.team.first(lambda: self._claim(resume, overwrite))
            if self.resumed_from:
                self._go_on(config, self.resumed_from)
            else:
                self._begin(config, report)
        except BaseException:
            self.folder.release()
            raise

    def _claim(self, resume: bool | Literal["auto"], overwrite: bool) -> Path | None:
        if resume is True:  # before a folder is made
            self.folder.require_checkpoint()
        self.folder.claim()
        return self.folder.find_start(bool(resume), overwrite)

    def _begin(self, config: TrainConfig, report: Callable[[str], None] | None) -> None:
        runtime, mesh = self._place(config)
        self.team.first(lambda: _nothing(prepare_data(config, self.folder.fresh_tokens, report)))
        data = self._open_data(config, self.folder.fresh_tokens)
        if isinstance(data.train, TokenShards):
            config = replace(config, vocab_size=data.vocab_size)
        learner = Learner(config, runtime, self._new_model(config, data), mesh)
        # The new run's text and model are there, so the one before may go.
        self.team.first(self.folder.replace_earlier_run)
        self._assemble(config, self._open_data(config, self.folder.tokens), learner)

    def _go_on(self, asked: TrainConfig, folder: Path) -> None:
        state = self._on_each(lambda: checkpoint.load_state(folder))
        config = self._on_each(lambda: resumed_config(state["config"], asked))
        runtime, mesh = self._place(config)
        # The first looks whether the tokens are the same; that takes a while.
        self.team.first(lambda: _nothing(open_data(config, self.folder.tokens, state["data_fingerprint"])))
        data = self._open_data(config, self.folder.tokens)
        weights = self._on_each(lambda: WeightFiles(folder))
        self._assemble(config, data, Learner(config, runtime, self._new_model(config, data), mesh, weights))
        self._saver.load_optimizer(folder, self.learner.optimizer_state())
        self.step = self._saved = state["step"]
        self.record.restore(state["record"])
        self.learner.restore(state["learner"])
        if config.max_minutes:
            self.schedule.planned_steps = state["planned_steps"]

    def _place(self, config: TrainConfig) -> tuple[Runtime, Mesh]:
        """The device of this process and its place among the others."""
        team = self.team
        local_rank = int(os.environ.get("LOCAL_RANK", team.rank)) if team.is_launched else None
        runtime = self._on_each(lambda: Runtime.choose(config.device, config.precision, local_rank))
        sizes = {name: getattr(config, name) for name in OF_THE_LAUNCH}
        kind = classes(config.model)[1]
        if config.sp > 1 and "group" not in inspect.signature(kind.forward).parameters:
            raise team.same(InputError(f"sp is {config.sp}; it must be 1: {kind.__name__} reads whole windows"))
        try:
            mesh = Mesh.fit(team.size, **sizes)
        except ValueError as error:
            raise team.same(InputError(str(error))) from error
        if config.windows_per_step % mesh.dp_size:
            raise team.same(
                InputError(
                    f"a step reads batch_size x accumulate = {config.windows_per_step} windows; it must be a multiple "
                    f"of the {mesh.dp_size} data-parallel processes (dp_replicate x dp_shard)"
                )
            )
        return runtime, mesh.connect(runtime.device.type) if team.is_launched else mesh

    def _new_model(self, config: TrainConfig, data: TokenData) -> PreTrainedModel:
        with torch.device("meta"):
            return new_model(config, data.vocab_size, data.end_id, data.pad_id)

    def _open_data(self, config: TrainConfig, folder: Path) -> TokenData:
        return self._on_each(lambda: open_data(config, folder))

    def _on_each(self, action: Callable[[], T]) -> T:
        """What `action` returns here, once it has succeeded everywhere."""
        results: list[T] = []
        self.team.each(lambda: results.append(action()))
        return results[0]

    def _assemble(self, config: TrainConfig, data: TokenData, learner: Learner) -> None:
        self.config, self.data, self.learner, self.model = config, data, learner, learner.model
        self._tokenizer = as_pretrained(data.tokenizer, data.end_id, data.pad_id)
        self._windows = Windows(data.train, config.seq_len, config.windows_per_step, config.seed)
        self.schedule = Schedule(config, self._windows.per_epoch)
        self.meter = GpuMeter.of(learner.runtime, self.model, config.seq_len)
        self.record = Record(config, self.schedule, self.meter)
        self.samples = Samples(config, self.schedule, self._tokenizer)
        self._saver = Saver(self.team)
        self.step = 0
        self._saved = -1  # the step of the latest checkpoint

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
                self._saver.wait()  # for a checkpoint of an earlier step, which is good
            with suppress(Exception):
                self._plot()
            raise
        finally:
            self.folder.release()

    def _fit(
        self, report: Callable[[Progress], None] | None, acknowledge: Callable[[str, bool], None] | None
    ) -> Outcome:
        config, schedule, record = self.config, self.schedule, self.record
        start = self.step if self.resumed_from else None
        metrics, samples = (self.folder.metrics, self.folder.samples) if self.team.is_first else (None, None)
        with (
            closing(self._on_each(lambda: record.open(metrics, start))),
            closing(self._on_each(lambda: self.samples.open(samples, start))),
            StopRequest(acknowledge) as stop,
        ):
            self.team.first(lambda: checkpoint.atomic_text(self.folder.settings, config.as_toml()))
            if record.held_out is None:  # before the first step
                self._validate()
            stopped_by = None
            while not schedule.is_complete(self.step):
                stopped_by = self._train_step(stop)
                if stopped_by:
                    break
                if config.max_minutes:
                    schedule.fit_to_budget(self.step, record.spent(), record.eval_seconds)
                    schedule.planned_steps = self.team.first(lambda: schedule.planned_steps)
                if schedule.is_due(config.eval_every, self.step):
                    self._validate()
                sample = self._sample() if self.samples.due(self.step) else None
                if schedule.is_due(config.save_every, self.step):
                    self._save()
                if report:
                    logged = schedule.is_due(config.log_every, self.step)
                    shown = (record.bits_per_byte, record.tokens_per_second, record.held_out, record.gpu, sample)
                    report(Progress(self.step, self.planned_steps, logged, *shown))
            self._save()
            self._saver.wait()
            self.team.first(self._plot)
        return Outcome(
            step=self.step,
            planned_steps=self.planned_steps,
            held_out=record.held_out,
            stopped_by=stopped_by,
            checkpoint=self.folder.checkpoint(self.step),
            plot=self.folder.plot,
            metrics=self.folder.metrics,
        )

    @property
    def planned_steps(self) -> int | None:
        """How many steps the run has in all; None while a time budget is still being measured."""
        return self.schedule.planned_steps

    def _train_step(self, stop: StopRequest) -> str | None:
        """One update of the weights, and a line in the record when it is time for one.

        No update if a process was asked to stop: returns the name of the signal.
        """
        began = time.perf_counter()
        mesh = self.learner.mesh
        windows = self._windows.step(self.step, rank=mesh.dp_rank, ranks=mesh.dp_size)
        # All that the processes have to know of each other before a step, at once.
        counts = (self.learner.predicted(windows), self.data.count_bytes(windows)) if mesh.sp_rank == 0 else (0, 0)
        signals = [name == stop.signal_name for name in NAMES]
        predicted, text_bytes, failed, *heard = self.team.sum(*counts, self._saver.failed, *signals)
        if failed:
            self._saver.wait()
        if any(heard):
            return next(name for name, count in zip(NAMES, heard, strict=True) if count)
        rate = learning_rate(self.config, self.step, self.planned_steps)
        loss, norm = self.learner.step(windows, rate, predicted)
        self.step += 1
        self.record.mean_loss.add(loss, self.config.tokens_per_step, text_bytes)
        logged = self.schedule.is_due(self.config.log_every, self.step)
        if logged or self.planned_steps is None:
            # Waits for the device, so that the clock below has seen all of the work.
            self._require_same(lambda: self.learner.check_step(self.step))
        self.schedule.step_seconds.append(time.perf_counter() - began)
        if logged:
            self.team.each(lambda: self.record.log_training(self.step, lr=rate, grad_norm=float(norm)))
        return None

    def _validate(self) -> None:
        """Measure the loss on the held-out text."""
        began = time.perf_counter()
        config = self.config
        data = self.data
        rows = config.batch_size * self.learner.mesh.dp_size
        batches = validation_batches(data.val, config.seq_len, rows, config.eval_tokens, data.end_id)
        loss = self.learner.evaluate(batches, data.count_bytes)
        self._require_same(lambda: self.learner.require_finite("held-out loss", loss[0], self.step))
        seconds = time.perf_counter() - began
        self.team.each(lambda: self.record.log_validation(self.step, loss, seconds))

    def _require_same(self, check: Callable[[], None]) -> None:
        """A check of numbers that are the same on every rank."""
        try:
            check()
        except DivergedError as error:
            raise self.team.same(error) from None

    def _sample(self) -> str:
        """Write how the model continues the prompt, and return both."""
        text = self.samples.take(self.learner)
        return self._on_each(lambda: self.samples.write(self.step, text))

    def _plot(self) -> None:
        if self.team.is_first:
            with writing(self.folder.plot):
                plot_loss(read_metrics(self.folder.metrics), self.folder.plot)

    def _save(self) -> None:
        """Start to write a checkpoint of this step, unless there is one, and drop the oldest when it is whole."""
        if self._saved == self.step:  # and a process that was killed may have left what it should have dropped
            self.team.first(self._prune)
            return
        self.learner.reshard()
        self._require_same(lambda: self.learner.check_step(self.step))
        for largest in self.team.gather(self.learner.largest_weight()):
            self._require_same(lambda: self.learner.require_finite("largest weight", largest, self.step))  # noqa: B023
        state = checkpoint.State(
            step=self.step,
            planned_steps=self.planned_steps,
            config=self.config.as_dict(),
            data_fingerprint=self.data.fingerprint,
            record=self.record.state(),
            learner=self.learner.state(),
        )

        def write_rest(folder: Path) -> None:
            self._tokenizer.save_pretrained(folder)
            checkpoint.save_state(folder, state)

        self._saver.save(
            self.folder.checkpoint(self.step),
            WeightsToWrite(self.model, self.team.rank, self.team.size),
            self.learner.optimizer_state(),
            write_rest,
            self._prune,
        )
        self._saved = self.step

    def _prune(self) -> None:
        checkpoint.prune(self.folder.checkpoints, self.config.keep)


def _nothing(_: object) -> None:
    """The result of an action whose value stays on its rank."""
