"""A random number: a language model that should draw uniformly, and a guide that learns to.

    python examples/random_number.py --quick                       # before and after, in 2 minutes
    python examples/random_number.py --method all --seeds 3 --out random_number.json
    python examples/random_number.py --most 999

Asked for a random integer between 0 and 100, the model writes a number in one of seven draws, and then
mostly the same few. The program keeps what is a number, and makes the model's own taste count for
nothing: its posterior is uniform, and its evidence the number of numbers, 101. That is known exactly,
and so is what each method draws: the probabilities of all the numbers are computed, nothing is counted.

"prior" is the model itself, "low_temperature" the same at --temperature; the others train a guide:
"guide" by the default loss, and from the numbers among --first draws of the model, "sft" by
maximum likelihood on 10,000 draws of the uniform distribution itself, the others as lmppl.losses says;
all at about the same number of language-model tokens. Expect a guide that draws a number 99.9 times in
100 or more, and each with nearly the same probability, and ppo to draw numbers, but not all.
"""

from __future__ import annotations

import functools
import math
import random
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from pyro import poutine

import lmppl
from lmppl import lm_sample, require
from lmppl.guides.scoring import score_latents
from lmppl.report.tables import Table, as_text
from paper.command import Run, Task, positive
from paper.evaluation import held_out
from paper.inputs import BadInput, check_fits
from paper.rows import Column, Row
from paper.training import Trainer

PROMPT = "The following is a random integer drawn uniformly between 0 and {most}: "


def random_number(most: int = 100) -> lmppl.Text:
    """Uniform over the numbers from 0 to ``most``, as the model writes them, with a full stop."""
    with poutine.scale(scale=1e-6):  # p(z) ** 1e-6: all texts are nearly equally good
        z = lm_sample("z", PROMPT.format(most=most), max_tokens=len(str(most)) + 1, stop=".")
    require("a number", z in numbers(most))
    return z


def colder(most: int, temperature: float) -> None:
    """The model at another temperature, as a proposal."""
    prompt, max_tokens = PROMPT.format(most=most), len(str(most)) + 1
    lm_sample("z", prompt, max_tokens=max_tokens, stop=".", temperature=temperature)


@functools.cache
def numbers(most: int) -> tuple[str, ...]:
    """What the program accepts: canonical decimals, with the full stop that ends the text."""
    return tuple(f"{number}." for number in range(most + 1))


def check_unique(lm: lmppl.LM, texts: Sequence[str]) -> None:
    """Check that each text is written by exactly one token sequence: only then is a uniform law over
    sequences one over numbers. All ways to spell a text by the vocabulary's tokens are counted."""
    vocabulary = lm.vocabulary
    tokens = Counter(vocabulary.token_bytes(token) for token in range(vocabulary.size))
    for text in texts:
        spelled = text.encode()
        ways = [1] + [0] * len(spelled)  # of the first k bytes
        for end in range(1, len(ways)):
            ways[end] = sum(ways[start] * tokens[spelled[start:end]] for start in range(end))
        if ways[-1] != 1:
            raise BadInput(
                f"{lm.name!r} can write {text!r} by {ways[-1]} token sequences, so a uniform law over "
                "sequences is none over numbers: take a model that has one token for each digit"
            )


def law(guide: Any, args: tuple[Any, ...], lm: lmppl.LM, texts: Sequence[str]) -> dict[str, Any]:
    """What a proposal draws, exactly: its probability of each number (``probabilities``), their sum
    (``valid``), and the KL divergence (nats) of the normalised ones from the uniform law (``kl``)."""
    with lmppl.use(lm):
        scores = score_latents(guide, random_number, args, [{"z": text} for text in texts])
    log_q, log_valid = scores.log_q, torch.logsumexp(scores.log_q, 0)
    kl = float(((log_q - log_valid).exp() * (log_q - log_valid)).sum()) + math.log(len(texts))
    return {
        "valid": float(log_valid.exp()),
        "kl": kl,
        "exact_log_z": float(torch.logsumexp(scores.log_joint, 0)),
        "probabilities": [float(f"{p:.5g}") for p in log_q.exp().tolist()],
    }


def trainer(run: Run, texts: Sequence[str]) -> Trainer:
    """All methods see one input, whose posterior is known."""
    args = run.args
    batch = {"batch_size": args.batch_size}
    drawn = random.Random(0).choices(texts, k=args.steps * args.batch_size)
    options: dict[str, dict[str, Any]] = dict.fromkeys(("guide", "ppo", "elbo", "wake"), batch)
    options["sft"] = {**batch, "demonstrations": [[{"z": text} for text in drawn]]}

    def found_by_chance(seed: int) -> dict[str, Any]:
        """The numbers among some draws of the model, for the guide to begin with. Without them it may
        lose "100.", which no other number leads to: the model writes it once in 500 draws, and a
        guide that has learned that "10" is followed by a full stop no more."""
        drawn = lmppl.infer(
            random_number, args.most, lm=run.lm, method="importance", seed=seed,
            num_samples=args.first, progress=False,
        )  # fmt: skip
        pairs = zip(drawn["z"], drawn.weights.tolist(), strict=True)
        found = sorted({str(z) for z, weight in pairs if weight > 0})
        return {"demonstrations": [[{"z": text} for text in found]]}

    return Trainer(
        lambda: lmppl.LMGuide(random_number, lm=run.lm),
        [(args.most,)],
        options,
        args.steps,
        found_by_chance,
    )


