"""The particles of SMC, step by step: the record of them, what it says of lineages, and the figure.

Particles stand in *slots*, 0 to N - 1. At every step slot i goes on as a copy of the particle in slot
``ancestors[i]``; where nothing was resampled, that is i itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from lmppl.report.plots import BLUE, drawing
from lmppl.report.tables import percent, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GREY = "#8c8c8c"  # lighter than the blue, so that neither needs its colour
_MOST_TEXTS = 4  # columns that have room for texts
_FEW, _FONTS = 24, (8.4, 6.8)  # points: of texts, up to so many particles and beyond
_CHARACTER = 0.00846  # inches, for each point of the font
_ROW, _WIDTH, _LEAST_TEXT, _MOST_GAP = 0.155, 6.4, 1.15, 1.6  # inches
_HEAD, _HEAD_FONT = 4.2, 8  # rows, points


@dataclass(frozen=True, eq=False)
class ParticleStep:
    """N particles of SMC where they were compared: at a barrier, or when texts under way were resampled.

    Attributes:
        sites: names of the latent sites that were drawn, or went on, since the step before.
        num_tokens: of texts under way, how many tokens have been drawn of each at most; None: at a
            barrier.
        log_weights: (N,) float64, nats: what the particles weigh here, before they are resampled. At a
            barrier their mean estimates the evidence of what was observed so far. Texts under way,
            and particles under ``twist="flow"``, weigh what they are resampled by: with what
            constraints have cost them, and their twists.
        ess: effective sample size of the particles that were compared here.
        num_compared: how many these were. (A run that has ended is not compared with those that go on.)
        ancestors: N slots: slot i goes on as a copy of the particle in slot ``ancestors[i]``.
        is_resampled: whether there was a resampling.
        values: of every particle, the values of its latent sites by name: texts as ``str``, also those
            under way, and tensors.
    """

    sites: tuple[str, ...]
    num_tokens: int | None
    log_weights: torch.Tensor
    ess: float
    num_compared: int
    ancestors: tuple[int, ...]
    is_resampled: bool
    values: tuple[Mapping[str, Any], ...]

    def __len__(self) -> int:
        return len(self.ancestors)

    def __repr__(self) -> str:
        resampled = ", resampled" * self.is_resampled
        return f"ParticleStep({self.title}: {len(self)} particles, {self.ess_title}{resampled})"

    @property
    def weights(self) -> torch.Tensor:
        """Normalised weights, (N,) float64; all 0 if no particle is alive."""
        if bool((self.log_weights == -math.inf).all()):
            return torch.zeros_like(self.log_weights)
        return torch.softmax(self.log_weights, 0)

    @property
    def log_evidence(self) -> float:
        """The logarithm of the mean weight (nats): the estimate so far. The last step's is the
        posterior's."""
        return float(torch.logsumexp(self.log_weights, 0)) - math.log(len(self))

    @property
    def title(self) -> str:
        """Where it is, in a few words."""
        return ", ".join(self.title_parts)

    @property
    def title_parts(self) -> tuple[str, ...]:
        """The sites, and the number of tokens if there is one."""
        names = ", ".join(show(name, quote=False) for name in self.sites) or "start"
        if self.num_tokens is None:
            return (names,)
        return names, f"{self.num_tokens} token{'s' * (self.num_tokens != 1)}"

    @property
    def ess_title(self) -> str:
        """Its effective sample size, in words."""
        return f"ESS {self.ess:.1f} of {self.num_compared}"


# --- lineages ------------------------------------------------------------------------------------


def survivors(steps: Sequence[ParticleStep]) -> list[set[int]]:
    """At each step, the slots whose particles have a descendant of positive weight at the last."""
    last = steps[-1].log_weights > -math.inf
    alive = [set(last.nonzero().flatten().tolist())]
    for step in reversed(steps[:-1]):
        alive.append({step.ancestors[slot] for slot in alive[-1]})
    return alive[::-1]


@dataclass(frozen=True)
class Piece:
    """What a particle has of one site at a step, as printable text: what its ancestor had ``before``, at
    the step before, and what is ``new``. (A value that moves have changed is new.)"""

    site: str
    before: str
    new: str
    is_new: bool

    @property
    def new_or_empty(self) -> str:
        """What is new, in words where that is a text without a character."""
        return self.new if self.new or self.before or not self.is_new else "(empty)"


def pieces(steps: Sequence[ParticleStep], s: int) -> list[list[Piece]]:
    """What every particle has at one of the steps, a piece a site."""
    values = steps[s].values
    known = (
        [{}] * len(values) if s == 0 else [steps[s - 1].values[a] for a in steps[s - 1].ancestors]
    )
    return [
        [_piece(site, before.get(site), value) for site, value in own.items()]
        for own, before in zip(values, known, strict=True)
    ]


def _piece(site: str, known: Any, value: Any) -> Piece:
    if not isinstance(value, str):
        shown = show(value)
        is_new = known is None or isinstance(known, str) or show(known) != shown
        return Piece(site, "" if is_new else shown, shown if is_new else "", is_new)
    before = known if isinstance(known, str) else ""
    if before != value:
        before = before.rstrip("\ufffd")  # a character that the end of a token had cut
    if not value.startswith(before):
        before = ""
    new = value[len(before) :]
    return Piece(site, show(before, quote=False), show(new, quote=False), known != value)


# --- the figure ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    """Where a step is drawn, in inches: its bars, and its texts, with a font of so many points."""

    left: float
    bar: float
    text: float
    font: float

    @property
    def right(self) -> float:
        return self.left + self.bar + self.text


