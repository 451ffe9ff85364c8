"""The samples of one input as tensors: what a loss is computed from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from lmppl import runtime
from lmppl.distributions import LMText, SiteScore
from lmppl.training.samples import Sample, Truncation


@dataclass(frozen=True, eq=False)
class Batch:
    """The samples of one input, with what the guide says of them.

    Attributes:
        samples: N complete traces.
        truncations: M truncations of some of them.
        log_r: (N + M,) log joints, nats; ``-inf`` where R = 0. Traces come first.
        log_q: (N + M,) the guide's log-densities, nats, with gradient.
        old_log_q: (N,) of the guide that drew them: equal to ``log_q`` at the first update.
        log_prior: (N,) the program's own log-density of the latents, nats.
        beta: the inverse temperature that is in ``log_r``.
        log_z: the learned log evidence of the input, 0-d, where one is learned.
    """

    samples: Sequence[Sample]
    truncations: Sequence[Truncation]
    log_r: torch.Tensor
    log_q: torch.Tensor
    old_log_q: torch.Tensor
    log_prior: torch.Tensor
    beta: float = 1.0
    log_z: torch.Tensor | None = None

    @property
    def num(self) -> int:
        """How many complete traces it holds."""
        return len(self.samples)

    def origin(self, *origins: str) -> torch.Tensor:
        """(N,) bool: the complete traces that come from there."""
        return torch.tensor([sample.origin in origins for sample in self.samples])

    @property
    def alive(self) -> bool:
        """Whether any trace has a positive probability."""
        return bool((self.log_r[: self.num] > -math.inf).any())

    def tempered(self, beta: float, log_z: torch.Tensor | None = None) -> Batch:
        """The same with the reward ``R ** beta``, and a learned log evidence."""
        log_r = torch.where(self.log_r == -math.inf, -math.inf, self.log_r * beta)
        return replace(self, log_r=log_r, beta=beta, log_z=log_z)

    def cuts_of_samples(self) -> Iterator[tuple[list[int], list[int]]]:
        """For each trace: the rows of its truncations, by length, and its own; and how many tokens
        of the last text each of them keeps."""
        cuts: dict[int, list[int]] = {}
        for k in sorted(range(len(self.truncations)), key=lambda k: self.truncations[k].length):
            cuts.setdefault(id(self.truncations[k].sample), []).append(k)
        for i, sample in enumerate(self.samples):
            ks = cuts.get(id(sample), [])
            end = self.truncations[ks[0]].full_length if ks else 0
            yield [*(self.num + k for k in ks), i], [*(self.truncations[k].length for k in ks), end]

    def figures(self) -> dict[str, float]:
        """What the guide's own draws say of it; NaN if there are none."""
        figures = {
            "log_z": math.nan,
            "elbo": math.nan,
            "ess": math.nan,
            "alive": math.nan,
            "length": sum(sample.num_tokens for sample in self.samples) / self.num,
        }
        drawn = self.origin("guide")
        if not bool(drawn.any()):
            return figures
        log_r, log_q = self.log_r[: self.num][drawn], self.log_q.detach()[: self.num][drawn]
        live = log_r > -math.inf
        u = (log_r - log_q)[live]
        if len(u):
            figures["log_z"] = float(torch.logsumexp(u, 0)) - math.log(len(live))
            figures["elbo"] = float(u.mean())
        else:
            figures["log_z"] = -math.inf
        figures["ess"] = runtime.ess(u) / len(live)
        figures["alive"] = len(u) / len(live)
        return figures


Scores = Mapping[str, SiteScore]
"""What a guide says of a trace, by site."""


def batches_of(
    samples: Sequence[Sequence[Sample]],
    truncations: Sequence[Truncation],
    scores: Sequence[Scores],
    old_log_q: Sequence[torch.Tensor] | None = None,
) -> list[Batch]:
    """The samples of each input as tensors.

    Args:
        samples: of each input.
        truncations: of any of them; those that the guide has not scored token by token are left out.
        scores: of each sample, one input after the other.
        old_log_q: of each input, (N,), of the guide that drew them; None: of this one.

    Raises:
        ValueError: if the guide draws no latent of a live trace, or cannot draw one of them.
    """
    flat = [sample for of_input in samples for sample in of_input]
    table = _ScoreTable(flat, scores)
    index = {id(sample): i for i, sample in enumerate(flat)}
    usable = [t for t in truncations if scores[index[id(t.sample)]][t.name][1] is not None]
    cut_log_q = table.log_q_of_cuts(usable, [index[id(t.sample)] for t in usable])
    rows: list[list[int]] = [[] for _ in samples]
    owner = [k for k, of_input in enumerate(samples) for _ in of_input]
    for row, truncation in enumerate(usable):
        rows[owner[index[id(truncation.sample)]]].append(row)
    found: list[Batch] = []
    first = 0
    for k, of_input in enumerate(samples):
        here = slice(first, first + len(of_input))
        first = here.stop
        if not any(scores[here]) and any(sample.log_r > -math.inf for sample in of_input):
            # (A dead trace may have ended before its first latent.)
            raise ValueError("the guide has proposed no latent site of the program")
        cuts = [usable[row] for row in rows[k]]
        log_q = table.log_q[here]
        log_r = [*(sample.log_r for sample in of_input), *(cut.log_r for cut in cuts)]
        found.append(
            Batch(
                of_input,
                cuts,
                log_q.new_tensor(log_r),
                torch.cat([log_q, cut_log_q[rows[k]]]),
                log_q.detach() if old_log_q is None else old_log_q[k],
                log_q.new_tensor([sample.log_p for sample in of_input]),
            )
        )
    return found


