"""The samples of one input as tensors: what a loss is computed from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch

from lmppl import runtime
from lmppl.distributions import LMText, SiteScore
from lmppl.training.samples import AnySample, Origin, Sample, Truncation, own_of, score_own_draws

K = TypeVar("K")


def log_own_of(samples: Sequence[AnySample]) -> list[float]:
    """The log-density of each trace's latents as the program draws them itself, nats, of the traces that
    this process has."""
    own = list(own_of(samples).values())
    score_own_draws(own)
    return [sample.log_own() for sample in own]


@dataclass(frozen=True, eq=False)
class Batch:
    """The samples of one input, with what the guide says of them: N complete traces, and M
    truncations of some of them. Log-densities are in nats, those of the traces first."""

    samples: Sequence[AnySample]
    truncations: Sequence[Truncation]
    log_r: torch.Tensor  # (N + M,) log joints; -inf where R = 0
    log_q: torch.Tensor  # (N + M,) of the guide, with gradient
    old_log_q: torch.Tensor  # (N,) of the guide that drew them: log_q at the first update
    log_prior: torch.Tensor  # (N,) the program's own log-density of the latents
    is_scored: Sequence[bool]  # (N,) whether the guide draws any of the latents
    beta: float = 1.0  # the inverse temperature that is in log_r
    log_z: torch.Tensor | None = None  # the learned log evidence, 0-d, where one is learned
    log_own_of: Callable[[Sequence[AnySample]], list[float]] = log_own_of

    @property
    def num(self) -> int:
        """How many complete traces it holds."""
        return len(self.samples)

    def complete(self, *origins: Origin) -> Batch:
        """Its complete traces alone: those that come from there, or all of them."""
        kept = [not origins or sample.origin in origins for sample in self.samples]
        rows = torch.tensor(kept, dtype=torch.bool)
        return replace(
            self,
            samples=list(itertools.compress(self.samples, kept)),
            truncations=[],
            log_r=self.log_r[: self.num][rows],
            log_q=self.log_q[: self.num][rows],
            old_log_q=self.old_log_q[rows],
            log_prior=self.log_prior[rows],
            is_scored=list(itertools.compress(self.is_scored, kept)),
        )

    def tempered(self, beta: float, log_z: torch.Tensor | None = None) -> Batch:
        """The same with the reward ``R ** beta``, and a learned log evidence."""
        log_r = torch.where(self.log_r == -math.inf, -math.inf, self.log_r * beta)
        return replace(self, log_r=log_r, beta=beta, log_z=log_z)

    def log_own(self) -> torch.Tensor:
        """(N,) the log-density of the latents as the program draws them itself: ``log_prior``, but
        where a text has a constraint."""
        return self.log_prior.new_tensor(self.log_own_of(self.samples))

    def check(self) -> Batch:
        """Itself; raises ``ValueError`` if the guide draws no latent, though a trace is alive. (A dead
        one may have ended before its first latent.)"""
        if not any(self.is_scored) and any(sample.log_r > -math.inf for sample in self.samples):
            raise ValueError("the guide has proposed no latent site of the program")
        return self

    def figures(self) -> dict[str, float]:
        """What the guide's own draws say of it; NaN if there are none."""
        length = sum(sample.num_tokens for sample in self.samples) / self.num
        drawn = self.complete("guide")
        if not drawn.num:
            return dict.fromkeys(("log_z", "elbo", "ess", "alive"), math.nan) | {"length": length}
        u = (drawn.log_r - drawn.log_q.detach())[drawn.log_r > -math.inf]
        return {
            "log_z": float(torch.logsumexp(u, 0)) - math.log(drawn.num),
            "elbo": float(u.mean()),
            "ess": runtime.ess(u) / drawn.num,
            "alive": len(u) / drawn.num,
            "length": length,
        }


Scores = Mapping[str, SiteScore]  # what a guide says of a trace, by site


