"""What each process of a run does in ``test_split.py``: trainings in which the traces of each input are
dealt, and the same ones by the first process alone.

    torchrun --nproc-per-node 2 tests/training/split_ranks.py FOLDER [SCENARIO ...]

Each process writes down what it found.
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from several_ranks import labelled

import lmppl
from lmppl import learn, lm_sample, require, tool
from lmppl.testing import tiny_lm
from lmppl.testing.programs import CASES
from lmppl.training.behaviour import Behaviour
from lmppl.training.optimizer import Optimizer
from lmppl.training.samples import Sample

RANK, NUM = (
    int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))
)
ONE_SITE = CASES["one site"].program
ONE = [("ab.", "aba")]
TWO = [("ab.", "aba"), ("ba", "ab")]
SOME_DEAD = [(".", "ab")]
STEPS = 4


def mostly_alive(x, y):
    """A condition that 7 of 10 texts meet."""
    z = lm_sample("z", x, max_tokens=3, stop=".")
    require("no bbb", z != "bbb")
    lm_sample("y", [x, z], obs=y)


def seldom_alive(x, y):
    """A condition that 4 of 10 texts meet."""
    z = lm_sample("z", x, max_tokens=3, stop=".")
    require("has a", "a" in z)
    lm_sample("y", [x, z], obs=y)


def matching(x, y):
    """The program's own law of a text that has to match needs the language model."""
    z = lm_sample("z", x, max_tokens=3, regex="(a|b)+")
    require("has b", "b" in z)
    lm_sample("y", [x, z], obs=y)


def numbers(x):
    """A network of its own for a number that is met on one branch only."""
    z = lm_sample("z", x, max_tokens=2, stop=".")
    mean = 1.0
    if "b" in z:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    pyro.sample("seen", dist.Normal(mean, 0.5), obs=torch.tensor(0.7))


def with_tool(x, y):
    z = lm_sample("z", x, max_tokens=3, stop=".")
    found = tool("found", lambda text: {"letters": [text.count("a"), text.count("b")]}, z)
    pyro.factor("more b", torch.tensor(1.0 * found["letters"][1] - found["letters"][0]))
    lm_sample("y", [x, z], obs=y)


def texts(x, y):
    """Texts so long that only some of their truncations are affordable."""
    z = lm_sample("z", x, max_tokens=6, stop=".")
    lm_sample("y", [x, z], obs=y)


def numbered(x):
    which = pyro.sample("which", dist.Bernoulli(0.5))
    number = pyro.sample("number", dist.Normal(which, 1.0))
    pyro.sample("seen", dist.Normal(number, 0.5), obs=torch.tensor(0.7))


def numbered_guide(x):
    """Each branch has a parameter of its own, whose first value is random."""
    which = pyro.sample("which", dist.Bernoulli(0.5))
    mean = pyro.param(f"mean_{int(which)}", lambda: torch.randn(()))
    pyro.sample("number", dist.Normal(mean, 1.0))


def sites(x):
    z = lm_sample("z", x, max_tokens=2)
    lm_sample("z_b" if "b" in z else "z_a", [x, z], max_tokens=2)
    lm_sample("y", [x, z], obs="a")


def branches(x, label):
    """Each branch has a parameter of its own."""
    z = lm_sample("z", x, max_tokens=2, stop=".")
    interval = dist.constraints.unit_interval
    first = torch.tensor(0.3 + 0.2 * z.count("b"))
    p = pyro.param(f"p_{z.count('b')}", first, constraint=interval)
    pyro.sample("label", dist.Bernoulli(p), obs=torch.tensor(label))


