"""Infilling: a story's beginning and its ending are given; what happened in between?

    python examples/infilling.py --quick                          # 2 minutes
    python examples/infilling.py --method all --out infilling.json
    python examples/infilling.py --stories stories.tsv --seeds 3
    python examples/infilling.py --stories examples/data/mentions.tsv --max-tokens 3 --steps 150

The model writes a sentence after the beginning, and the ending after both; the ending is observed. A
guide is trained on many stories, without their middles, and then proposes middles for the last
--held-out ones. A method is judged by its --draws middles of each of these:

- "log joint": log p(middle, ending | beginning) under the language model, nats;
- "BLEU-4", "GLEU": words shared with the true middle; "similarity": BERTScore's F1 with it, by the
  states of all-MiniLM-L6-v2 (figures by other models can't be compared with it);

and if its draws have a density, as a proposal: ESS, and the KL divergence to the posterior.

"prior" writes on from the beginning. "words" is asked for a story with that ending, and writes on from
the beginning of its answer. "importance" resamples the prior's draws; the texts of "smc" are compared
by what the ending is worth, each time that they have grown by --twist-every tokens; "mcmc" rewrites.
"guide" is trained by the default loss, the others as lmppl.losses says, at the same number of
language-model tokens; "sft" by maximum likelihood on the true middles.

Expect importance, smc and mcmc to find middles with a log joint that is higher than the prior's by
several nats. A model of 135 million parameters learns little of infilling from a few dozen stories: its
guide needs more of them, and more steps, than are here by default. In examples/data/mentions.tsv the
middle is a thing that the ending mentions again ("At the market she bought a ... She put the lamp into
her bag."), which a small model can learn to look up: expect many times the prior's ESS there.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lmppl
from lmppl import lm_sample
from lmppl.guides.scoring import score_latents
from lmppl.lm.tokens.stopping import Stopping
from lmppl.primitives import default_lm
from lmppl.runtime import nth_seed
from paper.command import Run, Task, positive, several
from paper.evaluation import PROPOSAL_COLUMNS, held_out, log_z_by_runs
from paper.inputs import BadInput, check_fits, numbered_lines, package, split
from paper.rows import Column, Row
from paper.similarity import Encoder, matching, overlap
from paper.training import LOSSES, Trainer

STORIES = Path(__file__).parent / "data" / "stories.tsv"
ENDS = (".", "!", "?")
REQUEST = "Write a story in three short sentences. The last one is: {ending}"
PROPOSALS = ("prior", "words", *LOSSES)  # methods whose draws have a density
FIELDS = ("beginning", "middle", "ending")
_AROUND = 80  # tokens of a request, and of a chat template around it

Input = tuple[str, str, int]


def infilling(beginning: str, ending: str, max_tokens: int = 20) -> lmppl.Text:
    """p(z | beginning) p(ending | beginning, z): one sentence, and then the ending."""
    z = lm_sample("z", beginning, max_tokens=max_tokens, stop=ENDS)
    lm_sample("ending", [beginning, z], obs=ending)
    return z


def in_words(beginning: str, ending: str, max_tokens: int) -> None:
    """The model that is told what the story comes to, as a proposal."""
    asked = REQUEST.format(ending=ending.strip())
    lm = default_lm()
    prefix: Any = [asked + "\n", beginning]
    if getattr(lm.tokenizer, "chat_template", None):
        prefix = [lmppl.chat([{"role": "user", "content": asked}]), beginning]
    lm_sample("z", prefix, max_tokens=max_tokens, stop=ENDS)


# --- stories -------------------------------------------------------------------------------------


class Story(NamedTuple):
    """A story in three parts, of a line of a file; the later two begin with a space, as they follow
    others."""

    line: int
    beginning: str
    middle: str
    ending: str


def stories_of(path: Path) -> list[Story]:
    """The stories of a file, one a line: JSON with ``FIELDS`` if its name ends in ``.jsonl``, else three
    columns with tabs between them.

    Raises:
        BadInput: if there is no such file, or a line is none; says which and why.
    """
    stories = []
    for number, line in numbered_lines(path):
        try:
            parts = _fields(line) if path.suffix == ".jsonl" else line.split("\t")
        except ValueError:
            raise BadInput(f"{path}, line {number} is no JSON: {line[:60]!r}") from None
        parts = [part.strip() for part in parts if isinstance(part, str) and part.strip()]
        if len(parts) != len(FIELDS):
            raise BadInput(
                f"{path}, line {number}: a story has three texts, {', '.join(FIELDS)} (columns "
                "with tabs between them, or fields of JSON in a .jsonl file); here are "
                f"{len(parts)}: {line[:60]!r}"
            )
        beginning, middle, ending = parts
        stories.append(Story(number, beginning, " " + middle, " " + ending))
    return stories


def _fields(line: str) -> list[Any]:
    """What a line of JSON says."""
    story = json.loads(line)
    return [story.get(name) for name in FIELDS] if isinstance(story, dict) else []


def data_of(run: Run) -> tuple[list[Story], list[Story]]:
    """The stories to train on and the held-out ones, all of which the program can write."""
    args, lm, path = run.args, run.lm, run.args.stories or STORIES
    stories = stories_of(path)
    whole = [story.beginning + 2 * story.ending for story in stories]  # a prompt, and what follows
    check_fits(lm, whole, args.max_tokens + _AROUND)
    site = Stopping(lm.vocabulary, ENDS, args.max_tokens)
    for story in stories:
        try:
            lm.encode_observed(story.middle, site)
        except ValueError as error:
            raise BadInput(
                f"{path}, line {story.line}: the middle is no sentence that the program can "
                f"write: {error}"
            ) from error
    return split(stories, args.held_out, str(path))


def input_of(run: Run, story: Story) -> Input:
    """The program's arguments."""
    return story.beginning, story.ending, run.args.max_tokens


