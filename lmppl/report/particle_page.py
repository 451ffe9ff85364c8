"""The particles of SMC as a page: one HTML file that needs nothing else, neither a server nor scripts.

Time runs downwards and slots stand side by side, so that the pictures are as wide as the screen; the
texts are in lists below. All that a model wrote is escaped.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence

from lmppl.report.particles import ParticleStep, Piece, pieces, survivors
from lmppl.report.tables import percent, show

_LEAST_BAR = 0.04  # of the largest: what has any weight can be seen
_MOST_BEFORE = 240  # characters of what was there already

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #595959; --paper: #fff; --rule: #d5d5d5;
  --live: #1b6ca8; --gone: #a3a3a3; --pick: #fff3bf; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --soft: #a8a8a8; --paper: #16181c;
  --rule: #3a3d42; --live: #6bb8f2; --gone: #6a6d72; --pick: #4a4212; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.45 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .5rem; }
h2 { font-size: 1rem; margin: 1.5rem 0 0; overflow-wrap: anywhere; }
section h2 { display: inline; margin: 0; }
p { margin: .2rem 0; }
.soft, .facts { color: var(--soft); font-size: .875rem; }
svg { display: block; width: 100%; }
.bars { height: 3.5rem; border-bottom: 1px solid var(--ink); margin: .25rem 0 .15rem; }
.lines { height: 3rem; margin-bottom: .3rem; }
.live { fill: var(--live); } .gone { fill: var(--gone); }
path { fill: none; vector-effect: non-scaling-stroke; }
path.gone { fill: none; stroke: var(--gone); stroke-width: 1px; }
path.live { fill: none; stroke: var(--live); stroke-width: 2px; }
summary { cursor: pointer; padding: .4rem 0; overflow-wrap: anywhere; }
ol { list-style: none; margin: 0 0 1rem; padding: 0; }
li { display: grid; grid-template-columns: 3rem 5.5rem 1fr; gap: 0 .6rem; padding: .3rem .2rem;
  border-top: 1px solid var(--rule); }
li:target { background: var(--pick); }
li a { color: inherit; }
.weight { font-variant-numeric: tabular-nums; font-size: .875rem; }
.weight i { display: block; height: .35rem; background: var(--live); }
.text { font-family: ui-monospace, monospace; font-size: .875rem; overflow-wrap: anywhere; }
.text .site { color: var(--soft); font-family: system-ui, sans-serif; }
.text .before { color: var(--soft); }
.text b { font-weight: 600; }
.text small { display: block; color: var(--soft); font-family: system-ui, sans-serif; }
"""