def batches_of(
    samples: Sequence[Sequence[Sample]],
    truncations: Sequence[Truncation],
    scores: Sequence[Scores],
) -> list[Batch]:
    """The samples of each input as tensors, with those of their truncations that the guide has
    scored token by token.

    Args:
        samples, truncations: of each input; of any of them.
        scores: of each sample, one input after the other.

    Raises:
        ValueError: if the guide cannot draw a latent of a live trace.
    """
    flat = [sample for of_input in samples for sample in of_input]
    number = {id(sample): i for i, sample in enumerate(flat)}
    cuts = [(number[id(cut.sample)], cut) for cut in truncations]
    cuts = [(i, cut) for i, cut in cuts if scores[i][cut.name][1] is not None]
    log_q = _log_q_of_traces(flat, scores)
    cut_log_q = _log_q_of_cuts(cuts, scores, log_q)
    found: list[Batch] = []
    end = 0
    for of_input in samples:
        begin, end = end, end + len(of_input)
        rows = [row for row, (i, _) in enumerate(cuts) if begin <= i < end]
        of_cuts = [cuts[row][1] for row in rows]
        log_r = [*(sample.log_r for sample in of_input), *(cut.log_r for cut in of_cuts)]
        batch = Batch(
            of_input,
            of_cuts,
            log_r=log_q.new_tensor(log_r),
            log_q=torch.cat([log_q[begin:end], cut_log_q[rows]]),
            old_log_q=log_q[begin:end].detach(),
            log_prior=log_q.new_tensor([sample.log_p for sample in of_input]),
            is_scored=list(map(bool, scores[begin:end])),
        )
        found.append(batch)
    return found


# Sites are many, so in what follows nothing is done one by one that would leave a node in the graph.


def _log_q_of_traces(samples: Sequence[Sample], scores: Sequence[Scores]) -> torch.Tensor:
    """(N,) log-densities of whole traces, nats. Latents that the guide has not are drawn from the
    model, so they have the density of its draws."""
    width = max(map(len, scores), default=0)
    terms = [log_prob for score in scores for log_prob, _ in score.values()]
    places = [i * width + j for i, score in enumerate(scores) for j in range(len(score))]
    score_own_draws(samples, scores)
    left = torch.tensor([s.log_own(score) for s, score in zip(samples, scores, strict=True)])
    if not terms:
        return left
    home = next((term for term in terms if term.requires_grad), terms[0])
    flat = torch.stack([term.to(home.device) for term in terms]).to(home.dtype)
    table = flat.new_zeros(len(samples) * width)
    table = table.index_copy(0, torch.tensor(places, device=home.device), flat)
    log_q = table.reshape(len(samples), width).sum(1) + left.to(table)
    if bool((log_q.detach() == -math.inf).any()):
        _check_support(samples, scores)
    return log_q


def _log_q_of_cuts(
    cuts: Sequence[tuple[int, Truncation]], scores: Sequence[Scores], log_q: torch.Tensor
) -> torch.Tensor:
    """(M,) log q of truncations, nats, each with the number of its complete trace in ``scores`` and
    ``log_q``."""
    if not cuts:
        return log_q[:0]
    texts = {site: k for k, site in enumerate(dict.fromkeys((i, cut.name) for i, cut in cuts))}
    scored = [score for i, name in texts if (score := scores[i][name][1]) is not None]
    closing = [score.closing_log_probs for score in scored if score.closing_log_probs is not None]

    def numbers(values: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(values), device=log_q.device)

    lengths = numbers(len(score.log_probs) for score in scored)
    begins = lengths.cumsum(0) - lengths
    # Sums over the first tokens of each text: (texts, width), beginning with that over none.
    steps = torch.arange(int(lengths.max()) + 1, device=log_q.device)
    inside = (steps > 0) & (steps <= lengths[:, None])
    places = torch.where(inside, begins[:, None] + steps, 0)
    flat = torch.cat([log_q.new_zeros(1), *(score.log_probs for score in scored)])
    sums = flat.index_select(0, places.reshape(-1)).reshape(places.shape).cumsum(1).reshape(-1)
    text = numbers(texts[i, cut.name] for i, cut in cuts)
    length = numbers(cut.length for _, cut in cuts)
    row = text * len(steps)
    whole = log_q.index_select(0, numbers(i for i, _ in cuts))
    rest = sums.index_select(0, row + lengths[text]) - sums.index_select(0, row + length)
    return whole - rest + torch.cat(closing).index_select(0, begins[text] + length)


