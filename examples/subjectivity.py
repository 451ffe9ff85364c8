"""Is a sentence about a film objective or subjective? A latent reason stands between it and its label.

    python examples/subjectivity.py --quick                        # few-shot and guide, in 2 minutes
    python examples/subjectivity.py --method all --labels 10 --out subjectivity.json
    python examples/subjectivity.py --data DIR                     # sentences of your own

The model writes a reason and then chooses a label. In training the label is observed, so "guide" learns
to write reasons after which the model chooses the right one (the E-step of Hu et al., 2024). Under "em"
an adapter of the model chooses the label, and learns from the reasons while the guide learns (the
M-step). At test time nobody sees the label: reasons are the guide's, labels the model's, and the label
of most of 10 such draws counts.

"zero_shot" and "few_shot" ask the model for the label at once, without and with worked examples. "sft"
trains the latter on the labels by maximum likelihood. "prior" takes the reasons from the model itself.

DIR has files of one JSON object a line: {"text": "a sentence .", "label": 0, "label_text": "objective"},
or 1 for "subjective"; "label_text" may be missing. They are train.jsonl and, if you like, train.N.jsonl
with the N sentences whose labels are known for --labels N (else the first N of train.jsonl), and
test.jsonl (else sentences of train.jsonl that are in no train.N.jsonl are held out).
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lmppl
from lmppl import lm_sample
from lmppl.guides.scoring import score_latents
from paper.command import Run, Task, positive
from paper.evaluation import PROPOSAL_COLUMNS, held_out, log_z_by_runs
from paper.inputs import BadInput, check_fits, numbered_lines
from paper.rows import Column, Row
from paper.training import Trainer, tokens
from paper.voting import VOTES, Shares, guided_shares, score, shares

LABELS = ("objective", "subjective")
CHOICES = (" the story", " an opinion")
"""What the model writes for them: it knows these words better."""
WORKED = (
    ("A cook leaves her village and opens a small restaurant in the city.",
     "tells what happens in the story", "objective"),
    ("The film is a mess, but a very funny one.",
     "says what the writer thinks of the film", "subjective"),
    ("The second half is so slow that even the actors look tired.",
     "says what the writer thinks of the film", "subjective"),
    ("Two brothers have not spoken for years when their father dies.",
     "tells what happens in the story", "objective"),
)  # fmt: skip
THIS, SO = "{sentence}\nThis sentence", " so it is"
SENTENCES = Path(__file__).parent / "data" / "sentences"
MOST_TOKENS = 16
MOST_LABELS = 10
"""Sentences in one step of "em"."""

Labelled = tuple[str, str]
"""A sentence and its label."""


def reasoned(sentence: str) -> list[str]:
    """p(reason | sentence), and what the label comes after."""
    text = [whole_prompt(sentence)]
    reason = lm_sample(
        "reason", text, max_tokens=MOST_TOKENS, stop=",", infer={"guide_prompt": text}
    )
    return [*text, reason, SO]


def chosen(*text: str, label: str | None = None, judge: lmppl.LM | None = None) -> str:
    """p(label | text), by the adapter ``judge`` if there is one."""
    choice = lm_sample("label", list(text), choices=CHOICES, obs=label, lm=judge)
    return LABELS[CHOICES.index(choice)]


def subjectivity(sentence: str, label: str | None = None, judge: lmppl.LM | None = None) -> str:
    """p(reason | sentence) p(label | sentence, reason)"""
    return chosen(*reasoned(sentence), label=label, judge=judge)


def direct(sentence: str, examples: int = len(WORKED)) -> str:
    """p(label | sentence), without a reason."""
    worked = [f"{sentence}\nIt is{choice_of(label)}.\n\n" for sentence, _, label in WORKED]
    return chosen(f"{''.join(worked[:examples])}{sentence}\nIt is")


def whole_prompt(sentence: str) -> str:
    """What a reason comes after: the worked examples and the sentence."""
    worked = [
        f"{THIS.format(sentence=sentence)} {reason},{SO}{choice_of(label)}.\n\n"
        for sentence, reason, label in WORKED
    ]
    return "".join(worked) + THIS.format(sentence=sentence)


def choice_of(label: str) -> str:
    """What the model writes for a label."""
    return CHOICES[LABELS.index(label)]


# --- sentences -----------------------------------------------------------------------------------


def read(path: Path) -> list[Labelled]:
    """The sentences of a file with their labels.

    Raises:
        BadInput: if there is none, or a line is not as it should be; names file and line.
    """
    found = []
    for number, line in numbered_lines(path):
        try:
            found.append(_labelled(json.loads(line)))
        except ValueError as error:
            raise BadInput(f"{path}, line {number}: {error}") from error
    return found


def _labelled(row: Any) -> Labelled:
    if not isinstance(row, dict) or not {"text", "label"} <= row.keys():
        raise ValueError('it should be {"text": "a sentence", "label": 0 or 1}')
    text, label = row["text"], row["label"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'"text" is {text!r}: it should be a sentence')
    if type(label) is not int or label not in (0, 1):
        raise ValueError(f'"label" is {label!r}: it should be 0 (objective) or 1 (subjective)')
    if row.get("label_text", LABELS[label]) != LABELS[label]:
        raise ValueError(
            f'"label_text" is {row["label_text"]!r}, but label {label} is {LABELS[label]}'
        )
    return " ".join(text.split()), LABELS[label]


def load(folder: Path, num_labels: int, num_test: int) -> tuple[list[Labelled], list[Labelled]]:
    """Sentences whose labels are known, and held-out ones, which are the same for any number of labels
    that has a file, and have no sentence in common with the others.

    Raises:
        BadInput: if a file is bad, or there are too few.
    """
    everything, own = read(folder / "train.jsonl"), folder / f"train.{num_labels}.jsonl"
    train = read(own) if own.exists() else everything[:num_labels]
    if len(train) < num_labels:
        raise BadInput(f"{folder} has {len(train)} labels, --labels {num_labels} needs more")
    used = {text for text, _ in train}
    if (folder / "test.jsonl").exists():
        rest = read(folder / "test.jsonl")
    else:
        for path in sorted(folder.glob("train.*.jsonl")):
            used |= {text for text, _ in read(path)}
        rest = sorted(set(everything))
    test = [one for one in rest if one[0] not in used]
    random.Random(0).shuffle(test)
    if not test:
        raise BadInput(f"{folder} has no sentence that is held out: give it a test.jsonl")
    return train[:num_labels], test[:num_test]


# --- methods -------------------------------------------------------------------------------------


def observed(one: Labelled) -> tuple[str, str]:
    """The program's arguments in training."""
    sentence, label = one
    return sentence, choice_of(label)


