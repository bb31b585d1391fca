"""``python -m benchmarks.quality``: how well TransNormerLLM and a Llama of as many weights learn the same text.

    python -m benchmarks.corpus packages --out corpus.jsonl.gz --held-out long.jsonl.gz
    lightning-attention tokenize corpus.jsonl.gz --vocab-size 16384 --out tokens
    python -m benchmarks.quality tokens long.jsonl.gz --model transnormer --out runs/quality
    python -m benchmarks.quality tokens long.jsonl.gz --model llama --out runs/quality
    python -m benchmarks.quality --render runs/quality/*.json

Both learn with the trainer's defaults, but for the learning rate, which is chosen for each by short runs, and a warm-up
over a tenth of the steps. Documents of a window see those before them (``joined``), so that both have their fastest
attention. Then each learns for ``--steps`` steps, and long documents that neither has seen are read in windows four
times as long as those of training; what comes before a token is then all that its window has.
"""

from __future__ import annotations

import signal
import sys
import tempfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_attention.bench.case import Shown, show
from lightning_attention.bench.render import Figure, Line, Panel, Table, caption
from lightning_attention.bench.report import Report, environment, slug
from lightning_attention.errors import InputError
from lightning_attention.models.presets import MODELS
from lightning_attention.training.config import TrainConfig, make_config
from lightning_attention.training.corpus import SpooledCorpus, spool
from lightning_attention.training.metrics import read_metrics
from lightning_attention.training.progress import Progress
from lightning_attention.training.sources import Tally
from lightning_attention.training.trainer import Trainer

RATES = (1e-3, 2e-3, 4e-3)  # tried first; where the best is at an end, half or double of it too
MOST_RATES = 5
NAMES = {"transnormer": "TransNormerLLM", "llama": "Llama (softmax)"}


