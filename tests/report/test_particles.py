"""The particles of SMC as a figure and as a page."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import pytest
import torch

import lmppl.states
from lmppl.report.particle_page import particle_page
from lmppl.report.particles import ParticleStep, draw_particles, pieces, survivors
from lmppl.report.plots import BLUE

NASTY = [
    '<script>alert("x")</script>', "a 'b' \"c\" & d", "line\nbreak\ttab", "日本 é 🙂", "\ud800", "$x$",
]  # fmt: skip


def step(texts, weights, ancestors=None, *, site="z", num_tokens=None):
    num, weights = len(texts), torch.tensor(weights, dtype=torch.float64)
    values = tuple(text if isinstance(text, dict) else {site: text} for text in texts)
    ess = float(weights.sum() ** 2 / (weights**2).sum()) if weights.any() else 0.0
    copies = tuple(range(num)) if ancestors is None else tuple(ancestors)
    facts = (site,), num_tokens, weights.log(), ess, num, copies, ancestors is not None
    return ParticleStep(*facts, values)


def small():
    """Of three particles, 1 has no copy; in the end, that in slot 2 is dead."""
    first = step(["a", "b", "c"], [1.0, 2.0, 5.0], [0, 2, 2])
    middle = step(
        [{"z": "a", "w": "x"}, {"z": "c", "w": ""}, {"z": "c", "w": "y"}], [1, 1, 1], site="w"
    )
    last = step([{"z": "a!", "w": "x"}, {"z": "c", "w": ""}, {"z": "c", "w": "y"}], [3, 1, 0])
    return [first, middle, last]


class Reader(HTMLParser):
    """Tags with their attributes, and text, of a page whose elements are closed in their order."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self._open = [], [], []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append((self._open[-1] if self._open else "", data))

    def of(self, tag, kind=None):
        return [a for name, a in self.tags if name == tag and kind in (None, a.get("class"))]


# --- what the record says -------------------------------------------------------------------------


def test_survivors_have_a_live_descendant_at_the_end():
    assert survivors(small()) == [{0, 2}, {0, 1}, {0, 1}]


def test_pieces_say_what_is_new():
    steps = small()
    assert [[(p.before, p.new, p.is_new) for p in own] for own in pieces(steps, 1)] == [
        [("a", "", False), ("", "x", True)],
        [("c", "", False), ("", "", True)],
        [("c", "", False), ("", "y", True)],
    ]
    assert [p.new_or_empty for own in pieces(steps, 1) for p in own] == [
        "",
        "x",
        "",
        "(empty)",
        "",
        "y",
    ]
    assert [(p.before, p.new) for p in pieces(steps, 2)[0]] == [("a", "!"), ("x", "")]


def test_pieces_of_numbers_of_moved_values_and_of_cut_characters():
    half, third = torch.tensor(0.5), torch.tensor(0.25)
    steps = [
        step([{"p": half, "z": "ab"}, {"p": half, "z": "\ufffd"}], [1, 1]),
        step([{"p": half, "z": "xb"}, {"p": third, "z": "é"}], [1, 1]),
    ]
    first, second = pieces(steps, 1)
    assert [(p.before, p.new) for p in first] == [("0.5", ""), ("", "xb")]
    assert [(p.before, p.new) for p in second] == [("", "0.25"), ("", "é")]


# --- the page -------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else():
    page = particle_page(small(), "smc")
    reader = Reader(page)
    assert not {"script", "link", "img", "iframe", "object", "base"} & {
        tag for tag, _ in reader.tags
    }
    assert not re.search(r"https?:|url\(|@import|src=|\bon\w+=", page)
    assert page.startswith("<!DOCTYPE html>") and {"charset": "utf-8"} in reader.of("meta")
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page


def test_what_a_model_wrote_is_escaped():
    steps = [step(NASTY, [1.0] * len(NASTY), site='<b onclick="x">&')] * 2
    page = particle_page(steps, "<i>smc</i>")
    assert "<script" not in page and "<i>smc" not in page
    reader = Reader(page)
    assert all(attributes == {} for attributes in reader.of("b"))
    shown = [text for tag, text in reader.text if tag == "span"]
    for text in NASTY:
        escaped = repr(text)[1:-1]
        assert escaped in shown, text
    page.encode("utf-8")  # half a pair of surrogates cannot be
    assert any(text == '<b onclick="x">&' for text in shown)


def test_every_bar_leads_to_its_text_and_every_text_to_its_ancestor():
    steps = small()
    reader = Reader(particle_page(steps, "smc"))
    ids = [attributes["id"] for attributes in reader.of("li")]
    assert sorted(ids) == sorted(f"s{s}p{slot}" for s in range(3) for slot in range(3))
    targets = [attributes["href"] for attributes in reader.of("a")]
    assert all(target[1:] in ids for target in targets)
    bars = [f"#s{s}p{slot}" for s in range(3) for slot in range(3)]
    ancestors = {f"#s{s}p{a}" for s in range(2) for a in steps[s].ancestors}
    assert targets[:9] == bars and set(targets[9:]) == ancestors
    assert len(reader.of("details")) == 3


def test_bars_are_weights_and_lines_are_descent():
    reader = Reader(particle_page(small(), "smc"))
    heights = [float(r["height"]) for r in reader.of("rect", "live") + reader.of("rect", "gone")]
    live = [0.2, 1.0, 1.0, 1.0, 1.0, 1 / 3]
    assert heights == pytest.approx([*live, 0.4, 1.0, 0.0], abs=1e-3)
    lines = [path["d"] for path in reader.of("path", "live")]
    assert lines == [
        "M0.5 0C0.5 .5 0.5 .5 0.5 1", "M2.5 0C2.5 .5 1.5 .5 1.5 1",
        "M0.5 0C0.5 .5 0.5 .5 0.5 1", "M1.5 0C1.5 .5 1.5 .5 1.5 1",
    ]  # fmt: skip
    assert len(reader.of("path", "gone")) == 2


