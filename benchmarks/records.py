"""``python -m benchmarks.records``: make the records of ``benchmarks/results`` anew, a step at a time.

    python -m benchmarks.records                          # lists the steps, with commands and times
    python -m benchmarks.records shapes serve --out runs/records
    python -m benchmarks.records shapes serve --replace   # copies what is in --out over the repository's own

A step is one command on an idle H200, or on two of one host, and ends within nine minutes. What it writes stays in
``--out/parts/STEP``, and is joined there with the other steps of the same record. Peers have to be installed
(docs/benchmarks.md); one that is not is an error in the record. Quality wants ``tokens`` and ``long.jsonl.gz`` in this
folder, as the docstring of ``benchmarks.quality`` makes them.
"""

import json
import shlex
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import dataclass
from pathlib import Path

from lightning_attention.bench.report import Report
from lightning_attention.errors import InputError

RESULTS = Path(__file__).parent / "results"
FINISHED = "finished"  # a file beside a step's record, which is written again after each measurement


@dataclass(frozen=True)
class Step:
    """The command that makes a record, or a part of it; about how many seconds it takes, and on how many GPUs."""

    record: str
    arguments: str
    seconds: int
    gpus: int = 1
    module: str = "benchmarks"

    @property
    def command(self) -> str:
        """As one would type it."""
        start = f"torchrun --nproc-per-node {self.gpus}" if self.gpus > 1 else "python"
        return f"{start} -m {self.module} {self.arguments}"

    def words(self) -> list[str]:
        """The command's words, run by this Python."""
        ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.gpus)]
        return [sys.executable, *(ranks if self.gpus > 1 else []), "-m", self.module, *shlex.split(self.arguments)]


_PAPERS = "--peers fla,lightning_attn,sdpa"
_385M = "'385M .* (1024|4096|8192|16384|32768|65536)$|385M transnormer (94208|1048576)'"
_1B = "'1B .* (1024|8192|32768)$|1B transnormer 94208'"
_3B = "'3B .* (1024|8192|16384)$'"
_TEXT = "tokens long.jsonl.gz"
_PAIRS = "'1B dp 4|385M sp 1 x (524288|1245184)'"

#: What the environment of every record has.
_MEASURED_ON = {"date", "commit", "device", "device_type"}

#: By name. Times of training, quality, scaling, cases and lrpe are guesses; the others are measured.
STEPS = {
    "shapes": Step("h200-shapes", f"shapes {_PAPERS},linghe", 355),
    "lengths": Step("h200-lengths", f"lengths {_PAPERS}", 170),
    "packed-constancy": Step("h200-packed-constancy", "packed constancy", 40),
    "cases": Step("h200-cases", "cases", 300),
    "host": Step("h200-host", "host", 35),
    "lrpe": Step("h200-lrpe", "lrpe", 90),
    "minimax": Step("h200-minimax", "minimax", 45),
    "products": Step("h200-products", "products", 60),
    "serving": Step("h200-serving", "serving --peers seg_la,fla,vllm,cula", 80),
    "serving-rings": Step("h200-serving-rings", "serving --peers seg_la,vllm_layer,engines", 75),
    "serve": Step("h200-serve", "serve", 170),
    "training-385M": Step("h200-training", f"training --only {_385M}", 420),
    "training-1B": Step("h200-training", f"training --only {_1B}", 300),
    "training-3B": Step("h200-training", f"training --only {_3B}", 300),
    "quality-transnormer": Step(
        "h200-quality-transnormer", f"{_TEXT} --model transnormer --compile", 420, module="benchmarks.quality"
    ),
    "quality-llama": Step("h200-quality-llama", f"{_TEXT} --model llama --compile", 480, module="benchmarks.quality"),
    "scaling": Step("h200-scaling", f"scaling --only {_PAIRS}", 300, gpus=2),
    "sequence-parallel": Step("h200-sequence-parallel", "sequence_parallel", 90, gpus=2),
    "numerics": Step("h200-numerics", "numerics --peers fla,lightning_attn,linghe", 165),
}


