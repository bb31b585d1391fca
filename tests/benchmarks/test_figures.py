"""The drawings of the documentation: made of small records, legible in both schemes."""

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import figures
from benchmarks.cases import numerics as numerics_case
from benchmarks.figures import canvas, lengths, numerics, roofline, tiling
from benchmarks.figures.__main__ import FIGURES, main
from lightning_attention.bench.case import Run
from lightning_attention.bench.report import Report

ROOT = Path(figures.__file__).parents[2]


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report(tmp_path / "x.json", {"device": "NVIDIA H200"})


def words(path: Path) -> str:
    """The text of an SVG, which is one only if it can be parsed."""
    root = ElementTree.parse(path).getroot()
    assert root.tag.endswith("}svg")
    return " ".join("".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text"))


def shape(**fields: object) -> dict:
    return {"B": 4, "T": 2048, "H": 32, "D": 128, "pass": "forward", "implementation": "lightning_attention"} | fields


def test_ink_takes_the_colour_of_the_page(tmp_path: Path):
    tiling.draw(tmp_path / "tiling.svg", blocks=2, block=3)
    text = (tmp_path / "tiling.svg").read_text()
    assert text.count(canvas.STYLE) == 1
    assert "currentColor" in text
    assert canvas.INK not in text.replace(canvas.STYLE, "")
    assert not re.search(r"#(ffffff|000000)", text)  # no white card, no black line


@pytest.mark.parametrize("background", ["#ffffff", "#1e2129"])
def test_colours_stand_out_on_both_pages(background: str):
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for colour in (canvas.OURS, canvas.OTHER, canvas.THIRD):
        light, dark = sorted((luminance(colour), luminance(background)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 3  # WCAG's least for graphics


def test_tiling_draws_a_square_for_each_pair(tmp_path: Path):
    tiling.draw(tmp_path / "t.svg", blocks=2, block=3)
    text = (tmp_path / "t.svg").read_text()
    inside, between = (len(re.findall(rf"fill: {colour}; opacity", text)) for colour in (canvas.OURS, canvas.OTHER))
    assert (inside, between) == (2 * 6, 9)
    assert "state" in words(tmp_path / "t.svg")


def test_lengths_show_the_last_values(report: Report, tmp_path: Path):
    for T in (2048, 8192):
        report.add("shapes", **shape(T=T, ms=1, us_per_token=0.123, **{"pass": "forward+backward"}))
        report.add("shapes", **shape(T=T, B=1, ms=1, us_per_token=9.87, **{"pass": "forward+backward"}))
        report.add(
            "shapes",
            **shape(T=T, ms=1, us_per_token=T / 1000, implementation="sdpa_cudnn", **{"pass": "forward+backward"}),
        )
        report.add("serve", implementation="transnormer", B=1, context=T, ms=1.5, state_bytes=2e6)
        report.add("serve", implementation="llama", B=1, context=T, ms=T / 2048, state_bytes=1e6 * T)
        report.add("serve", implementation="llama", B=4, context=T, ms=777.0, state_bytes=1e6 * T)
    report.add("serve", implementation="llama", B=1, context=1 << 20, skipped="no room")
    lengths.draw(tmp_path / "l.svg", report, report)
    found = words(tmp_path / "l.svg")
    for value in ("0.123", "8.19", "1.5", "4", "0.002", "8.19"):
        assert value in found.split()
    assert "9.87" not in found  # of each length the largest batch
    assert "777" not in found


def test_roofline_counts_what_the_definition_needs():
    T, D = 2048, 128
    ours = shape(ms=1.0)
    intensity, reached = roofline.point(ours)
    assert intensity == (4 * 64 * D + 4 * D * D) / (4 * D * 2)
    assert math.isclose(reached, (4 * 64 * D + 4 * D * D) * 4 * T * 32 / 1e-3 / 1e12)
    assert roofline.point(shape(ms=1.0, **{"pass": "backward"}))[0] == 3 * (4 * 64 * D + 4 * D * D) / (7 * D * 2)
    assert roofline.point(shape(ms=1.0, implementation="sdpa_cudnn"))[0] == T / 4


def test_roofline_is_drawn_and_wants_a_known_peak(report: Report, tmp_path: Path):
    report.add("copy", bytes_per_second=4e12)
    for fields in ({}, {"pass": "backward"}, {"implementation": "sdpa_cudnn"}):
        report.add("shapes", **shape(ms=0.1, **fields))
    roofline.draw(tmp_path / "r.svg", report)
    assert "memory: 4.0 TB/s" in words(tmp_path / "r.svg")
    report.environment["device"] = "Some GPU"
    with pytest.raises(ValueError, match="peak of Some GPU"):
        roofline.draw(tmp_path / "r.svg", report)


def test_numerics_are_measured_and_drawn(report: Report, tmp_path: Path):
    scale = numerics_case.Scale((64, 200), (-1e-3, -0.1, -8.0), 16)
    numerics_case.measure(Run(report, torch.device("cpu"), scale, say=len))
    found = report.find("numerics")
    assert len(found) == 2 * 3 * 3 * 2
    for dtype, budget in (("float32", 2e-6), ("float16", 6.25e-4), ("bfloat16", 5e-3)):
        errors = [
            r["relative_error"] for r in report.find("numerics", dtype=dtype, implementation="lightning_attention")
        ]
        assert 0 < max(errors) < budget
    naive = max(r["relative_error"] for r in report.find("numerics", dtype="bfloat16", implementation="naive"))
    assert naive > 5e-3  # a state in bfloat16 is not right
    numerics.draw(tmp_path / "n.svg", report)
    assert "200 tokens" in words(tmp_path / "n.svg")
    assert "the recurrence in the inputs' type" in words(tmp_path / "n.svg")


def test_every_figure_is_on_a_page_with_its_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    for name in FIGURES:
        assert re.search(rf"!\[[^]]+\]\([./]*images/{name}\.svg\)", pages), name
        assert f"python -m benchmarks.figures {name}" in pages, name
    main(["tiling", "--out", str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path / 'tiling.svg'}\n"
    with pytest.raises(SystemExit):
        main(["no figure"])
    assert "FIGURE is 'no figure'; it must be one of tiling, " in capsys.readouterr().err


@pytest.mark.parametrize("name", FIGURES)
def test_the_records_still_make_the_figures(name: str, tmp_path: Path):
    """What stands in docs/images says the same as what the code draws now; positions depend on matplotlib."""
    FIGURES[name](tmp_path / "x.svg")
    assert words(tmp_path / "x.svg") == words(ROOT / "docs" / "images" / f"{name}.svg")