def reasons_guide(run: Run, program: Callable[..., Any] = subjectivity) -> lmppl.LMGuide:
    return lmppl.LMGuide(program, lm=run.lm, condition_on=[])


def learn_labels(run: Run, train: Sequence[Labelled]) -> lmppl.LMGuide:
    """An adapter that writes the labels at once: "sft"."""
    guide = lmppl.LMGuide(direct, lm=run.lm)
    before, began = tokens(run.lm), time.perf_counter()
    guide.fit(
        [(sentence,) for sentence, _ in train],
        demonstrations=[{"label": choice_of(label)} for _, label in train],
        loss="sft", steps=run.args.steps, batch_size=min(run.args.batch_size, len(train)), seed=run.seed,
    )  # fmt: skip
    run.training = cost(run.args.steps, tokens(run.lm) - before, began)
    return guide


def learn_both(run: Run, train: Sequence[Labelled]) -> tuple[lmppl.LMGuide, lmppl.LM]:
    """A guide, and the adapter that chooses the label after its reasons: by "em"."""
    judge = run.lm.adapter()
    guide = reasons_guide(run, partial(subjectivity, judge=judge))
    # The labels teach the adapter, so each step has as many as it can, and few reasons for each.
    steps, inputs = run.args.steps, min(MOST_LABELS, len(train))
    before, began = tokens(run.lm), time.perf_counter()
    lmppl.learn(
        guide, list(map(observed, train)), steps=steps, guide_steps=1, num_samples=2,
        inputs_per_step=inputs, batch_size=2 * inputs, seed=run.seed,
    )  # fmt: skip
    run.training = cost(steps, tokens(run.lm) - before, began)
    return guide, judge


def cost(steps: int, spent: int, began: float) -> dict[str, Any]:
    """Of a training, as the rows have it."""
    minutes = (time.perf_counter() - began) / 60
    return {"steps": steps, "tokens": spent, "training_minutes": minutes}


