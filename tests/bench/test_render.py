import matplotlib.image
import numpy as np
import pytest

from lightning_attention.bench import render
from lightning_attention.bench.attention import BOTH, FORWARD
from lightning_attention.bench.lengths import time_per_token
from lightning_attention.bench.render import Table

ENVIRONMENT = {
    "lightning_attention": "1.2.3",
    "torch": "2.99",
    "triton": "3.9",
    "device": "Some Device",
    "device_type": "cuda",
    "date": "2031-02-03T04:05:06+00:00",
    "peers": {"fla": "0.6.0", "x": None},
}
LENGTHS = (1024, 2048, 4096, 8192)


def _record(name: str, label: str, T: int, pass_: str, **values: object) -> dict:
    return {"implementation": name, "label": label, "B": 8192 // T, "T": T, "H": 2, "D": 16, "dtype": "bfloat16",
            "pass": pass_, **values}  # fmt: skip


@pytest.fixture
def records() -> list[dict]:
    found = []
    for pass_, cost in ((FORWARD, 1.0), (BOTH, 3.0)):
        found.append(_record("cula", "cuLA", 1024, pass_, skipped="it has no backward pass"))
        for T in LENGTHS:
            found.append(_record("lightning_attention", "lightning attention", T, pass_, ms=1, us_per_token=cost))
            found.append(_record("fla", "flash-linear-attention", T, pass_, ms=3, us_per_token=3 * cost))
            if T < 8192:
                time = cost * T / 512
                found.append(_record("sdpa_cudnn", "softmax (cuDNN)", T, pass_, ms=1, us_per_token=time))
                found.append(_record("sdpa_flash", "softmax (flash)", T, pass_, ms=1, us_per_token=1.5 * time))
        why = "a call would take about 2 s, more than 1 s"
        found.append(_record("sdpa_cudnn", "softmax (cuDNN)", 8192, pass_, skipped=why))
        found.append(_record("lightning_attn", "lightning_attn", 1024, pass_, error="ModuleNotFoundError: no"))
    return found


@pytest.fixture
def figure(records, tmp_path, monkeypatch):
    """The figure that was drawn, and the file."""
    from matplotlib.figure import Figure

    kept = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k)))
    path = tmp_path / "x.png"
    time_per_token(records, ENVIRONMENT).save(path)
    return kept[0], path


def test_the_picture_has_lines_in_both_halves_in_their_colours(figure):
    pixels = matplotlib.image.imread(figure[1])[..., :3]
    width = pixels.shape[1]
    assert width > 1500
    for colour in (style[0] for style in (render.OUR_STYLE, *render.STYLES[:3])):
        wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        hits = np.abs(pixels - wanted).max(-1) < 0.02
        assert hits[:, : width // 2].sum() > 300
        assert hits[:, width // 2 :].sum() > 300


def test_the_lines_hold_the_records(figure):
    axes = figure[0].axes
    assert [ax.get_title("left") for ax in axes] == ["forward", "forward + backward"]
    for ax, cost in zip(axes, (1.0, 3.0), strict=True):
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
        lines = [line.get_xydata().tolist() for line in ax.get_lines()]
        assert lines[0] == [[T, cost] for T in LENGTHS]  # ours, drawn first
        assert [[T, 3 * cost] for T in LENGTHS] in lines
        assert [[T, cost * T / 512] for T in LENGTHS[:-1]] in lines
        assert len(lines) == 4  # what failed has none


def test_every_line_has_a_label_that_covers_nothing(figure):
    drawing = figure[0]
    for ax in drawing.axes:
        texts = ax.texts
        assert sorted(t.get_text() for t in texts) == [
            "flash-linear-attention\n3.0× our time at 8k",
            "lightning attention",
            "softmax (cuDNN)\n8.0× our time at 4k",
            "softmax (flash)\n12× our time at 4k",
        ]
        boxes = [t.get_window_extent(drawing.canvas.get_renderer()) for t in texts]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        for line in ax.get_lines():
            points = ax.transData.transform(line.get_xydata())
            assert not any(box.count_contains(points) for box in boxes)


def test_the_caption_says_where_and_when(figure):
    text = " ".join(" ".join(t.get_text() for t in figure[0].texts).split())
    for part in ("Some Device", "bfloat16, 2 heads of 16", "B·T = 8,192", "lightning-attention 1.2.3", "torch 2.99",
                 "Triton 3.9", "fla 0.6.0", "2031-02-03", "the next call would take more than 1 s"):  # fmt: skip
        assert part in text


def test_lengths_are_named_as_readers_name_them():
    assert [render.length(T) for T in (512, 1024, 65_536, 1 << 20)] == ["512", "1k", "64k", "1M"]


def test_a_colour_is_one_implementations_in_every_panel(records, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: kept.append(self))
    forward_has_no_fla = [r for r in records if (r["implementation"], r["pass"]) != ("fla", FORWARD)]
    time_per_token(forward_has_no_fla, ENVIRONMENT).save(tmp_path / "x.png")
    colours = [{line.get_color() for line in ax.get_lines()} for ax in kept[0].axes]
    assert [len(c) for c in colours] == [3, 4]
    assert colours[0] < colours[1]


def test_a_table_is_text_with_words_on_the_left_and_numbers_on_the_right():
    table = Table("A title", ["what", "all\nµs", "×"], [["first", "1,234", "2"], ["second", "5"]])
    assert str(table).splitlines() == [
        "A title",
        "          all",
        "what       µs  ×",
        "────────────────",
        "first   1,234  2",
        "second      5",
    ]