def _check_support(samples: Sequence[Sample], scores: Sequence[Scores]) -> None:
    """Raises for a live trace to which the guide gives no density."""
    for sample, score in zip(samples, scores, strict=True):
        for name, (log_prob, _) in score.items():
            if sample.log_r > -math.inf and float(log_prob.detach()) == -math.inf:
                node = sample.sites[name]
                is_text = isinstance(node["fn"], LMText)
                value = str(node["fn"].text(node["value"])) if is_text else node["value"].tolist()
                raise ValueError(
                    f"site '{name}': the guide gives probability zero to {value!r}, which the "
                    "program can draw: give both the same support (stop, max_tokens, choices, "
                    "constraint). Or train with loss='elbo', which learns from the guide's own draws "
                    "only"
                )


# --- batches of traces that several processes have ------------------------------------------------


class Cell(NamedTuple):
    """A number of a batch, of a complete trace or of a truncation."""

    log_q: float
    is_scored: bool = True
    cut: tuple[str, int, float, int] | None = None  # what ``Truncation`` has beside its trace


Place = tuple[int, int, int]
"""Of a cell: whether it is of a truncation, the number of the trace, and the length."""


def cells_of(samples: Sequence[AnySample], own: Batch) -> dict[Place, Cell]:
    """The numbers of a batch of this process's traces, in its order; ``samples``: all of the input."""
    number = {id(sample): i for i, sample in own_of(samples).items()}
    log_q = own.log_q.tolist()
    cells: dict[Place, Cell] = {}
    for sample, value, is_scored in zip(own.samples, log_q[: own.num], own.is_scored, strict=True):
        cells[0, number[id(sample)], 0] = Cell(value, is_scored)
    for cut, value in zip(own.truncations, log_q[own.num :], strict=True):
        of_cut = cut.name, cut.length, cut.log_r, cut.full_length
        cells[1, number[id(cut.sample)], cut.length] = Cell(value, cut=of_cut)
    return cells


def whole_batch(
    samples: Sequence[AnySample],
    cells: Mapping[Place, Cell],
    own: Mapping[Place, Cell],
    batch: Batch,
) -> Batch:
    """The batch of all ``samples`` of an input, on the CPU, in which only log q of this process's traces
    has a gradient.

    Args:
        samples: of all processes.
        cells: of all, in the order of their places.
        own: of this one's ``batch``.
    """
    truncations = [
        Truncation(samples[i], *cell.cut) for (_, i, _), cell in cells.items() if cell.cut
    ]
    log_q = spliced({place: cell.log_q for place, cell in cells.items()}, list(own), batch.log_q)
    log_r = [*(sample.log_r for sample in samples), *(cut.log_r for cut in truncations)]
    return Batch(
        samples,
        truncations,
        log_r=log_q.new_tensor(log_r),
        log_q=log_q,
        old_log_q=log_q.detach()[: len(samples)],
        log_prior=log_q.new_tensor([sample.log_p for sample in samples]),
        is_scored=[cell.is_scored for cell in cells.values() if not cell.cut],
    )


def spliced(values: Mapping[K, float], own: Sequence[K], log_probs: torch.Tensor) -> torch.Tensor:
    """Values as a tensor, float64 on the CPU, with ``log_probs`` and their gradient at the places that
    are this process's ``own``."""
    row = {place: k for k, place in enumerate(values)}
    rows = torch.tensor([row[place] for place in own], dtype=torch.long)
    whole = torch.tensor(list(values.values()), dtype=torch.float64)
    return whole.index_put((rows,), log_probs.cpu().to(whole))