# --- what is measured ----------------------------------------------------------------------------


def reference(run: Run, input_: Input) -> tuple[float, float]:
    """log Z without any guide: half of the draws are asked for in words, half are the model's own."""
    return log_z_by_runs(
        infilling, input_, lm=run.lm, guide=in_words, prior_fraction=0.5,
        num_samples=run.args.reference,
    )  # fmt: skip


def trainer(run: Run, training: Sequence[Story]) -> Trainer:
    """All methods see the same stories, sft with their middles."""
    batch = {"batch_size": run.args.batch_size}
    options: dict[str, dict[str, Any]] = dict.fromkeys(("guide", "ppo", "elbo", "wake"), batch)
    options["sft"] = {**batch, "demonstrations": [{"z": story.middle} for story in training]}
    new_guide = lambda: lmppl.LMGuide(infilling, lm=run.lm)  # noqa: E731
    return Trainer(new_guide, [input_of(run, story) for story in training], options, run.args.steps)


def middles_of(run: Run, inputs: Sequence[Input], proposal: Any) -> list[list[lmppl.Text]]:
    """--draws middles of each story by the run's method."""
    args = run.args
    common: dict[str, Any] = {"lm": run.lm, "seed": run.seed}
    if run.method == "smc":
        options: dict[str, Any] = {"method": "smc", "twist": "lookahead"}
        options |= {"twist_every": args.twist_every, "num_samples": args.particles}
    elif run.method == "mcmc":
        options = {"method": "mcmc", "num_chains": args.draws, "num_samples": args.draws}
        options |= {"num_starts": args.samples, "warmup": args.warmup, "thin": 1}
    else:
        num = args.samples if run.method == "importance" else args.draws
        options = {"method": "importance", "guide": proposal, "num_samples": num}
    found = list(lmppl.infer_batch(infilling, inputs, **options, **common))
    if run.method in ("importance", "smc"):
        found = [p.resample(args.draws, nth_seed(run.seed, i)) for i, p in enumerate(found)]
    return [posterior["z"] for posterior in found]


