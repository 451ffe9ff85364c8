"""What each process of a run does in ``test_ranks.py``: trainings, whose results the first writes down.

    torchrun --nproc-per-node 2 tests/training/several_ranks.py FOLDER

The trainings know nothing of processes, so one process runs them as it is.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch

import lmppl
from lmppl import learn, lm_sample
from lmppl.testing import tiny_lm
from lmppl.testing.programs import CASES
from lmppl.training.behaviour import Behaviour
from lmppl.training.optimizer import Optimizer

INPUTS = [("ab.", "aba"), ("b", "aba"), ("a", "bab"), ("ab", "ba"), ("ba", "ab")]
ONE_SITE = CASES["one site"].program


def branch(x, which):
    """Each of two sites with networks of its own is met on some inputs only."""
    z = lm_sample("z", x, max_tokens=2, stop=".")
    mean = 1.0 if "b" in z else -1.0
    number = pyro.sample(f"number_{which}", dist.Normal(mean, 1.0))
    pyro.sample("seen", dist.Normal(number, 0.5), obs=torch.tensor(0.7))


def labelled(x, label):
    z = lm_sample("z", x, max_tokens=2, stop=".")
    p = pyro.param("p", torch.tensor(0.7), constraint=dist.constraints.unit_interval)
    pyro.sample("label", dist.Bernoulli(p if "b" in z else 1 - p), obs=torch.tensor(label))


def texts(x, y):
    """Texts so long that only some of their truncations are affordable."""
    z = lm_sample("z", x, max_tokens=6, stop=".")
    lm_sample("y", [x, z], obs=y)


def sites(x, which):
    z = lm_sample(f"z_{which}", x, max_tokens=2, stop=".")
    lm_sample("y", [x, z], obs="a")


def numbered(x, which):
    number = pyro.sample("number", dist.Normal(0.0, 1.0))
    pyro.sample("seen", dist.Normal(number, 0.5), obs=torch.tensor(0.7))


def numbered_guide(x, which):
    """Most inputs have a parameter of their own, whose first value is random."""
    mean = pyro.param(f"mean_{which}", lambda: torch.randn(()))
    pyro.sample("number", dist.Normal(mean, 1.0))


def labelled_apart(x, which):
    """Each input has a parameter of its own."""
    z = lm_sample("z", x, max_tokens=2, stop=".")
    p = pyro.param(f"p_{which}", torch.tensor(0.7), constraint=dist.constraints.unit_interval)
    pyro.sample("label", dist.Bernoulli(p if "b" in z else 1 - p), obs=torch.tensor(1.0))


class Results:
    """Of the scenarios, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rank = int(os.environ.get("RANK", "0"))
        self.found: dict[str, dict[str, object]] = {}
        self._first: list[float] = []  # gradients
        self._draws: list[list[object]] = []  # of each step, of each of this rank's inputs
        self._watch()

    def _watch(self) -> None:
        """Take note of the gradients of each first step, and of what all steps draw."""
        kept, first, draw, draws = Optimizer.step, self._first, Behaviour.draw, self._draws

        def step(optimizer, losses, number):
            update = kept(optimizer, losses, number)
            if number == 0 and not first:
                for name in sorted(optimizer._named):
                    gradient = optimizer._named[name].grad
                    first.extend([] if gradient is None else gradient.reshape(-1).tolist())
            return update

        def drawn(behaviour, turns):
            samples = draw(behaviour, turns)
            # (Traces that a rank remembers come after those that it runs again.)
            draws.append([sorted([s.origin, *s.record.tokens] for s in one) for one in samples])
            return samples

        Optimizer.step, Behaviour.draw = step, drawn

    def keep(self, name: str, guide: lmppl.LMGuide, **further: object) -> None:
        self.found[name] = {
            "history": [
                {key: value for key, value in row.items() if not key.startswith("seconds")}
                for row in guide.history
            ],
            "parameters": {
                key: p.detach().reshape(-1).tolist() for key, p in guide.named_parameters().items()
            },
            "first_gradients": list(self._first),
            "draws": list(self._draws),
            **further,
        }
        self._first.clear()
        self._draws.clear()

    def write(self) -> None:
        file = self.folder / f"rank-{self.rank}.json"
        file.write_text(json.dumps(self.found))


def language_model(dtype: torch.dtype = torch.float32) -> lmppl.LM:
    lm = tiny_lm("ab.", seed=0)
    return lmppl.LM(lm.model.to(dtype), lm.tokenizer)


def fitted(
    results,
    name,
    program=ONE_SITE,
    inputs=INPUTS,
    steps=20,
    dtype=torch.float32,
    made=None,
    **options,
):
    guide = lmppl.LMGuide(program, lm=language_model(dtype), **(made or {}))
    options = {"batch_size": 24, "inputs_per_step": 3, "seed": 0, "progress": False} | options
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        guide.fit(inputs, steps=steps, **options)
    idle = [str(warning.message) for warning in told if "are idle" in str(warning.message)]
    results.keep(name, guide, notes=guide.notes, told=idle)


def main(folder: Path) -> None:
    results = Results(folder)
    held_out = {"eval_data": [("bb", "ab"), ("a", "ab"), ("b", "bb")], "eval_every": 5}
    fitted(results, "float32", **held_out)
    fitted(results, "float64", dtype=torch.float64, **held_out)
    fitted(
        results, "sites met by some", branch, [("a", i % 2) for i in range(4)], dtype=torch.float64
    )
    fitted(results, "learned log Z", loss="tb", steps=6)
    fitted(results, "several updates", loss="ppo", steps=6)
    given = [{"z": "a."}, {"z": "b."}, {"z": "ab."}, {"z": "ba."}, {"z": "."}]
    fitted(results, "maximum likelihood", loss="sft", demonstrations=given, batch_size=4, steps=6)
    fitted(results, "an idle rank", inputs=INPUTS[:1], steps=4)
    fitted(results, "a stream", inputs=iter(INPUTS * 4), steps=6)
    fitted(results, "simulated", simulate=8, steps=6)
    fitted(results, "some truncations", texts, batch_size=48, steps=9, dtype=torch.float64)
    which = [("a", k) for k in range(5)]
    fitted(
        results, "adapters of sites", sites, which, steps=6, dtype=torch.float64,
        made={"adapter_per_site": True},
    )  # fmt: skip
    fitted(results, "a guide program", numbered, which, steps=6, made={"program": numbered_guide})

    pyro.clear_param_store()
    guide = lmppl.LMGuide(labelled, lm=language_model())
    data = [("ab.", 1.0), ("ab.", 1.0), ("ab.", 0.0), ("ba", 1.0), ("b", 0.0)]
    history = learn(
        guide, data, 8, seed=0, progress=False, guide_steps=1, num_samples=8, batch_size=12,
        model_learning_rate=0.1, inputs_per_step=3,
    )  # fmt: skip
    of_model = [{k: row[k] for k in ("log_evidence", "model_loss", "model_ess")} for row in history]
    results.keep("learn", guide, p=float(pyro.param("p").detach()), model=of_model)
    pyro.clear_param_store()
    guide = lmppl.LMGuide(labelled_apart, lm=language_model(torch.float64))
    learn(
        guide, which[:3], 4, seed=0, progress=False, guide_steps=1, num_samples=8, batch_size=12,
        model_learning_rate=0.1, inputs_per_step=2,
    )  # fmt: skip
    of_model = {name: float(pyro.param(f"p_{name}").detach()) for name in range(3)}
    results.keep("learn in turn", guide, model=of_model)
    results.write()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
