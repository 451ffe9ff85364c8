"""Power sampling: how far draws are from p^alpha, against low temperature, at equal tokens.

    python -m benchmarks.power --alpha 4 --tokens 5000 40000 --seeds 5

The text is short enough to enumerate, so the target is known: p(z)^alpha, normalised over whole texts z
(Karan and Du, 2025, "Reasoning with sampling"). Drawing at temperature 1 / alpha is another
distribution: it sharpens every next token, and not the whole text, so it takes a probable token whose
continuations are all improbable. Its "limit" is the total variation between that distribution and the
target, which no number of draws can undercut.

Every method spends as many tokens, drawn and scored together, and its total variation to the target is
the mean over the seeds. "floor" is that of as many independent draws of the target as the texts that
"low temperature" can afford. Chains propose suffixes of the model ("prior"), suffixes at temperature
1 / alpha ("cold"), and these in blocks that grow ("block 2"). "importance" draws at low temperature and
weighs: the only other method here that has the right limit.

Expect: low temperature stays at its limit however many tokens it gets; the others fall. Cold proposals
are accepted twice as often as the prior's. But each of their texts has to be scored as well, and where
the prior is accepted in a third of all moves, as here, that does not pay. Some minutes on a CPU core.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro import poutine

import lmppl
from lmppl import lm_sample
from lmppl.testing import tiny_lm
from lmppl.testing.naive import NaiveLM

Ids = tuple[int, ...]


def power(prefix: str, max_tokens: int, alpha: float) -> None:
    """The program whose posterior is p^alpha."""
    with poutine.scale(scale=alpha):
        lm_sample("z", prefix, max_tokens=max_tokens)


def colder(prefix: str, max_tokens: int, alpha: float) -> None:
    """A guide for it: low temperature."""
    lm_sample("z", prefix, max_tokens=max_tokens, temperature=1 / alpha)


class Task:
    """One text of a tiny language model.

    Attributes:
        target: the probability of each text under p^alpha, normalised.
        limit: the total variation between low temperature and the target.
    """

    def __init__(self, alpha: float, max_tokens: int, model_seed: int, contrast: float) -> None:
        self.alpha, self.max_tokens, self.prefix = alpha, max_tokens, "ab."
        self.lm = tiny_lm("ab.", seed=model_seed, contrast=contrast)
        naive, prefix = NaiveLM(self.lm), self.lm.encode(self.prefix)
        table = naive.enumerate(prefix, max_tokens, (), 1.0)
        cold = naive.enumerate(prefix, max_tokens, (), 1 / alpha)
        logits = alpha * torch.tensor(list(table.values()), dtype=torch.float64)
        self.target = dict(zip(table, logits.softmax(0).tolist(), strict=True))
        self.limit = distance({z: math.exp(log_q) for z, log_q in cold.items()}, self.target)

    @property
    def args(self) -> tuple[str, int, float]:
        return self.prefix, self.max_tokens, self.alpha

    def of(self, posterior: lmppl.Posterior) -> tuple[dict[Ids, float], int]:
        """The weighted texts of a posterior, and the tokens that it cost."""
        found: Counter[Ids] = Counter()
        for z, weight in zip(posterior["z"], posterior.weights.tolist(), strict=True):
            found[z.token_ids] += weight
        return dict(found), posterior.info["tokens_sampled"] + posterior.info["tokens_scored"]


def distance(found: dict[Ids, float], target: dict[Ids, float]) -> float:
    """Total variation."""
    return sum(abs(found.get(z, 0.0) - target.get(z, 0.0)) for z in {*found, *target}) / 2


Method = Callable[[Task, int, int], tuple[dict[Ids, float], int, float | None]]
"""Texts with their shares, what they cost, and the share of accepted moves; of a number and a seed."""


def low_temperature(task: Task, num: int, seed: int) -> tuple[dict[Ids, float], int, None]:
    texts, _ = task.lm.sample(
        task.prefix, num, max_tokens=task.max_tokens, temperature=1 / task.alpha, seed=seed
    )
    counts = Counter(text.token_ids for text in texts)
    cost = sum(len(text.token_ids) for text in texts)
    return {z: count / num for z, count in counts.items()}, cost, None


def importance(task: Task, num: int, seed: int) -> tuple[dict[Ids, float], int, None]:
    options: dict[str, Any] = {"method": "importance", "num_samples": num, "seed": seed}
    posterior = lmppl.infer(power, *task.args, lm=task.lm, guide=colder, progress=False, **options)
    return *task.of(posterior), None


def chains(**options: Any) -> Method:
    """Chains with some options of ``lmppl.MCMC``; all their moves but the first 10 are draws."""

    def run(task: Task, num: int, seed: int) -> tuple[dict[Ids, float], int, float | None]:
        if options.get("proposal_temperature"):
            options["proposal_temperature"] = 1 / task.alpha
        engine = lmppl.MCMC(num_chains=32, warmup=10, thin=1, **options)
        posterior = lmppl.infer(
            power, *task.args, lm=task.lm, method=engine, num_samples=num, seed=seed, progress=False
        )
        return *task.of(posterior), posterior.info["chains"]["acceptance"]["z"]

    return run


METHODS: dict[str, Method] = {
    "low temperature": low_temperature,
    "importance, low temperature": importance,
    "mcmc, prior": chains(),
    "mcmc, prior, block 2": chains(block=2),
    "mcmc, cold": chains(proposal_temperature=True),
    "mcmc, cold, block 2": chains(proposal_temperature=True, block=2),
}
FIRST, FEWEST = 320, 64


def measure(task: Task, method: Method, tokens: int, seeds: Sequence[int]) -> dict[str, float]:
    """Mean total variation at about so many tokens, with its standard error."""
    _, cost, _ = method(task, FIRST, 10_000)
    num = max(FEWEST, round(FIRST * tokens / cost))
    _, cost, _ = method(task, num, 10_001)  # once more, as the cost of a start is not in proportion
    num = max(FEWEST, round(num * tokens / cost))
    runs = [method(task, num, seed) for seed in seeds]
    errors = torch.tensor([distance(found, task.target) for found, _, _ in runs])
    shares = [share for _, _, share in runs if share is not None]
    return {
        "texts": num,
        "tokens": sum(cost for _, cost, _ in runs) / len(runs),
        "tv": float(errors.mean()),
        "stderr": float(errors.std()) / math.sqrt(len(runs)),
        "accepted": sum(shares) / len(shares) if shares else math.nan,
    }


def floor(task: Task, num: int, seeds: Sequence[int]) -> float:
    """Mean total variation of independent draws of the target."""
    probs, total = torch.tensor(list(task.target.values())), 0.0
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        picks = torch.multinomial(probs, num, replacement=True, generator=generator)
        shares = torch.bincount(picks, minlength=len(probs)) / num
        total += float((shares - probs).abs().sum()) / 2
    return total / len(seeds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--alpha", type=float, default=4.0)
    parser.add_argument("--tokens", type=int, nargs="+", default=[5000, 40000])
    parser.add_argument("--max-tokens", type=int, default=5)
    parser.add_argument("--model-seed", type=int, default=0)
    parser.add_argument("--contrast", type=float, default=1.0, help="of the model's logits")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", ".*never came to another trace")
    task = Task(options.alpha, options.max_tokens, options.model_seed, options.contrast)
    seeds = range(options.seeds)
    print(f"{len(task.target)} texts; low temperature's limit: total variation {task.limit:.3f}\n")
    print("| tokens | method | texts | TV to p^alpha | standard error | accepted |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for tokens in options.tokens:
        for name, method in METHODS.items():
            row = measure(task, method, tokens, seeds)
            accepted = "" if math.isnan(row["accepted"]) else f"{row['accepted']:.0%}"
            print(
                f"| {row['tokens']:,.0f} | {name} | {row['texts']:,} | {row['tv']:.3f} "
                f"| {row['stderr']:.3f} | {accepted} |",
                flush=True,
            )
            if name == "low temperature":
                num = int(row["texts"])
                print(f"| | (floor) | {num:,} | {floor(task, num, seeds):.3f} | | |", flush=True)


if __name__ == "__main__":
    main()
