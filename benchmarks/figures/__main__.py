"""``python -m benchmarks.figures``: the drawings of the documentation, from the records in benchmarks/results."""

import sys
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

from benchmarks.figures import lengths, numerics, roofline, tiling
from lightning_attention.bench.report import Report

RESULTS = Path(__file__).parents[1] / "results"


def record(name: str) -> Report:
    """A record of benchmarks/results."""
    return Report.read(RESULTS / f"{name}.json")


FIGURES: dict[str, Callable[[Path], None]] = {
    "tiling": tiling.draw,
    "lengths": lambda path: lengths.draw(path, record("h200-shapes"), record("h200-serve")),
    "roofline": lambda path: roofline.draw(path, record("h200-shapes")),
    "numerics": lambda path: numerics.draw(path, record("h200-numerics")),
}


def main(arguments: list[str] | None = None) -> None:
    """Draw what is named, or all of it."""
    parser = ArgumentParser("python -m benchmarks.figures", description="Draw the figures of docs/, as SVG.")
    parser.add_argument("figure", nargs="*", metavar="FIGURE", help=f"of {', '.join(FIGURES)}; all if none is named")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder for the files (%(default)s)")
    asked = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    for name in asked.figure:
        if name not in FIGURES:
            parser.error(f"FIGURE is {name!r}; it must be one of {', '.join(FIGURES)}")
    for name in asked.figure or FIGURES:
        FIGURES[name](asked.out / f"{name}.svg")
        print(asked.out / f"{name}.svg")


if __name__ == "__main__":
    main()