class Watch:
    """Takes note of the gradients of first steps, and of the traces of all steps."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []
        self.traces: list[list[Any]] = []  # of each step, of each input: what, number, tokens
        step, draw = Optimizer.step, Behaviour.draw

        def stepped(optimizer, losses, number):
            update = step(optimizer, losses, number)
            if number == 0:
                for name in sorted(optimizer._named):
                    gradient = optimizer._named[name].grad
                    self.gradients += [] if gradient is None else [gradient.reshape(-1).clone()]
            return update

        def drawn(behaviour, turns):
            rows = draw(behaviour, turns)
            self.traces.append([[of_trace(sample) for sample in row] for row in rows])
            return rows

        Optimizer.step, Behaviour.draw = stepped, drawn

    def take(self) -> dict[str, Any]:
        found = {"gradients": self.gradients, "traces": self.traces}
        self.gradients, self.traces = [], []
        return found


def of_trace(sample: Any) -> list[Any]:
    own = isinstance(sample, Sample)
    return [sample.origin, sample.num_tokens, sample.log_r, sample.record.tokens if own else None]


WATCH = Watch()


def language_model(dtype: torch.dtype = torch.float32) -> lmppl.LM:
    lm = tiny_lm("ab.", seed=0)
    return lmppl.LM(lm.model.to(dtype), lm.tokenizer)


def result(guide: lmppl.LMGuide, told: list[Any], **further: Any) -> dict[str, Any]:
    return {
        "history": [
            {key: value for key, value in row.items() if not key.startswith("seconds")}
            for row in guide.history
        ],
        "parameters": {key: p.detach() for key, p in guide.named_parameters().items()},
        "notes": guide.notes,
        "told": sorted({str(warning.message) for warning in told}),
        **WATCH.take(),
        **further,
    }


def fitted(
    program=ONE_SITE, inputs=ONE, *, dtype=torch.float64, made=None, **options
) -> Callable[[str], dict[str, Any]]:
    """A training, as a function of ``parallel``."""

    def train(parallel: str) -> dict[str, Any]:
        pyro.clear_param_store()
        torch.manual_seed(RANK if parallel == "split" else 0)
        guide = lmppl.LMGuide(program, lm=language_model(dtype), **(made or {}))
        settings = {"steps": STEPS, "batch_size": 13, "seed": 0, "progress": False} | options
        data = inputs() if callable(inputs) else inputs
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            guide.fit(data, parallel=parallel, **settings)
        return result(guide, told)

    return train


def learned(program, inputs, **options) -> Callable[[str], dict[str, Any]]:
    def train(parallel: str) -> dict[str, Any]:
        pyro.clear_param_store()
        guide = lmppl.LMGuide(program, lm=language_model(torch.float64))
        history = learn(
            guide, inputs, 3, seed=0, progress=False, guide_steps=1, num_samples=7, batch_size=13,
            model_learning_rate=0.1, parallel=parallel, **options
        )  # fmt: skip
        params = {name: float(p.detach()) for name, p in pyro.get_param_store().items()}
        figures = ("log_evidence", "model_loss", "model_ess", "eval_log_z")
        of_model = [{key: row[key] for key in figures if key in row} for row in history]
        return result(guide, [], params=params, model=of_model)

    return train


def resumed(folder: Path) -> Callable[[str], dict[str, Any]]:
    """A training that is interrupted and goes on, beside one that is not. What was interrupted in
    several processes goes on in one, too."""

    def train(parallel: str) -> dict[str, Any]:
        def stop(figures):
            if figures["step"] == 2:
                raise KeyboardInterrupt

        def fit(run: Path, callback=None, parallel=parallel) -> lmppl.LMGuide:
            guide = lmppl.LMGuide(mostly_alive, lm=language_model(torch.float64))
            guide.fit(
                SOME_DEAD, steps=STEPS, batch_size=14, seed=0, progress=False, checkpoint=run,
                resume=True, checkpoint_every=2, callback=callback, parallel=parallel,
            )  # fmt: skip
            return guide

        whole, broken = (folder / f"{parallel}-{name}" for name in ("whole", "broken"))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            one = fit(whole)
            with suppress(KeyboardInterrupt):
                fit(broken, stop)
            if RANK == 0:
                shutil.copytree(broken, folder / "alone", dirs_exist_ok=True)
            WATCH.take()
            other = fit(broken)
            found = result(other, told)
            found["unbroken"] = {name: p.detach() for name, p in one.named_parameters().items()}
            if parallel == "split" and RANK == 0:
                alone = fit(folder / "alone", parallel="none")
                found["alone"] = {name: p.detach() for name, p in alone.named_parameters().items()}
                found["told_alone"] = [str(warning.message) for warning in told]
                WATCH.take()
        return found

    return train


def scenarios(folder: Path) -> dict[str, Callable[[str], dict[str, Any]]]:
    held_out = {"eval_data": [("bb", "ab"), ("a", "ab")], "eval_every": 2, "eval_samples": 15}
    given = [{"z": "a."}, {"z": "b."}, {"z": "ab."}, {"z": "ba."}, {"z": "."}]
    return {
        "vargrad": fitted(**held_out),
        "huber": fitted(mostly_alive, SOME_DEAD, huber=0.5, forward=0),
        "tb": fitted(mostly_alive, [*SOME_DEAD, *TWO], loss="tb", inputs_per_step=2),
        "subtb": fitted(loss="subtb"),
        # Where all traces of a step become equal, the gradient is rounding alone.
        "elbo": fitted(mostly_alive, SOME_DEAD, loss="elbo", learning_rate=3e-4),
        "wake": fitted(mostly_alive, SOME_DEAD, loss="wake"),
        "ppo": fitted(mostly_alive, SOME_DEAD, loss="ppo", learning_rate=3e-4),
        "sft": fitted(loss="sft", demonstrations=[given], batch_size=5),
        "wake on simulations": fitted(inputs=TWO, loss="wake", simulate=3),
        "demonstrations": fitted(demonstrations=[given], batch_size=4),
        "dead traces": fitted(mostly_alive, SOME_DEAD, batch_size=14, **held_out),
        "few live traces": fitted(seldom_alive, SOME_DEAD, batch_size=5, seed=2),
        "two traces": fitted(batch_size=2, loss="elbo"),
        "a match": fitted(matching),
        "numbers": fitted(numbers, [("a",)], batch_size=14),
        "a tool": fitted(with_tool),
        "truncations": fitted(texts, batch_size=14),
        "a guide program": fitted(numbered, [("a",)], made={"program": numbered_guide}),
        "adapters of sites": fitted(sites, [("a",)], made={"adapter_per_site": True}),
        "a stream": fitted(inputs=lambda: iter(TWO * 4), inputs_per_step=2),
        "less memory": fitted(texts, training_tokens=20, gradient_checkpointing=True),
        "learn": learned(labelled, [("ab.", 1.0)], eval_data=[("ab", 1.0)], eval_every=2),
        "learn branches": learned(branches, [("ab.", 1.0), ("a", 0.0)], inputs_per_step=2),
        "dreams": learned(labelled, [("ab.", 1.0)], method="wake-sleep"),
        "resumed": resumed(folder),
    }


def main(folder: Path, names: list[str]) -> None:
    found: dict[str, Any] = {}
    for name, train in scenarios(folder).items():
        if not names or name in names:
            found[name] = {"split": train("split")}
            if RANK == 0:
                found[name]["none"] = train("none")
    torch.save(found, folder / f"rank-{RANK}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), sys.argv[2:])