def measure(asked: Namespace) -> Report:
    """Choose a learning rate, train with it, evaluate; all of it as records in one file."""
    from lightning_attention.training.evaluation import evaluate
    from lightning_attention.training.runtime import Runtime
    from lightning_attention.training.trained import open_trained

    runtime = Runtime.choose("auto", "auto")
    path = asked.out / f"quality-{asked.model}-{slug(runtime.device)}.json"
    if path.exists() and not asked.overwrite:
        raise InputError(f"{path} is there already; --overwrite replaces it and the runs beside it")
    text = make_config({"inputs": [str(asked.held_out)]})
    with tempfile.TemporaryFile() as file:  # what cannot be read at the end is told before all of the training
        spool(text, SpooledCorpus(file), Tally())
    few = max(1, asked.steps // 8)
    # Before an earlier record is replaced: what cannot be trained is refused here.
    first = trainer(asked, RATES[0], few, f"{asked.model}-{RATES[0]:g}")
    report = Report(path, environment(runtime.device, command=["python", "-m", "benchmarks.quality", *sys.argv[1:]]))
    losses: dict[float, float] = {}
    while (rate := next_rate(losses)) is not None:
        name = f"{asked.model}-{rate:g}"
        short = train(trainer(asked, rate, few, name) if losses else first, name)
        losses[rate] = [line["val_loss"] for line in short if "val_loss" in line][-1]
        report.add("rates", model=asked.model, lr=rate, steps=short[-1]["step"], held_out=losses[rate])
        print(f"{asked.model}: learning rate {rate:g}, held-out loss {losses[rate]:.4f}", flush=True)
    best = min(losses, key=losses.__getitem__)
    for line in train(trainer(asked, best, asked.steps, asked.model), asked.model):
        fields = {"loss": "loss", "val_loss": "held_out", "tokens_per_second": "tokens_per_second"}
        known = {name: line[key] for key, name in fields.items() if key in line}
        report.add("curve", model=asked.model, step=line["step"], tokens=line["tokens"], **known)
    trained = open_trained(asked.out / asked.model)
    weights = sum(p.numel() for p in trained.model.parameters())
    found = evaluate(trained, text, runtime, seq_len=4 * asked.seq_len)
    report.add(
        "long documents", model=asked.model, lr=best, weights=weights, seq_len=asked.seq_len, tokens=found.tokens,
        loss=found.loss, bits_per_byte=found.bits_per_byte,
    )  # fmt: skip
    for bucket in found.by_position:
        where = {"first": bucket.first, "last": bucket.last}
        report.add("position", model=asked.model, **where, tokens=bucket.tokens, loss=bucket.loss)
    return report


def next_rate(losses: dict[float, float]) -> float | None:
    """The learning rate to try after those whose losses are known; None when the best has others on both sides."""
    for rate in RATES:
        if rate not in losses:
            return rate
    best = min(losses, key=losses.__getitem__)
    if len(losses) < MOST_RATES and best in (min(losses), max(losses)):
        return best / 2 if best == min(losses) else best * 2
    return None


def trainer(asked: Namespace, rate: float, steps: int, name: str) -> Trainer:
    """One run, ready to begin."""
    out = asked.out / name
    config: TrainConfig = make_config(
        {
            "inputs": [str(asked.tokens)], "model": asked.model, "size": asked.size, "out": str(out), "lr": rate,
            "steps": steps, "seq_len": asked.seq_len, "batch_size": asked.batch_size, "documents": "joined",
            "compile": asked.compile, "warmup_steps": max(1, steps // 10), "log_every": 10,
            "eval_every": max(1, asked.steps // 10), "eval_tokens": asked.eval_tokens, "save_every": 0, "keep": 1,
        }
    )  # fmt: skip

    return Trainer(config, overwrite=asked.overwrite and out.exists())


def train(run: Trainer, name: str) -> list[dict[str, Any]]:
    """One run; the lines of its metrics.jsonl. Raises Stopped where a signal ended it before its last step."""

    def say(progress: Progress) -> None:
        if progress.logged and progress.step % 100 == 0 and progress.bits_per_byte is not None:
            speed = progress.tokens_per_second or 0
            print(f"{name}: step {progress.step}, {progress.bits_per_byte:.4f} bits per byte, {speed:,.0f} tokens/s",
                  flush=True)  # fmt: skip

    outcome = run.fit(say)
    if outcome.stopped_by:
        raise Stopped(outcome.stopped_by)
    return read_metrics(outcome.metrics)


class Stopped(Exception):
    """A signal, by its name, ended a run."""


def shown(report: Report) -> Iterator[Shown]:
    """A table of what was chosen and reached, one by position, and both curves.

    Raises InputError where the records are not one of each of some models, read in windows of the same length.
    """
    final = report.find("long documents")
    models = [r["model"] for r in final]
    begun = {r["model"] for r in report.find("rates")}
    if not final or set(models) != begun or len(set(models)) < len(models):
        known, whole = (", ".join(names) or "none" for names in (sorted(begun), models))
        raise InputError(f"models: {known}; of a whole run: {whole}; wanted is a file of each, of runs that ended")
    if len({r["seq_len"] for r in final}) > 1:
        raise InputError(f"the models were trained at {', '.join(str(r['seq_len']) for r in final)} tokens")
    curves = {model: report.find("curve", model=model) for model in models}
    rows = []
    for r in final:
        tried = "  ".join(f"{x['lr']:g}: {x['held_out']:.3f}" for x in report.find("rates", model=r["model"]))
        held_out = [x for x in curves[r["model"]] if "held_out" in x][-1]
        rows.append([
            NAMES[r["model"]], f"{r['weights'] / 1e6:.1f} M", f"{held_out['tokens'] / 1e6:.3g} M", f"{r['lr']:g}",
            f"{held_out['held_out']:.4f}", f"{r['loss']:.4f}", f"{r['bits_per_byte']:.4f}", tried,
        ])  # fmt: skip
    columns = ["model", "weights", "tokens learned", "learning rate", "held out", "long documents", "bits per byte",
               "tried"]  # fmt: skip
    yield Table("Held-out loss (nats per token)", columns, rows)
    positions = {model: report.find("position", model=model) for model in models}
    span = [f"{r['first']:,} to {r['last']:,}" for r in positions[models[0]]]
    losses = zip(*([f"{r['loss']:.4f}" for r in found] for found in positions.values()), strict=True)
    rows = [[name, *row] for name, row in zip(span, losses, strict=True)]
    yield Table("Long documents: loss by tokens before", ["tokens before", *(NAMES[m] for m in models)], rows)
    yield Figure(
        "The same text, the same number of weights",
        (
            Panel(
                "Training",
                "million tokens learned",
                "nats per token",
                list(_curves(curves)),
                limits=_around(y for line in _curves(curves) for _, y in line.points),
            ),
            Panel(
                f"Long documents, by position; trained at {final[0]['seq_len']:,}",
                "tokens before the one predicted",
                "nats per token of long documents",
                [
                    Line(model, NAMES[model], [(r["last"] + 1, r["loss"]) for r in found], model == "transnormer")
                    for model, found in positions.items()
                ],
                limits=_around(r["loss"] for found in positions.values() for r in found),
            ),
        ),
        caption(report.environment, "bf16, AdamW, a learning rate chosen for each"),
        "left: held-out loss; dotted, the mean training loss since the point before",
    )


def _curves(curves: dict[str, list[dict[str, Any]]]) -> Iterator[Line]:
    """Both losses at every validation; that of training is the mean since the one before."""
    for model, lines in curves.items():
        own, held_out, since = [], [], []
        for r in lines:
            since += [r["loss"]] if "loss" in r else []
            if "held_out" in r and since:
                held_out.append((float(f"{r['tokens'] / 1e6:.3g}"), r["held_out"]))
                own.append((held_out[-1][0], sum(since) / len(since)))
                since = []
        late = held_out[-1][0] / 3  # before, the loss falls by so much that one curve would cover the other
        ours = model == "transnormer"
        yield Line(model, "", [point for point in own if point[0] >= late], ours, ":")
        yield Line(model, NAMES[model], [point for point in held_out if point[0] >= late], ours)


def _around(values: Iterator[float]) -> tuple[float, float]:
    found = sorted(values)
    margin = 0.15 * (found[-1] - found[0])
    return found[0] - margin, found[-1] + margin


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = ArgumentParser(
        "python -m benchmarks.quality", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("tokens", nargs="?", type=Path, metavar="TOKENS", help="a folder of tokens to learn")
    parser.add_argument("held_out", nargs="?", type=Path, metavar="LONG", help="long documents that are in none of it")
    parser.add_argument("--model", choices=MODELS, default="transnormer")
    parser.add_argument("--size", default="75M", help="a named size (%(default)s)")
    parser.add_argument("--steps", type=int, default=800, help="of the long run (%(default)s)")
    parser.add_argument("--seq-len", type=int, default=4096, help="of the windows of training (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="windows of a step (%(default)s)")
    parser.add_argument("--eval-tokens", type=int, default=1 << 20, help="of a validation (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="run blocks through torch.compile")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="folder for runs and records")
    parser.add_argument("--render", nargs="+", type=Path, metavar="FILE", help="show records instead, of both models")
    parser.add_argument("--overwrite", action="store_true", help="replace the record and the runs in --out")
    asked = parser.parse_args(arguments)
    if not asked.render and asked.held_out is None:
        parser.error("TOKENS and LONG are wanted, or --render")
    try:
        if asked.render:
            reports = [Report.read(path) for path in asked.render]
            if len(devices := {report.environment["device"] for report in reports}) > 1:
                raise InputError(
                    f"the models were trained on {' and '.join(sorted(devices))}; compare those of one device"
                )
            reports[0].records = [record for report in reports for record in report.records]
            found = list(shown(reports[0]))
            asked.out.mkdir(parents=True, exist_ok=True)
            show(found, asked.out / "quality.png")
        else:
            print(f"results  {measure(asked).path}")
    except InputError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Stopped as stopped:
        print(f"stopped by {stopped}; no record was made of what had not ended", file=sys.stderr)
        return 128 + signal.Signals[str(stopped)]
    return 0


if __name__ == "__main__":
    sys.exit(main())