def answers(
    run: Run, train: Sequence[Labelled], sentences: Sequence[str]
) -> tuple[list[Shares], Any]:
    """The votes of a method on sentences whose labels nobody sees (of labels without a reason: their
    exact probabilities), and its guide, if it has one for the reasons."""
    inputs = [(sentence,) for sentence in sentences]
    of_run = {"lm": run.lm, "seed": run.seed}
    if run.method in ("zero_shot", "few_shot"):
        examples = len(WORKED) if run.method == "few_shot" else 0
        return shares(partial(direct, examples=examples), inputs, method="exact", **of_run), None
    if run.method == "sft":
        return label_law(run, learn_labels(run, train), sentences), None
    if run.method == "prior":
        return shares(subjectivity, inputs, method="importance", **of_run), None
    if run.method == "em":
        guide, judge = learn_both(run, train)
        reply = partial(chosen, judge=judge)
        return guided_shares(reasoned, reply, inputs, guide=guide, **of_run), None
    batch = {"guide": {"batch_size": run.args.batch_size}}
    data = list(map(observed, train))
    guide = run.train(lambda: Trainer(lambda: reasons_guide(run), data, batch, run.args.steps))
    return guided_shares(reasoned, chosen, inputs, guide=guide, **of_run), guide


def label_law(run: Run, guide: lmppl.LMGuide, sentences: Sequence[str]) -> list[Shares]:
    """A guide's probabilities of the labels, the largest first."""
    found = []
    with lmppl.use(run.lm):
        for sentence in sentences:
            scores = score_latents(guide, direct, (sentence,), [{"label": c} for c in CHOICES])
            law = dict(zip(LABELS, scores.log_q.exp().tolist(), strict=True))
            found.append(dict(sorted(law.items(), key=lambda item: -item[1])))
    return found


def measure(run: Run) -> dict[str, Any]:
    """Accuracy on held-out sentences; the ESS on some of them with their labels."""
    args = run.args
    train, test = run.once("data", lambda: load(args.data or SENTENCES, args.labels, args.held_out))
    prompts = [whole_prompt(sentence) for sentence, _ in (*train, *test)]
    run.once("prompts", lambda: check_fits(run.lm, prompts, 2 * MOST_TOKENS))
    found, guide = answers(run, train, [sentence for sentence, _ in test])
    figures: dict[str, Any] = score(found, [label for _, label in test])
    figures["says_subjective"] = statistics.fmean(
        next(iter(each), "") == LABELS[1] for each in found
    )
    if run.method not in ("prior", "guide"):
        return figures
    few = list(map(observed, test[: args.inputs]))
    options = {"lm": run.lm, "num_samples": args.samples, "runs": 4}
    log_z = run.log_z(
        lambda: [log_z_by_runs(subjectivity, one, **options) for one in few],
        "data labels held_out inputs samples",
    )
    drawn = held_out(
        subjectivity, few, log_z, guide=guide, lm=run.lm, num_samples=args.samples, seed=run.seed
    )
    posterior = lmppl.infer(
        subjectivity, *few[0], lm=run.lm, method="importance", guide=guide, num_samples=VOTES,
        seed=run.seed, progress=False,
    )  # fmt: skip
    reasons = [str(reason).strip() for reason in posterior.probs("reason")]
    return figures | drawn | {"sentence": test[0][0], "reasons": reasons[:3]}


def show(row: Row) -> None:
    """Reasons for the label of one sentence."""
    if "reasons" in row.figures:
        print(f"\n{row.method}: {row.figures['sentence']}")
        for reason in row.figures["reasons"]:
            print(f"  {reason}")


TASK = Task(
    name="subjectivity",
    title="Objective or subjective, through a reason",
    methods=("zero_shot", "few_shot", "prior", "guide", "em", "sft"),
    columns={
        "accuracy": Column("accuracy", ".0%"),
        "share": Column("right draws", ".0%"),
        **PROPOSAL_COLUMNS,
    },
    measure=measure,
    quick={"steps": 16, "batch_size": 16, "samples": 32, "held_out": 16, "inputs": 2, "labels": 10},
    trained=("guide", "em", "sft"),
    show=show,
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = TASK.parser(__doc__)
    parser.set_defaults(steps=60, batch_size=32, samples=256)
    parser.add_argument("--data", type=Path, metavar="DIR", help="see above; else built-in ones")
    parser.add_argument("--labels", type=positive, default=50, help="sentences to learn from")
    parser.add_argument("--held-out", type=positive, default=100, help="sentences to test on")
    parser.add_argument("--inputs", type=positive, default=5, help="of them for the ESS")
    TASK.main(parser, argv)


if __name__ == "__main__":
    main()
