"""Sentence continuation: whole sentences that are likelier than the model's own draws, and yet differ.

    python examples/continuation.py --quick                        # 2 minutes
    python examples/continuation.py --method all --out continuation.json --plot continuation.svg
    python examples/continuation.py --prompts openings.txt --temperature 0.9

The target is the law of whole continuations at a temperature, p(z | prompt) ** (1 / T). Lowering the
temperature of each token is another law: it can't tell a good beginning that leads nowhere from one that
leads to a good end. Methods are compared on prompts that no guide was trained on, the last --held-out
ones, by what K = --draws texts of each are worth, and 5 K of them:

- "best": the log-probability (nats) of the likeliest of them under the language model;
- "diversity": 1 - the mean cosine of two texts' embeddings by all-MiniLM-L6-v2;
- "whole": the share of the K texts that end as sentences do, and not for their length or by an EOS.

"prior" draws from the model (ancestral sampling), "low_temperature" at T, token by token, "nucleus"
among the tokens that have 90% of the probability; "greedy", "beam" and "diverse_beam" search, with as
many beams as texts; "mcmc" and the guides aim at the target. "guide" is trained by the
default loss, the others as lmppl.losses says, at the same number of language-model tokens; "sft" by
maximum likelihood on draws of "low_temperature" that are resampled by their weights. A method that has
a density is also judged as a proposal: its ESS, and the KL divergence to the target.

Expect beams to find the likeliest texts, and those to be all alike; and a guide with several times the
ESS of the prior.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pyro import poutine

import lmppl
from lmppl import lm_sample
from lmppl.guides.scoring import score_latents
from lmppl.lm.tokens.stopping import Stopping
from lmppl.runtime import nth_seed
from paper import decoding
from paper.command import Run, Task, above_0, positive, several, share
from paper.evaluation import PROPOSAL_COLUMNS, held_out, log_z_by_runs
from paper.inputs import check_fits, lines_of, split
from paper.rows import Column, Row, groups_of
from paper.similarity import Encoder, diversity
from paper.training import LOSSES, Trainer

OPENINGS = Path(__file__).parent / "data" / "openings.txt"
ENDS = (".", "!", "?")
COLOURS, MARKERS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7"), "os^"
TIMES = 5  # so many times the texts, for the second pair of figures
PROPOSALS = ("prior", "low_temperature", *LOSSES)  # methods whose draws have a density

Input = tuple[str, float, int]
Texts = tuple[list[lmppl.Text], list[lmppl.Text]]  # K, and TIMES K


def continuation(prompt: str, temperature: float = 0.8, max_tokens: int = 16) -> lmppl.Text:
    """The rest of a sentence, p(z | prompt) ** (1 / temperature)."""
    with poutine.scale(scale=1 / temperature):
        return lm_sample("z", prompt, max_tokens=max_tokens, stop=ENDS)


def token_temperature(prompt: str, temperature: float, max_tokens: int) -> None:
    """The model at that temperature token by token, as a proposal."""
    lm_sample("z", prompt, max_tokens=max_tokens, stop=ENDS, temperature=temperature)


def inputs_of(run: Run) -> tuple[list[Input], list[Input]]:
    """The program's arguments on the prompts to train on and on the held-out ones."""
    args, path = run.args, run.args.prompts or OPENINGS
    prompts = lines_of(path)
    check_fits(run.lm, prompts, args.max_tokens)
    found = [(prompt, args.temperature, args.max_tokens) for prompt in prompts]
    return split(found, args.held_out, str(path))


def reference(run: Run, input_: Input) -> tuple[float, float]:
    """log Z without any guide: draws at the temperature, and the model's own among them, so that no
    weight is more than four times what the model's draw would have."""
    return log_z_by_runs(
        continuation, input_, lm=run.lm, guide=token_temperature, prior_fraction=0.25,
        num_samples=run.args.reference,
    )  # fmt: skip


def trainer(run: Run, training: Sequence[Input]) -> Trainer:
    """All methods see the same prompts."""
    args = run.args
    batch = {"batch_size": args.batch_size}
    options: dict[str, dict[str, Any]] = dict.fromkeys(("guide", "ppo", "elbo", "wake"), batch)
    if {"sft", "all"} & set(args.method):
        draws = lmppl.infer_batch(
            continuation, training, lm=run.lm, method="importance", guide=token_temperature,
            num_samples=64, seed=0,
        )  # fmt: skip
        options["sft"] = {**batch, "demonstrations": list(draws)}
    new_guide = lambda: lmppl.LMGuide(continuation, lm=run.lm)  # noqa: E731
    return Trainer(new_guide, training, options, args.steps)


def texts_of(run: Run, inputs: Sequence[Input], proposal: Any) -> list[Texts]:
    """K texts of each prompt by the run's method, and ``TIMES`` as many."""
    args, num = run.args, TIMES * run.args.draws
    options: dict[str, Any] = {"method": "importance", "guide": proposal}
    if run.method == "mcmc":
        options = {"method": "mcmc", "proposal_temperature": args.temperature}
        options |= {"num_chains": args.draws, "num_starts": 2 * args.draws}
        options |= {"warmup": args.warmup, "thin": args.thin}
    elif run.method not in PROPOSALS:
        return [
            _decoded(run, prompt, nth_seed(run.seed, i)) for i, (prompt, *_) in enumerate(inputs)
        ]
    drawn = lmppl.infer_batch(
        continuation, inputs, lm=run.lm, num_samples=num, seed=run.seed, **options
    )
    return [(posterior["z"][::TIMES], posterior["z"]) for posterior in drawn]