def test_the_page_says_what_each_step_was():
    first, *others = small()
    within = step(["a", "b", "c"], [1.0, 2.0, 5.0], [0, 2, 2], num_tokens=7)
    text = "".join(data for _, data in Reader(particle_page([within, *others], "smc")).text)
    assert "3 particles, resampled 1 time." in text and "descend from 2 of the 3" in text
    assert f"Log evidence {math.log(4 / 3):.3f} nats" in text
    assert (
        "1. z, 7 tokens" in text and "ESS 2.1 of 3 · resampled · largest weight 62.5% · 2" in text
    )
    assert "2. w" in text and "ESS 3.0 of 3 · not resampled" in text
    assert "goes on 2 times" in text and "ends here" in text and "(empty)" in text
    assert "log evidence so far 0.981" in "".join(
        data for _, data in Reader(particle_page([first, *others], "smc")).text
    )


def test_long_texts_are_cut_in_front_of_what_is_new():
    steps = [step(["a" * 5000], [1.0]), step(["a" * 5000 + "new"], [1.0])]
    page = particle_page(steps, "smc")
    assert "…" + "a" * 240 + "</span><b>new</b>" in page and len(page) < 12_000


def test_all_dead_is_a_page_and_a_figure():
    dead = [step(["a", "b"], [1.0, 1.0]), step(["a", "b"], [0.0, 0.0])]
    assert "-inf nats" in particle_page(dead, "smc")
    pytest.importorskip("matplotlib")
    draw_particles(dead)


def test_a_page_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    import small_posterior

    posterior = small_posterior.by_smc()
    path = tmp_path / "folder" / "particles.html"
    page = posterior.particles_html(path)
    assert path.read_text(encoding="utf-8") == page == posterior.particles_html()
    path.write_text("before")

    def fail(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(lmppl.states.os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        posterior.particles_html(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.read_text() == "before"


# --- the figure -----------------------------------------------------------------------------------


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib")


def colour_of(artist):
    from matplotlib.colors import to_hex

    return to_hex(artist)


def test_the_figure_has_bars_texts_lines_and_the_ess_of_each_step(matplotlib):
    steps = small()
    (axis,) = draw_particles(steps).axes
    texts = [text.get_text() for text in axis.texts]
    heads = ["1: z\nESS 2.1 of 3\nlargest 62.5%", "2: w\nESS 3.0 of 3\nlargest 33.3%",
             "3: z\nESS 1.6 of 3\nlargest 75.0%"]  # fmt: skip
    assert [text for text in texts if text.startswith(("1:", "2:", "3:"))] == heads
    assert texts[1:4] == ["a", "b", "c"] and texts[5:8] == ["x", "(empty)", "y"]
    widths = [float(bar.get_width()) for bar in axis.patches]
    assert widths[:3] == pytest.approx([0.1, 0.2, 0.5]) and widths[8] == 0.0
    colours = [colour_of(bar.get_facecolor()) == BLUE[0] for bar in axis.patches]
    assert colours == [True, False, True, True, True, False, True, True, False]
    lines = [line for line in axis.lines if len(line.get_xdata()) == 2]
    ends = [tuple(int(y) for y in line.get_ydata()) for line in lines]
    assert ends == [(0, 0), (2, 1), (2, 2), (0, 0), (1, 1), (2, 2)]
    assert [colour_of(line.get_color()) == BLUE[0] for line in lines] == 2 * [True, True, False]
    crosses = [line for line in axis.lines if line.get_marker() == "x"]
    assert [list(line.get_ydata()) for line in crosses] == [[], [], [2]]


def test_many_steps_have_the_texts_of_the_last(matplotlib):
    within = [step(["a" * k, "b" * k], [1.0, 2.0], [0, 0], num_tokens=k) for k in range(1, 9)]
    (axis,) = draw_particles([*within, step(["a" * 9, "a" * 9], [1.0, 1.0])]).axes
    texts = [text.get_text() for text in axis.texts]
    assert texts[:2] == ["1: z\n1 token\nESS 1.8\nmax 67%", "2: z\n2 tokens\nESS 1.8\nmax 67%"]
    assert texts[8:11] == ["9: z\nESS 2.0 of 2\nlargest 50.0%", "a" * 9, "a" * 9]


@pytest.mark.parametrize("num", [8, 64])
def test_nothing_is_outside_of_the_figure_and_texts_do_not_meet(matplotlib, num):
    words = ["a rather long text that goes on and on " * (1 + k % 3) for k in range(num)]
    steps = [step(words, [1.0] * num, [k // 2 for k in range(num)], site=f"z{s}") for s in range(3)]
    figure = draw_particles(steps)
    figure.canvas.draw()
    (axis,) = figure.axes
    frame = figure.bbox
    boxes = [text.get_window_extent() for text in axis.texts]
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)
    assert all(frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes)
    rows = [box for box, text in zip(boxes, axis.texts, strict=True) if "rather" in text.get_text()]
    assert len(rows) == 3 * num
    for one, other in zip(rows, rows[1:], strict=False):
        assert one.x0 != other.x0 or other.y1 <= one.y0 + 1.0
    width, _ = figure.get_size_inches()
    assert width < 6.8


def test_texts_are_no_formulas_and_files_are_written(matplotlib, tmp_path):
    steps = [step([text for text in NASTY if text.isascii()], [1.0] * 4)] * 2
    draw_particles(steps, tmp_path / "particles.svg")
    assert (tmp_path / "particles.svg").read_text().startswith("<?xml")
