"""Five small scenes: what a language model believes before, and what it believes after it was told more.

    python examples/demo.py                  # all of them, in less than a minute on a laptop's CPU
    python examples/demo.py --scene sum      # blank, sum, lipogram, reviews, steps

Each is a program of a few lines. It is run as it stands, then conditioned on something that is known,
and both beliefs stand side by side.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import torch

import lmppl
from lmppl import lm_sample, require, tool
from lmppl.report.tables import Block, Kind, Table, as_text
from paper.calculator import calculate

PRESENT = "For her birthday, Anna got a"
PRESENTS = [" cake", " car", " puppy", " book", " guitar", " camera", " bicycle"]


def present(after: str | None = None) -> lmppl.Text:
    """What Anna got, and the sentence after it."""
    thing = lm_sample("thing", PRESENT, choices=PRESENTS)
    if after is not None:
        lm_sample("after", [PRESENT, thing, "."], obs=after)
    return thing


def blank(seed: int) -> list[Block]:
    after = " It barked all night."
    exact = lmppl.infer(present, after, method="exact")
    sampled = lmppl.infer(
        present, after, method="importance", num_samples=200, seed=seed, progress=False
    )
    return [
        f"1. Fill a blank from what follows, exactly and by 200 samples.\n{PRESENT} ___.{after}",
        side_by_side(
            "thing",
            {
                "before": lmppl.infer(present, method="exact").probs("thing"),
                "exact": exact.probs("thing"),
                "sampled": sampled.probs("thing"),
            },
        ),
    ]


SUMS = "2 + 3 = 5\n9 - 1 = 8\n"


def sum_of(result: int | None = None) -> int:
    """A sum that the model makes up and a calculator computes."""
    terms = lm_sample("sum", SUMS, regex="[0-9] [+-] [0-9]", max_tokens=6)
    found = tool("result", calculate, terms)
    require("the result", result is None or found == result)
    return found


def sum_led_to(seed: int) -> list[Block]:
    before = lmppl.infer(sum_of, method="exact")
    after = lmppl.infer(sum_of, 7, method="exact")
    return [
        "2. Which sum led to 7? The model writes the sum, a calculator its result.\n"
        f"It is 7 with probability {before.probs(returns=True)[7]:.1%}.",
        side_by_side("sum", {"before": before.probs("sum"), "given a 7": after.probs("sum")}),
    ]


OPENING = "The old man walked into the bar and"
NUM_TOKENS = 14


def lipogram() -> str:
    """A text without the letter e, token by token."""
    parts: list[str] = [OPENING]
    for number in range(NUM_TOKENS):
        parts.append(lm_sample(f"token_{number}", parts, max_tokens=1))
        require(f"no e in {number}", "e" not in parts[-1])
    return "".join(parts[1:])


def without_e(seed: int) -> list[Block]:
    num = 64
    options: dict[str, Any] = {"num_samples": num, "seed": seed, "progress": False}
    rows = []
    for method in ("importance", "smc"):
        try:
            posterior = lmppl.infer(lipogram, method=method, **options)
        except lmppl.ZeroEvidenceError as error:
            posterior = error.posterior
        live = int(posterior.log_weights.isfinite().sum())
        texts = [repr(text) for text in posterior.probs(returns=True)] if live else ["none"]
        rows += [[method, f"{live} of {num}", texts[0]]]
        rows += [["", "", text] for text in texts[1:3]]
    columns: list[tuple[str, Kind]] = [
        ("method", "name"),
        ("alive", "figure"),
        (f"{OPENING} ...", "text"),
    ]
    return [
        f"3. {NUM_TOKENS} tokens without the letter e. Importance sampling draws whole texts, and\n"
        "nearly all break the rule; SMC drops a text when it does, and copies another in its place.",
        Table(columns, rows),
    ]


REVIEWS = [
    "I loved every minute of it.",
    "A waste of time and money.",
    "The best film I have seen this year.",
    "Wonderful acting and a great story.",
    "Charming and very funny.",
]


def critics(reviews: Sequence[str]) -> None:
    """What share of all critics loved a film, from what some of them wrote."""
    share = pyro.sample("share", dist.Beta(1.0, 1.0))
    for number, review in enumerate(reviews):
        loved = pyro.sample(f"loved_{number}", dist.Bernoulli(share))
        verb = "loved" if loved else "hated"
        prompt = f"The critic {verb} the film. The review says:"
        lm_sample(f"review_{number}", prompt, obs=f" {review}")


def share_of_critics(seed: int) -> list[Block]:
    posterior = lmppl.infer(
        critics, REVIEWS, method="importance", num_samples=1000, seed=seed, progress=False
    )
    share, weights = torch.tensor(posterior["share"]), posterior.weights
    edges = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    after = {
        f"{low:.0%} to {high:.0%}": float(weights[(share >= low) & (share < high)].sum())
        for low, high in pairwise(edges)
    }
    loved = [[r, f"{float(posterior.mean(f'loved_{k}')):.0%}"] for k, r in enumerate(REVIEWS)]
    return [
        "4. Statistics and text in one program: what share of critics loved the film?\n"
        "A Beta prior, a verdict of each critic, and five reviews as observations.",
        Table([("review", "text"), ("loved it", "figure")], loved),
        side_by_side("share", {"before": dict.fromkeys(after, 0.2), "after": after}, ranked=False),
    ]


QUESTION = "Question: Ben has 12 eggs and breaks 4. How many has he?\n"
WORKED = [
    ("Question: Tom has 8 apples and buys 5. How many has he?\n", "8 + 5 =", 13),
    ("Question: Eva has 9 pens and loses 2. How many has she?\n", "9 - 2 =", 7),
]


def eggs(in_steps: bool) -> lmppl.Text:
    """The answer at once, or after a step that the model writes and a calculator computes."""
    prefix: list[Any] = []
    for question, step, result in WORKED:
        prefix += [question + f"Step: {step} {result}\n" * in_steps + f"Answer: {result}.\n"]
    prefix += [QUESTION]
    if in_steps:
        prefix += ["Step:"]
        step = lm_sample("step", prefix, regex=r" [0-9]{1,2} [+-] [0-9]{1,2} =", max_tokens=10)
        prefix += [step, f" {tool('result', calculate, step)}\n"]
    return lm_sample("answer", [*prefix, "Answer:"], choices=[f" {n}" for n in range(31)], stop=".")


def step_by_step(seed: int) -> list[Block]:
    at_once = lmppl.infer(eggs, False, method="exact")
    options: dict[str, Any] = {"num_samples": 64, "seed": seed, "progress": False}
    steps = lmppl.infer(eggs, True, method="importance", **options)
    return [
        f"5. A latent step changes an answer (12 - 4 = 8).\n{QUESTION.strip()}",
        side_by_side(
            "answer", {"at once": at_once.probs("answer"), "in steps": steps.probs("answer")}
        ),
        side_by_side("step", {"share": steps.probs("step")}),
    ]


SCENES: dict[str, Callable[[int], list[Block]]] = {
    "blank": blank,
    "sum": sum_led_to,
    "lipogram": without_e,
    "reviews": share_of_critics,
    "steps": step_by_step,
}


def side_by_side(
    heading: str, beliefs: Mapping[str, Mapping[Any, float]], *, ranked: bool = True, most: int = 5
) -> Table:
    """Probabilities by value: a column of figures and one of bars for each belief. ``ranked``: the
    ``most`` likely of the last, and of the first, in the order of the last."""
    first, last = list(beliefs.values())[0], list(beliefs.values())[-1]
    values = list(last)
    if ranked:
        values = sorted(last, key=last.__getitem__, reverse=True)[:most]
        values += [
            v for v in sorted(first, key=first.__getitem__, reverse=True)[:2] if v not in values
        ]
    columns: list[tuple[str, Kind]] = [(heading, "name")]
    for name in beliefs:
        columns += [("", "figure"), (name, "bar")]
    rows = []
    for value in values:
        shares = [law.get(value, 0.0) for law in beliefs.values()]
        cells = [cell for share in shares for cell in (f"{share:.1%}", share)]
        rows.append([str(value).strip(), *cells])
    return Table(columns, rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--scene", choices=SCENES, nargs="+", default=list(SCENES))
    parser.add_argument("--model", default="smollm2-135m-instruct", help="any causal LM")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with lmppl.use(lmppl.LM.from_pretrained(args.model)):
        for name in args.scene:
            began = time.perf_counter()
            blocks = SCENES[name](args.seed)
            print(f"{as_text(blocks)}\n({time.perf_counter() - began:.0f} s)\n", flush=True)


if __name__ == "__main__":
    main()