def _decoded(run: Run, prompt: str, seed: int) -> Texts:
    """The texts of one prompt by a method of transformers; a search for more of them is another one."""
    args, lm, num = run.args, run.lm, TIMES * run.args.draws
    site = Stopping(lm.vocabulary, ENDS, args.max_tokens)
    if run.method == "nucleus":
        texts = decoding.nucleus(lm, prompt, site, num, args.top_p, seed)
        return texts[::TIMES], texts
    if run.method == "greedy":
        texts = [decoding.greedy(lm, prompt, site)] * num
        return texts[::TIMES], texts
    if run.method == "beam":
        search = partial(decoding.beams, lm, prompt, site)
    else:
        search = partial(decoding.diverse_beams, lm, prompt, site, penalty=args.penalty)
    return search(num=args.draws), search(num=num)


def worth(run: Run, encoder: Encoder, input_: Input, texts: Texts) -> dict[str, float]:
    """The figures of a method's texts of one prompt."""
    few, more = texts
    with lmppl.use(run.lm):
        scores = score_latents(
            None, continuation, input_, [{"z": text} for text in (*few, *more)]
        ).log_prior
    return {
        "best": float(scores[: len(few)].max()),
        "diversity": diversity(encoder.sentences(few)),
        "best_more": float(scores[len(few) :].max()),
        "diversity_more": diversity(encoder.sentences(more)),
        "whole": statistics.fmean(text.finish_reason == "stop" for text in few),
    }


def measure(run: Run) -> dict[str, Any]:
    """Figures of a method's texts and, if it has a density, of it as a proposal."""
    encoder = run.once("encoder", lambda: Encoder.load("diversity"))
    training, inputs = run.once("inputs", lambda: inputs_of(run))
    proposal: Any = None
    if run.method == "low_temperature":
        proposal = token_temperature
    elif run.method in LOSSES:
        proposal = run.train(lambda: trainer(run, training))
    texts = texts_of(run, inputs, proposal)
    each = [worth(run, encoder, *pair) for pair in zip(inputs, texts, strict=True)]
    found: dict[str, Any] = {name: statistics.fmean(one[name] for one in each) for name in each[0]}
    if run.method in PROPOSALS:
        log_z = run.log_z(
            lambda: [reference(run, input_) for input_ in inputs],
            "prompts held_out temperature max_tokens reference",
        )
        found |= held_out(
            continuation, inputs, log_z, guide=proposal, lm=run.lm, num_samples=run.args.samples,
            seed=run.seed,
        )  # fmt: skip
    return found | {"example": [inputs[0][0], *map(str, texts[0][0][:3])]}


def show(row: Row) -> None:
    """Some texts of the first held-out prompt."""
    prompt, *texts = row.figures["example"]
    print(f"\n{row.method}: {prompt} ...")
    for text in texts:
        print("   ...", *text.split())


def plot(rows: Sequence[Row]) -> Any:
    """Best log p against diversity: a line a method, from K texts (open) to more of them (filled)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axis = figure.subplots()
    for group in groups_of(rows):
        means = {name: group.mean(name) for name in COLUMNS}
        x, y = [means["diversity"], means["diversity_more"]], [means["best"], means["best_more"]]
        # The same in all pictures: each of the methods has a colour and a marker.
        number = TASK.methods.index(group.method)
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number // len(COLOURS)]
        axis.plot(x, y, "-", color=colour, lw=1)
        axis.plot(x[:1], y[:1], marker, mfc="white", mec=colour, ms=6)
        axis.plot(x[1:], y[1:], marker, color=colour, ms=6, label=group.method)
    axis.set_xlabel("diversity: 1 - mean cosine of sentence embeddings")
    axis.set_ylabel("log p of the best text (nats)")
    axis.set_title(f"K texts (open) and {TIMES} K (filled)", fontsize=9, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    for label in figure.legend(loc="outside right upper", frameon=False, fontsize=9).get_texts():
        label.set_weight("bold" if label.get_text() == "guide" else "normal")
    return figure


COLUMNS = {
    "best": Column("best", ".2f"),
    "diversity": Column("diversity", ".3f"),
    "best_more": Column(f"best {TIMES}x", ".2f"),
    "diversity_more": Column(f"diversity {TIMES}x", ".3f"),
    "whole": Column("whole", ".0%"),
    **PROPOSAL_COLUMNS,
}

TASK = Task(
    name="continuation",
    title="Sentence continuation",
    methods=(
        "prior", "low_temperature", "nucleus", "greedy", "beam", "diverse_beam", "mcmc", "guide",
        "sft", "ppo", "elbo", "wake",
    ),
    columns=COLUMNS,
    measure=measure,
    quick={
        "steps": 12, "batch_size": 16, "held_out": 3, "samples": 64, "reference": 32, "draws": 6,
        "warmup": 8, "thin": 1, "max_tokens": 12,
    },
    show=show,
    plot=plot,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = TASK.parser(__doc__)
    parser.set_defaults(steps=300, batch_size=32)
    add = parser.add_argument
    add("--prompts", type=Path, help="a file of them, one a line; by default 60 that are here")
    add("--held-out", type=positive, default=12, help="prompts at its end, not trained on")
    add("--temperature", type=above_0, default=0.8, help="T: the target is p ** (1 / T)")
    add("--max-tokens", type=positive, default=16, help="of a text")
    add("--draws", type=several, default=20, help="texts of each prompt, K")
    add("--reference", type=several, default=128, help="draws for log Z; 8 times as many in all")
    add("--top-p", type=share, default=0.9, help="of nucleus sampling")
    add("--penalty", type=above_0, default=1.0, help="of diverse beams, nats")
    add("--warmup", type=positive, default=30, help="moves of a chain before its first draw")
    add("--thin", type=positive, default=5, help="moves from one of its draws to the next")
    TASK.main(parser, argv)


if __name__ == "__main__":
    main()