def measure(run: Run) -> dict[str, Any]:
    """The exact law of a method, and its draws as a proposal."""
    most, texts = run.args.most, numbers(run.args.most)
    check_fits(run.lm, [PROMPT.format(most=most)], len(str(most)) + 1)
    run.once("tokens", lambda: check_unique(run.lm, texts))
    guide: Any = None
    if run.method == "low_temperature":
        guide = lambda most: colder(most, run.args.temperature)  # noqa: E731
    elif run.method != "prior":
        guide = run.train(lambda: trainer(run, texts))
    found = law(guide, (most,), run.lm, texts)
    log_z = [(found["exact_log_z"], 0.0)]
    drawn = held_out(
        random_number, [(most,)], log_z, guide=guide, lm=run.lm, num_samples=run.args.samples,
        seed=run.seed,
    )  # fmt: skip
    names = ("ess", "agrees", "counted", "log_z", "log_z_stderr")
    return found | {name: drawn[name] for name in names}


def show(row: Row) -> None:
    """A histogram in the terminal."""
    probabilities = row.figures["probabilities"]
    width = 10 ** max(0, round(math.log10(len(probabilities))) - 1)  # of a bin: about ten of them
    bins = [probabilities[k : k + width] for k in range(0, len(probabilities), width)]
    longest = max(map(sum, bins))
    rows = [
        [f"{width * k} to {width * k + len(bin_) - 1}", f"{sum(bin_):.1%}", sum(bin_) / longest]
        for k, bin_ in enumerate(bins)
    ]
    figures = row.figures
    print(
        f"\n{row.method}: draws a number with probability {figures['valid']:.2%}; KL to uniform "
        f"{figures['kl']:.4f} nats\nlog Z by {row.settings['samples']:,} draws {figures['log_z']:.3f}"
        f" ± {figures['log_z_stderr']:.3f} (exact: log {len(probabilities):,} = "
        f"{math.log(len(probabilities)):.3f}), ESS {figures['ess']:.1%}"
    )
    print(as_text([Table([("numbers", "figure"), ("share", "figure"), ("", "bar")], rows)]))


def plot(rows: Sequence[Row]) -> Any:
    """The probabilities of the numbers, a panel a method, of its first seed."""
    from matplotlib.figure import Figure

    first = {row.method: row for row in reversed(rows)}
    methods = [method for method in TASK.methods if method in first]
    figure = Figure(figsize=(7, 1.3 * len(methods) + 0.5), layout="constrained")
    axes = figure.subplots(len(methods), 1, sharex=True, squeeze=False)[:, 0]
    for axis, method in zip(axes, methods, strict=True):
        probabilities = first[method].figures["probabilities"]
        axis.stairs(probabilities, fill=True, color="#1b6ca8")
        axis.axhline(1 / len(probabilities), color="#c8452c", lw=1)
        valid, kl = (first[method].figures[name] for name in ("valid", "kl"))
        axis.set_title(f"{method}: {valid:.1%} valid, KL {kl:.3f}", fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7)
    axes[-1].set_xlabel("number (red: uniform)", fontsize=8)
    return figure


TASK = Task(
    name="random_number",
    title="A uniform random number",
    methods=("prior", "guide", "low_temperature", "sft", "ppo", "elbo", "wake"),
    columns={
        "valid": Column("valid", ".2%", least=0.999),
        "kl": Column("KL to uniform", ".4f", most=0.002),
        "ess": Column("ESS", ".1%", least=0.5),
        "log_z": Column("log Z", ".3f"),
        "agrees": Column("agrees", ".0%"),
    },
    measure=measure,
    quick={"steps": 40, "samples": 256, "first": 512},
    show=show,
    plot=plot,
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = TASK.parser(__doc__)
    # 156 steps of 64 traces, a quarter of them replayed, are 7,500 draws. The probabilities of bfloat16
    # are too coarse for a KL below 0.002 nats.
    parser.set_defaults(steps=156, dtype="float32")
    parser.add_argument("--most", type=positive, default=100, help="the largest number")
    parser.add_argument(
        "--first", type=positive, default=2048, help="draws of the model before a guide's training"
    )
    parser.add_argument("--temperature", type=float, default=0.5, help="of low temperature")
    with warnings.catch_warnings():
        # The space at its end is a token of its own for models that split numbers into digits.
        warnings.filterwarnings("ignore", ".*its prefix ends in a space")
        TASK.main(parser, argv)


if __name__ == "__main__":
    main()