def particle_page(steps: Sequence[ParticleStep], engine: str) -> str:
    """The particles as a page of HTML; ``engine`` is the name of what ran them."""
    alive, last = survivors(steps), len(steps) - 1
    num, first, resamplings = len(steps[0]), alive[0], sum(step.is_resampled for step in steps)
    times = f"{resamplings} time{'s' * (resamplings != 1)}"
    counts = f"{num} particles, resampled {times}. Log evidence {_nats(steps[-1].log_evidence)}."
    descent = f"Those at the end descend from {len(first)} of the {num} at the first step."
    parts = [
        f"<h1>Particles of {_escape(engine)}</h1><p>{counts} {descent}</p>",
        '<p class="soft">Downwards: one step after the other. Side by side: the particles. A bar is a '
        "weight, as a share of the largest of its step; where there is none, it is zero. Lines lead "
        "from a particle to its copies. In strong colours: what has descendants of positive weight at "
        "the end. A click on a bar leads to its text.</p>",
    ]
    texts = [pieces(steps, s) for s in range(len(steps))]
    for s, step in enumerate(steps):
        parts.append(_picture(step, s, texts[s], alive[s]))
        parts += [_lines(step, alive[s + 1])] if s < last else ["<h2>Texts</h2>"]
    for s in range(len(steps)):
        parts.append(_list(steps, s, texts[s], alive[s], is_open=s == last))
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Particles of {_escape(engine)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _picture(step: ParticleStep, s: int, texts: list[list[Piece]], alive: set[int]) -> str:
    """What is known of a step, and its bars."""
    weights = step.weights.tolist()
    facts = [
        step.ess_title,
        "resampled" if step.is_resampled else "not resampled",
        f"largest weight {percent(max(weights))}",
        *[f"log evidence so far {_nats(step.log_evidence)}"] * (step.num_tokens is None),
        f"{len(alive)} with descendants at the end",
    ]
    return (
        f'<section><h2>{s + 1}. {_escape(step.title)}</h2> <span class="facts">{" · ".join(facts)}'
        f"</span>{_bars(s, weights, texts, alive)}</section>"
    )


def _list(
    steps: Sequence[ParticleStep],
    s: int,
    texts: list[list[Piece]],
    alive: set[int],
    *,
    is_open: bool,
) -> str:
    """The particles of a step, the heaviest first."""
    step, weights, rows = steps[s], steps[s].weights.tolist(), []
    copies = Counter(step.ancestors)
    for slot in sorted(range(len(step)), key=lambda slot: -weights[slot]):
        came = "" if s == 0 else _link(s - 1, steps[s - 1].ancestors[slot])
        went = "" if s == len(steps) - 1 else _goes_on(copies[slot], slot in alive)
        told = " · ".join(part for part in (came, went) if part)
        rows.append(
            f'<li id="s{s}p{slot}"><span class="soft">#{slot}</span>'
            f'<span class="weight">{percent(weights[slot])}'
            f'<i style="width:{_share(weights, slot):.0%}"></i></span>'
            f'<span class="text">{_texts(texts[slot])}<small>{told}</small></span></li>'
        )
    return (
        f"<details{' open' * is_open}><summary>{s + 1}. {_escape(step.title)}</summary>"
        f"<ol>{''.join(rows)}</ol></details>"
    )


def _link(s: int, slot: int) -> str:
    return f'<a href="#s{s}p{slot}">from #{slot} of step {s + 1}</a>'


def _goes_on(copies: int, survives: bool) -> str:
    if not copies:
        return "ends here"
    times = "goes on" if copies == 1 else f"goes on {copies} times"
    return times + ("" if survives else ", without descendants at the end")


def _share(weights: Sequence[float], slot: int) -> float:
    """The length of a bar: of the largest weight of the step."""
    return max(weights[slot] / max(weights), _LEAST_BAR) if weights[slot] else 0.0


def _bars(s: int, weights: Sequence[float], texts: list[list[Piece]], alive: set[int]) -> str:
    bars = []
    for slot, weight in enumerate(weights):
        height, kind = _share(weights, slot), "live" if slot in alive else "gone"
        shown = " ".join(piece.before + piece.new for piece in texts[slot])
        shown = shown if len(shown) <= _MOST_BEFORE else "…" + shown[-_MOST_BEFORE:]
        bars.append(
            f'<a href="#s{s}p{slot}"><title>#{slot}, {percent(weight)}: {_escape(shown)}</title>'
            f'<rect x="{slot}" y="0" width="1" height="1" fill="transparent"/>'
            f'<rect class="{kind}" x="{slot + 0.1:.1f}" y="{1 - height:.3f}" width="0.8" '
            f'height="{height:.3f}"/></a>'
        )
    label = f"weights of the {len(weights)} particles of step {s + 1}"
    return _svg("bars", len(weights), label, bars)


def _lines(step: ParticleStep, alive: set[int]) -> str:
    """Lines from the particles of a step to their copies; ``alive`` are copies that survive."""
    paths = []
    for slot in sorted(range(len(step)), key=lambda slot: slot in alive):
        x, ancestor = slot + 0.5, step.ancestors[slot] + 0.5
        kind = "live" if slot in alive else "gone"
        paths.append(f'<path class="{kind}" d="M{ancestor} 0C{ancestor} .5 {x} .5 {x} 1"/>')
    return _svg("lines", len(step), "lines from particles to their copies", paths)


def _svg(kind: str, width: int, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="{kind}" viewBox="0 0 {width} 1" preserveAspectRatio="none" role="img" '
        f'aria-label="{label}">{"".join(parts)}</svg>'
    )


def _texts(found: Sequence[Piece]) -> str:
    """The values of a particle: what it had before, of which only the end may be shown, and what is
    new."""
    shown = []
    for piece in found:
        before = piece.before
        if len(before) > _MOST_BEFORE:
            before = "…" + before[-_MOST_BEFORE:]
        value = f'<span class="before">{_escape(before)}</span><b>{_escape(piece.new)}</b>'
        if not before and not piece.new:
            value = '<span class="site">(empty)</span>'
        name = _escape(show(piece.site, quote=False))
        shown.append(f'<span class="site">{name}</span> {value}')
    return "<br>".join(shown)


def _nats(log_evidence: float) -> str:
    return f"{log_evidence:.3f} nats"


def _escape(text: str) -> str:
    return html.escape(text, quote=True)
