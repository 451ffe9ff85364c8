"""Amortized infilling: train a guide once on simulated stories, then answer new ones at once.

    python examples/amortized_infilling.py --steps 60
    python examples/amortized_infilling.py --sentences sentences.txt --steps 500 --folder infilling

The program writes a middle after a beginning, and then an ending. Run forward, it makes its own
training data: each simulated middle is an exact posterior draw for its own ending. After training
the guide has never seen the stories that are asked for at the end; its draws are compared with the
prior's, as many for each. Interrupt it and call it again with the same arguments: it goes on where
its last checkpoint was. A step takes some seconds on two CPU cores. The table
of the run shows the held-out stories' ELBO and ESS: a few dozen steps, as here by default, only
begin to teach the guide, and it may still be no better than the prior.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

import lmppl
from lmppl import lm_sample

BEGINNINGS = """
Anna looked everywhere for her keys.
The storm had been raging since midnight.
Nobody in the village trusted the new doctor.
My grandfather kept bees behind the old barn.
The train stopped in the middle of nowhere.
She had never seen the ocean before.
The committee met for the third time this week.
He opened the letter with shaking hands.
Our dog refuses to walk past the bakery.
The recipe calls for two cups of flour.
A strange light appeared over the harbour.
The museum closes at six on Sundays.
They moved to the city in the spring.
The old car would not start this morning.
Maria practised the piano every evening.
The teacher handed back the exams.
""".strip().splitlines()

STORIES = [
    ("Tom forgot his umbrella at the office.", " He came home completely soaked."),
    ("The children were very quiet.", " In the kitchen, all the cookies were gone."),
    ("Our flight was cancelled at the last minute.", " We spent the night at the airport."),
]


def infill(beginning: str, ending: str | None = None) -> lmppl.Text:
    """p(z | beginning) p(ending | beginning, z): one sentence, and then the ending."""
    z = lm_sample("z", beginning, max_tokens=12, stop=".")
    lm_sample("ending", [beginning, z], max_tokens=16, stop=".", obs=ending)
    return z


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=Path, help="beginnings, one a line; else built-in ones")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="any causal LM")
    parser.add_argument("--simulate", type=int, default=200, help="training inputs")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=32, help="traces a training step")
    parser.add_argument("--num-samples", type=int, default=64, help="for each story")
    parser.add_argument("--folder", type=Path, help="for checkpoints, the guide and a plot")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    console = Console()
    lm = lmppl.LM.from_pretrained(args.model)
    beginnings = args.sentences.read_text().splitlines() if args.sentences else BEGINNINGS
    guide = lmppl.LMGuide(infill, lm=lm, condition_on=["ending"])
    kept = {}
    if args.folder is not None:
        kept = {"checkpoint": args.folder / "checkpoint", "checkpoint_every": 20, "resume": True}
    guide.fit(
        [(each,) for each in beginnings],
        simulate=args.simulate,
        steps=args.steps,
        batch_size=args.batch_size,
        eval_data=STORIES,
        eval_every=max(1, args.steps // 3),
        eval_samples=args.num_samples,
        seed=args.seed,
        **kept,
    )
    print(guide.history)  # as wide as the terminal
    if args.folder is not None:
        guide.save(args.folder / "guide")
        guide.history.plot(args.folder / "training.png")
    console.print(compare(lm, guide, args))
    story = STORIES[0]
    print(lmppl.diagnose(infill, *story, guide=guide, lm=lm, num_samples=args.num_samples, seed=1))


def compare(lm: lmppl.LM, guide: lmppl.LMGuide, args: argparse.Namespace) -> Table:
    """New stories by prior and guide, all of them side by side in the model's batches."""
    table = Table(title="New stories", show_lines=True)
    for name in ("story", "proposal", "ESS", "log evidence", "best middles"):
        table.add_column(name, overflow="fold")
    answers = {
        name: list(
            lmppl.infer_batch(
                infill, STORIES, lm=lm, method="importance", guide=proposal,
                num_samples=args.num_samples, seed=args.seed,
            )
        )
        for name, proposal in (("prior", None), ("guide", guide))
    }  # fmt: skip
    for i, (beginning, ending) in enumerate(STORIES):
        for name, posteriors in answers.items():
            p = posteriors[i]
            best = [f"{w:.0%} {str(z).strip()}" for z, w in list(p.probs("z").items())[:3]]
            story = f"{beginning} ...{ending}" if name == "prior" else ""
            table.add_row(story, name, f"{p.ess:.1f}", f"{p.log_evidence:.2f}", "\n".join(best))
    return table


if __name__ == "__main__":
    main()