def listed() -> str:
    """A line of each step, and below it its command."""
    lines = [f"  {name:<20} {step.record}.json, about {step.seconds} s on {step.gpus} GPU{'s' * (step.gpus > 1)}\n"
             f"    {step.command}" for name, step in STEPS.items()]  # fmt: skip
    return "\n".join(lines)


def make(name: str, out: Path) -> int:
    """Run a step and join its record; the exit status of the command."""
    step, parts = STEPS[name], out / "parts" / name
    print(f"\n{name}: {step.command}", flush=True)
    (parts / FINISHED).unlink(missing_ok=True)
    status = subprocess.run([*step.words(), "--out", str(parts)], check=False).returncode
    if status:
        print(f"failed   {name}, with exit status {status}", flush=True)
    else:
        (parts / FINISHED).touch()
    try:
        print(f"record   {join(step.record, out)}", flush=True)
    except InputError as error:  # the steps after this one are run all the same
        print(f"no record: {error}", flush=True)
        return status or 1
    return status


def replace(record: str, out: Path) -> Path:
    """Copy a record over the repository's own; the file.

    Raises InputError where a step of it was not run, or it was not measured on what its name says.
    """
    path = join(record, out)
    steps = [name for name, step in STEPS.items() if step.record == record]
    if missing := [name for name in steps if not (out / "parts" / name / FINISHED).exists()]:
        raise InputError(f"{record} is not whole: in {out} {', '.join(missing)} did not end, or failed")
    environment = Report.read(path).environment
    measured = f"{environment['device_type']} {environment['device']}"
    if record.partition("-")[0] not in measured.lower():
        raise InputError(f"{record} was measured on {measured}; it may not replace the repository's own")
    there = RESULTS / path.name
    there.write_bytes(path.read_bytes())
    return there


def join(record: str, out: Path) -> Path:
    """One file of what the steps of a record have written: records as they are, the environment of the first.

    Raises InputError where there is nothing, or it does not say on what it was measured, or on different devices.
    """
    found = [(step, Report.read(path)) for name, step in STEPS.items() if step.record == record
             for path in sorted((out / "parts" / name).glob("*.json"))]  # fmt: skip
    if not found:
        raise InputError(f"{out} has nothing of {record}")
    for _, report in found:
        if missing := _MEASURED_ON - report.environment.keys():
            raise InputError(f"{report.path} does not say in its environment: {', '.join(sorted(missing))}")
    environments = [report.environment | {"command": step.command} for step, report in found]
    if len(devices := {e["device"] for e in environments}) > 1:
        raise InputError(f"{record} was measured on {' and '.join(sorted(devices))}; it wants one device")
    differing = {key: dict.fromkeys(str(e[key]) for e in environments) for key in ("date", "command", "commit")}
    environment = environments[0] | {key: "; ".join(values) for key, values in differing.items()}
    content = {"environment": environment, "records": [r for _, report in found for r in report.records]}
    path = out / f"{record}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = ArgumentParser(
        "python -m benchmarks.records",
        description=__doc__,
        epilog=f"steps:\n{listed()}",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("step", nargs="*", metavar="STEP", help="what to make; see below")
    parser.add_argument("--out", type=Path, default=Path("runs/records"), help="folder for the records (%(default)s)")
    parser.add_argument("--replace", action="store_true", help="run nothing; copy the records over benchmarks/results")
    asked = parser.parse_args(arguments)
    if unknown := [name for name in asked.step if name not in STEPS]:
        parser.error(f"STEP is {unknown[0]!r}; it must be one of {', '.join(STEPS)}")
    if asked.out.resolve() == RESULTS.resolve():
        parser.error("--out is benchmarks/results; --replace copies the records there from another folder")
    if not asked.step:
        parser.print_help()
        return 2
    try:
        if asked.replace:
            for record in dict.fromkeys(STEPS[name].record for name in asked.step):
                print(f"replaced {replace(record, asked.out)}")
            return 0
        return max([make(name, asked.out) for name in asked.step])
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
