"""How far the log-probabilities of drawing are from those of scoring, on a real language model.

    python -m benchmarks.mismatch --dtype float32 bfloat16 --out benchmarks/results/mismatch.json
    python -m benchmarks.mismatch --dtype bfloat16 --drawn-by prior --lengths 16

64 texts of 16 and of 64 tokens are drawn side by side, from the program itself and from a guide after
10 steps of training (whose adapter is merged for drawing, and is not for scoring). They are scored in
the model's dtype and by a copy of the model in float32, as ``lmppl.diagnose(..., mismatch="float32")``
does. Expect below 1e-4 nats a token in float32, and some hundredths in bfloat16. Rows that are in the
file already are kept; one takes a quarter of a minute to three minutes on one CPU core. The last lines
are the table of the docs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyro
import torch

import lmppl
from lmppl import lm_sample
from lmppl.diagnostics.mismatch import mismatches
from lmppl.lm.batches.draw_log import logging_draws
from lmppl.report.machine import machine
from lmppl.states import write_text

OPENING = "She put on her coat and took the umbrella."
ENDING = " So she stayed at home."
DRAWN_BY = ("prior", "guide")
DRAWS = 64


def program(opening: str, length: int, ending: str) -> None:
    """A text of up to ``length`` tokens between an opening and an ending. Its length is rewarded, as the
    trained guide would otherwise write nothing."""
    middle = lm_sample("middle", opening, max_tokens=length)
    pyro.factor("length", torch.tensor(4.0 * len(middle.token_ids)))
    lm_sample("ending", [opening, middle], obs=ending)


def row(lm: lmppl.LM, drawn_by: str, length: int, steps: int, draws: int = DRAWS) -> dict[str, Any]:
    """The figures of texts that the program or a guide draws."""
    args, guide = (OPENING, length, ENDING), None
    history: list[float] = []
    if drawn_by == "guide":
        guide = lmppl.LMGuide(program, lm=lm)
        guide.fit([args], steps=steps, batch_size=16, truncations=0, seed=0, progress=False)
        history = guide.history.column("mismatch")
    options: dict[str, Any] = {"method": "importance", "num_samples": draws, "seed": 0}
    with logging_draws() as log:
        lmppl.infer(program, *args, lm=lm, guide=guide, progress=False, **options)
    found = mismatches(log.texts, guide, "float32", most_tokens=draws * length)
    return {
        "dtype": str(lm.dtype).removeprefix("torch."),
        "drawn_by": drawn_by,
        "length": length,
        "steps": len(history),
        "mismatch": {pair: dataclasses.asdict(one) for pair, one in found.items()},
        "in_training": sum(history) / len(history) if history else None,
        "machine": machine(lm.device),
        "model": lm.name,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as Markdown, in the order of their dtype, who drew them and their length."""
    lines = [
        "| dtype | drawn by | tokens (at most) | as scored: per token | largest | per text | ESS left "
        "| in float32: per token | ESS left |",
        "| --- | --- |" + " ---: |" * 7,
    ]
    order = {name: place for place, name in enumerate(("float32", "bfloat16", *DRAWN_BY))}

    def place(one: dict[str, Any]) -> tuple[int, int, int]:
        return order.get(one["dtype"], len(order)), order[one["drawn_by"]], one["length"]

    for one in sorted(rows, key=place):
        scored, exact = (one["mismatch"][pair] for pair in ("drawn, scored", "drawn, float32"))
        cells = [
            one["dtype"],
            one["drawn_by"],
            f"{scored['num_tokens'] / scored['num_texts']:.0f} ({one['length']})",
            *(f"{scored[key]:.2g}" for key in ("per_token", "largest", "per_text_stdev")),
            f"{scored['ess_fraction']:.1%}",
            f"{exact['per_token']:.2g}",
            f"{exact['ess_fraction']:.1%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--drawn-by", nargs="+", default=DRAWN_BY, choices=DRAWN_BY)
    parser.add_argument("--lengths", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--steps", type=int, default=10, help="of the guide's training")
    parser.add_argument("--out", type=Path, help="JSON file of rows; those in it are kept")
    options = parser.parse_args()
    rows = json.loads(options.out.read_text()) if options.out and options.out.exists() else []
    for dtype in options.dtype:
        lm = lmppl.LM.from_pretrained(options.model, dtype=dtype)
        for drawn_by in options.drawn_by:
            for length in options.lengths:
                key = dtype, drawn_by, length
                if key in [(r["dtype"], r["drawn_by"], r["length"]) for r in rows]:
                    continue
                rows.append(row(lm, drawn_by, length, options.steps))
                print(json.dumps(rows[-1]), flush=True)
                if options.out:
                    write_text(options.out, json.dumps(rows, indent=1) + "\n")
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