def draw_particles(
    steps: Sequence[ParticleStep], path: str | os.PathLike[str] | None = None
) -> Figure:
    """The particles as a figure: a column a step, a row a slot. Bars are weights, as shares of the
    largest of the step; lines lead from ancestors to copies; texts are what is new at the step (where
    there are many steps, there is room for those of the last alone, which are whole)."""
    alive, last = survivors(steps), len(steps) - 1
    texts = _texts_of(steps)
    num, columns = len(steps[0]), _columns(texts, len(steps[0]))
    width, rows = max(columns[-1].right + 0.1, _WIDTH), num + _HEAD + 1.5
    with drawing(width, _ROW * rows, path) as figure:
        figure.set_layout_engine("none")  # the axes are the whole figure, in inches and rows
        axis = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axis.set(xlim=(-0.1, width - 0.1), ylim=(num + 1.0, -_HEAD - 0.5))
        axis.axis("off")
        for s, (step, column) in enumerate(zip(steps, columns, strict=True)):
            _draw_head(axis, step, column, s)
            _draw_bars(axis, step, column, alive[s])
            for slot, text in enumerate(texts[s]):
                _draw_text(axis, text, slot, column, slot in alive[s])
            if s < last:
                _draw_lines(axis, step, column.right, columns[s + 1].left, alive[s + 1])
        key = "blue: has descendants of positive weight at the end; grey: has none; ×: weight zero"
        axis.text(0.0, num + 0.6, key, fontsize=7.5, color="#555555", va="center")
    return figure


def _texts_of(steps: Sequence[ParticleStep]) -> list[list[str]]:
    """What is written beside the bars of each step."""
    if len(steps) <= _MOST_TEXTS:
        found = [pieces(steps, s) for s in range(len(steps))]
        return [[_line(p.new_or_empty for p in own if p.is_new) for own in step] for step in found]
    last = pieces(steps, len(steps) - 1)
    whole = [_line(p.before + p.new for p in own) for own in last]
    return [*[[] for _ in steps[1:]], whole]


def _line(shown: Iterable[str]) -> str:
    return " ".join(part.strip() for part in shown)


def _columns(texts: Sequence[Sequence[str]], num_particles: int) -> list[_Column]:
    """Where the steps are drawn, of which the texts are given. A figure of few steps is at most 6.4
    inches wide, or as wide as a readable part of their texts needs."""
    num, has_few = len(texts), len(texts) <= _MOST_TEXTS
    bar, gap = (0.5, 0.6) if has_few else (0.45, 0.4)
    font = _FONTS[num_particles > _FEW]
    needed = [
        max((font * _CHARACTER * len(text) + 0.15 for text in step), default=0.0) for step in texts
    ]
    room = max(_WIDTH - 0.2 - num * bar - (num - 1) * gap, _LEAST_TEXT * sum(map(bool, texts)))
    widths = [0.0] * num
    left = room
    for done, s in enumerate(
        sorted(range(num), key=lambda s: needed[s])
    ):  # fair shares of the room
        widths[s] = min(needed[s], left / (num - done))
        left -= widths[s]
    if has_few:  # what is left is for the lines
        gap = min(_MOST_GAP, gap + left / max(1, num - 1))
    starts = accumulate((bar + width + gap for width in widths), initial=0.0)
    return [_Column(start, bar, width, font) for start, width in zip(starts, widths, strict=False)]


def _draw_head(axis: Any, step: ParticleStep, column: _Column, number: int) -> None:
    narrow = not column.text
    room = int((column.bar + column.text + 0.3) / (_HEAD_FONT * _CHARACTER))
    title = [f"{number + 1}: {part}" if i == 0 else part for i, part in enumerate(step.title_parts)]
    title = [_cut(part, room) for part in title] if narrow else [_cut(", ".join(title), room)]
    largest = float(step.weights.max())
    ess = f"ESS {step.ess:.1f}" if narrow else step.ess_title
    lines = [*title, ess, f"max {largest:.0%}" if narrow else f"largest {percent(largest)}"]
    text = axis.text(
        column.left, -0.9, "\n".join(lines), fontsize=_HEAD_FONT, va="bottom", linespacing=1.15
    )
    text.set_parse_math(False)


def _draw_bars(axis: Any, step: ParticleStep, column: _Column, alive: set[int]) -> None:
    weights = step.weights.tolist()
    largest = max(weights) or 1.0
    slots = range(len(weights))
    widths = [max(column.bar * weight / largest, 0.02) if weight else 0.0 for weight in weights]
    colours = [BLUE[0] if slot in alive else _GREY for slot in slots]
    axis.barh(slots, widths, 0.72, column.left, color=colours)
    dead = [slot for slot in slots if not weights[slot]]
    axis.plot([column.left + 0.05] * len(dead), dead, "x", color="#333333", ms=3.5, mew=0.9)


def _draw_text(axis: Any, shown: str, slot: int, column: _Column, survives: bool) -> None:
    room = int((column.text - 0.09) / (column.font * _CHARACTER))
    text = axis.text(
        column.left + column.bar + 0.05, slot, _cut(shown, room),
        family="monospace", fontsize=column.font, va="center", color="#111111" if survives else _GREY,
    )  # fmt: skip
    text.set_parse_math(False)


def _draw_lines(axis: Any, step: ParticleStep, left: float, right: float, alive: set[int]) -> None:
    for slot, ancestor in enumerate(step.ancestors):
        survives = slot in alive
        style = {"color": BLUE[0], "lw": 1.2} if survives else {"color": _GREY, "lw": 0.7}
        ends = [left + 0.04, right - 0.06]
        axis.plot(ends, [ancestor, slot], zorder=2 if survives else 1, **style)


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: room - 1] + "…"