class _ScoreTable:
    """What a guide says of N traces, as tensors. Sites are many, so nothing here is done one by one
    that would leave a node in the graph.

    Attributes:
        log_q: (N,) log-densities of whole traces, nats. Latents that the guide has not are drawn
            from the model, so they have its density.
    """

    def __init__(self, samples: Sequence[Sample], scores: Sequence[Scores]) -> None:
        self._scores = scores
        self._at: dict[tuple[int, str], int] = {}
        width = max(map(len, scores), default=0)
        terms: list[torch.Tensor] = []
        places: list[int] = []
        for i, score in enumerate(scores):
            for j, (name, (log_prob, _)) in enumerate(score.items()):
                self._at[i, name] = len(terms)
                terms.append(log_prob)
                places.append(i * width + j)
        left = torch.tensor(
            [sample.log_left(score) for sample, score in zip(samples, scores, strict=True)]
        )
        if not terms:
            self._terms, self.log_q = left, left
            return
        home = next((term for term in terms if term.requires_grad), terms[0])
        if any(term.device != home.device for term in terms):
            terms = [term.to(home.device) for term in terms]
        self._terms = torch.stack(terms).to(home.dtype)
        table = self._terms.new_zeros(len(samples) * width)
        table = table.index_copy(0, torch.tensor(places, device=home.device), self._terms)
        self.log_q = table.reshape(len(samples), width).sum(1) + left.to(table)
        if bool((self.log_q.detach() == -math.inf).any()):
            _check_support(samples, scores)

    def log_q_of_cuts(
        self, truncations: Sequence[Truncation], samples: Sequence[int]
    ) -> torch.Tensor:
        """(M,) log q of truncated traces, nats, from the scores of the complete ones.

        Args:
            truncations: M.
            samples: of each, the number of its trace.
        """
        if not truncations:
            return self.log_q[:0]
        device = self.log_q.device
        texts: dict[tuple[int, str], int] = {}
        for i, truncation in zip(samples, truncations, strict=True):
            texts.setdefault((i, truncation.name), len(texts))
        terms = [self._scores[i][name][1] for i, name in texts]
        log_probs = [term.log_probs for term in terms if term is not None]
        closing = [
            c for term in terms if term is not None and (c := term.closing_log_probs) is not None
        ]
        lengths = torch.tensor([len(each) for each in log_probs], device=device)
        begins = lengths.cumsum(0) - lengths
        # Sums over the first tokens of each text: (texts, width + 1), padded with the zero in front.
        steps = torch.arange(int(lengths.max()) + 1, device=device)
        inside = (steps > 0) & (steps <= lengths[:, None])
        places = torch.where(inside, begins[:, None] + steps, 0)
        flat = torch.cat([self.log_q.new_zeros(1), *log_probs])
        sums = flat.index_select(0, places.reshape(-1)).reshape(places.shape).cumsum(1)
        text = torch.tensor([texts[i, t.name] for i, t in zip(samples, truncations, strict=True)])
        length = torch.tensor([t.length for t in truncations])
        site = torch.tensor(
            [self._at[i, t.name] for i, t in zip(samples, truncations, strict=True)]
        )
        text, length, site = text.to(device), length.to(device), site.to(device)
        cut = sums.reshape(-1).index_select(0, text * len(steps) + length)
        closed = torch.cat(closing).index_select(0, begins[text] + length)
        whole = self.log_q.index_select(0, torch.tensor(samples, device=device))
        return whole - self._terms.index_select(0, site) + cut + closed


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
                    "program can draw: give both the same support (stop, max_tokens, choices). Or "
                    "train with loss='elbo', which learns from the guide's own draws only"
                )
