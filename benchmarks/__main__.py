"""``python -m benchmarks``: measure cases, or show results that stand in files."""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.harness import find, nothing
from lightning_attention.bench import case
from lightning_attention.bench.report import Report
from lightning_attention.errors import InputError


def parser() -> ArgumentParser:
    """The options; the help lists every case with the first line of its docstring."""
    lines = {name: import_module(f"benchmarks.cases.{name}").__doc__ or "" for name in find.case_names()}
    listed = "\n".join(f"  {name:<18} {text.partition(chr(10))[0]}" for name, text in lines.items())
    found = ArgumentParser(
        "python -m benchmarks",
        description="Measure speed, memory and errors, beside other libraries. Each case prints tables and writes a\n"
        "JSON file, as it goes, and for some cases a figure (with matplotlib). A peer that is missing or\n"
        "fails is shown as such; a failure of our own makes the exit status 1.",
        epilog=f"cases:\n{listed}",
        formatter_class=RawDescriptionHelpFormatter,
    )
    found.add_argument("case", nargs="*", metavar="CASE", help="what to measure; see below")
    found.add_argument("--render", nargs="+", type=Path, metavar="FILE", help="show JSON files instead of measuring")
    found.add_argument("--peers", help=f"what to compare with, with commas: {', '.join(find.peers())}")
    found.add_argument("--quick", action="store_true", help="fewer and shorter, where the case has such a form")
    found.add_argument("--only", metavar="PATTERN", help="the rows whose names this regular expression is found in")
    found.add_argument("--backend", help="triton, tiled or reference; by device if not given")
    found.add_argument("--device", choices=("cpu", "cuda"), help="a GPU where there is one, if not given")
    found.add_argument(
        "--driver", choices=("none",), help="on a CUDA that does nothing: the host's time, without a GPU"
    )
    found.add_argument("--threads", type=int, help="threads that PyTorch computes with on a CPU")
    found.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for the files (%(default)s)")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    for name in options.case:
        if name not in find.case_names():
            parser().error(f"CASE is {name!r}; it must be one of {', '.join(find.case_names())}")
    if not options.case and not options.render:
        parser().print_help()
        return 2
    for path in options.render or ():
        try:
            report = Report.read(path)
        except InputError as error:
            parser().error(f"--render: {error}")
        options.out.mkdir(parents=True, exist_ok=True)
        for name in find.case_names():
            try:
                case.show(find.case(name).show(report), options.out / f"{path.stem}.png")
            except KeyError as error:
                parser().error(f"--render: {path} lacks {error} in what {name} shows")
    if options.threads is not None and options.threads < 1:
        parser().error(f"--threads is {options.threads}; it must be at least 1")
    if options.driver == "none" and not nothing.in_place():
        if lacking := nothing.missing():
            parser().error(f"--driver none needs {lacking}")
        return nothing.run(["-m", "benchmarks", *arguments])
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    asked = {name: getattr(options, name) for name in ("quick", "peers", "backend", "only", "out")}
    command, failures = ["python", "-m", "benchmarks", *arguments], 0
    try:
        device = case.find_device(options.device)
        for name in options.case:
            failures += len(case.run(find.case(name), name, device, known_peers=find.peers(), command=command, **asked))
    except case.OptionError as error:
        parser().error(f"{error.option}: {error}")
    except OSError as error:
        parser().error(f"{error.strerror}: {error.filename}")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
