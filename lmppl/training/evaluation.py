"""A guide on inputs that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lmppl import runtime
from lmppl.guides.guide import Guide
from lmppl.guides.scoring import score_traces
from lmppl.training.inputs import Input, observe
from lmppl.training.sharing import SharedInputs, Sharing
from lmppl.training.trainer import mean

_MOST_PARTICLES = 512


def evaluate(
    guide: Guide | None,
    inputs: Sequence[Input],
    num_samples: int,
    *,
    seed: int,
    sharing: Sharing | None = None,
) -> dict[str, float]:
    """Figures of a guide as a proposal, each the mean over the inputs.

    Args:
        guide: the guide; None: the program's prior.
        inputs: held out from training.
        num_samples: draws for each input.
        seed: the same seed compares the same uniforms, so that differences are less noisy.
        sharing: which draws fall to this process; None: all.

    Returns:
        ``eval_ess`` (the effective sample size as a fraction of ``num_samples``; upward biased
        where it is below a few samples), ``eval_elbo`` of live draws (nats), ``eval_log_z`` (log of
        the mean weight: a lower bound, nats; of inputs with a live draw), ``eval_alive``, and
        ``eval_dead``, how many inputs had no live draw, if any had none. Of simulated inputs also
        ``eval_eubo``, the mean of log R - log q over their exact posterior draws: an upper bound. If
        no draw is dead (``eval_alive`` is 1), KL(q || p) is below ``eval_eubo - eval_elbo`` and above
        ``eval_log_z - eval_elbo``; else it is infinite.
    """
    sharing = SharedInputs() if sharing is None else sharing
    own = _log_weights(guide, inputs, num_samples, seed, sharing)
    found = sharing.of_all(
        [list(row.values()) for row in sharing.pool(own, tell=float, hear=float)]
    )
    rows = [torch.tensor(row, dtype=torch.float64) for row in found]
    live = [row[row > -math.inf] for row in rows]
    figures = {
        "eval_ess": sum(map(runtime.ess, rows)) / (len(rows) * num_samples),
        "eval_elbo": mean([float(u.mean()) for u in live]),
        "eval_log_z": mean([runtime.log_mean_exp(row) for row in rows]),
        "eval_alive": sum(map(len, live)) / (len(rows) * num_samples),
    }
    if dead := sum(not len(u) for u in live):
        figures["eval_dead"] = float(dead)
    if all(input_.exact for input_ in inputs):
        mine = sharing.ranks.mine(inputs)  # each has few exact draws
        each = sharing.ranks.gather([_upper_bounds(guide, mine)])
        figures["eval_eubo"] = float(torch.cat(each).mean())
    return figures


def _log_weights(
    guide: Guide | None, inputs: Sequence[Input], num_samples: int, seed: int, sharing: Sharing
) -> list[dict[int, float]]:
    """log R - log q of the draws that fall to this process, by slot, of each of its inputs; nats."""
    seeded = sharing.mine(list(zip(inputs, runtime.slot_seeds(seed, len(inputs)), strict=True)))
    if guide is not None:
        observe(guide, [input_ for input_, _ in seeded])
    found: list[dict[int, float]] = []
    at_once = max(1, _MOST_PARTICLES // num_samples)
    for begin in range(0, len(seeded), at_once):
        dealt: list[range] = []
        with torch.no_grad(), runtime.ending([]) as particles:
            for input_, input_seed in seeded[begin : begin + at_once]:
                program, args, seen = input_.program, input_.args, input_.observations
                proposer = (
                    None if guide is None else guide.proposer_factory(args, observations=seen)
                )
                dealt.append(sharing.slots(len(dealt) * num_samples, num_samples))
                particles += runtime.start(
                    program, args, num_samples, seed=input_seed, proposer=proposer, slots=dealt[-1]
                )
            runtime.run_to_end(particles)
            log_weights = (particle.take_log_weight() for particle in particles)
            found += [{slot: next(log_weights) for slot in slots} for slots in dealt]
    return found


def _upper_bounds(guide: Guide | None, inputs: Sequence[Input]) -> torch.Tensor:
    """log R - log q of the exact posterior draws of simulated inputs."""
    pairs = [(input_, record) for input_ in inputs for record in input_.given]
    scores = score_traces(
        guide,
        [(input_.program, input_.args, record.values) for input_, record in pairs],
        [input_.observations or {} for input_, _ in pairs],
    )
    return scores.log_joint - scores.log_q