def judged(
    run: Run, encoder: Encoder, stories: Sequence[Story], middles: Sequence[list[lmppl.Text]]
) -> dict[str, float]:
    """Their figures beside the true middles."""
    log_joints, similarities = [], []
    for story, texts in zip(stories, middles, strict=True):
        with lmppl.use(run.lm):
            latents = [{"z": text} for text in texts]
            scores = score_latents(None, infilling, input_of(run, story), latents)
        log_joints += scores.log_joint.tolist()
        truth, *states = encoder.tokens([story.middle, *texts])
        similarities += [matching(of_text, truth) for of_text in states]
    written = [str(text) for texts in middles for text in texts]
    true = [story.middle for story, texts in zip(stories, middles, strict=True) for _ in texts]
    return {
        "log_joint": statistics.fmean(log_joints),
        **overlap(written, true, "BLEU-4"),
        "similarity": statistics.fmean(similarities),
    }


def measure(run: Run) -> dict[str, Any]:
    """Figures of a method's middles and, if it has a density, of it as a proposal."""
    encoder = run.once("encoder", lambda: Encoder.load("similarity"))
    package("nltk", "nltk", "BLEU-4")
    training, stories = run.once("data", lambda: data_of(run))
    inputs = [input_of(run, story) for story in stories]
    proposal: Any = None
    if run.method == "words":
        proposal = in_words
    elif run.method in LOSSES:
        proposal = run.train(lambda: trainer(run, training))
    middles = middles_of(run, inputs, proposal)
    found: dict[str, Any] = judged(run, encoder, stories, middles)
    if run.method in PROPOSALS:
        log_z = run.log_z(
            lambda: [reference(run, input_) for input_ in inputs],
            "stories held_out max_tokens reference",
        )
        found |= held_out(
            infilling, inputs, log_z, guide=proposal, lm=run.lm, num_samples=run.args.samples,
            seed=run.seed,
        )  # fmt: skip
    story = stories[0]
    return found | {"example": [story.beginning, story.ending, *map(str, middles[0][:3])]}


def show(row: Row) -> None:
    """Some middles of the first held-out story."""
    beginning, ending, *middles = row.figures["example"]
    print(f"\n{row.method}: {beginning} ...{ending}")
    for middle in middles:
        print("   ", *middle.split())


TASK = Task(
    name="infilling",
    title="Infilling of stories",
    methods=(
        "prior", "words", "importance", "smc", "mcmc", "guide", "sft", "ppo", "elbo", "wake",
    ),
    columns={
        "log_joint": Column("log joint", ".2f"),
        "bleu": Column("BLEU-4", ".3f"),
        "gleu": Column("GLEU", ".3f"),
        "similarity": Column("similarity", ".3f"),
        **PROPOSAL_COLUMNS,
    },
    measure=measure,
    quick={
        "steps": 10, "batch_size": 16, "held_out": 3, "samples": 48, "reference": 24, "draws": 6,
        "particles": 16, "twist_every": 4, "warmup": 8, "max_tokens": 16,
    },
    show=show,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = TASK.parser(__doc__)
    parser.set_defaults(batch_size=32)
    add = parser.add_argument
    add("--stories", type=Path, help="a file of them, one a line; by default 60 that are here")
    add("--held-out", type=positive, default=12, help="stories at its end, not trained on")
    add("--max-tokens", type=positive, default=20, help="of a middle")
    add("--draws", type=positive, default=16, help="middles of each story that are judged")
    add("--reference", type=several, default=512, help="draws for log Z; 8 times as many in all")
    add("--particles", type=positive, default=128, help="of smc")
    add("--twist-every", type=positive, default=2, help="tokens between its comparisons")
    add("--warmup", type=positive, default=50, help="moves of each chain of mcmc")
    TASK.main(parser, argv)


if __name__ == "__main__":
    main()
