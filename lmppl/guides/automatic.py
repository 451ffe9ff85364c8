"""The automatic guide: the model's latent sites, drawn from an adapted copy of its LM.

Text sites copy ``stop``, ``max_tokens``, ``choices`` and ``temperature`` of the model's, so their
support is the model's, and differ in the prompt (``prompts.py``) and the weights (LoRA). Other
sites get a head (``heads.py``). What neither can stand for is left to the model.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from pyro.poutine.trace_struct import Trace
from torch import nn

from lmppl.distributions import LMText, score_texts
from lmppl.guides.heads import Head, moved, num_moves
from lmppl.guides.prompts import OPENING, Observations, guide_prompt, lines
from lmppl.lm import LM
from lmppl.lm.batches.requests import Scored
from lmppl.runtime import DrawWait, Given, HiddenWait, Proposer, is_latent, suspend

SiteScore = tuple[torch.Tensor, Scored | None]
"""log q of a site's value (0-d, nats), and its terms token by token where it is a text."""


class _Networks(Protocol):
    """What an automatic guide draws from."""

    @property
    def base(self) -> LM: ...

    def adapter_for(self, name: str) -> LM: ...

    @property
    def heads(self) -> nn.ModuleDict: ...


@dataclass(frozen=True, eq=False)
class TextDraw:
    fn: LMText
    value: torch.Tensor


@dataclass(frozen=True, eq=False)
class HeadDraw:
    key: str
    features: torch.Tensor  # (num_features,) float32
    fn: Any  # the model's own distribution
    value: torch.Tensor


class AutomaticProposer:
    """Proposes the latents of one particle.

    Args:
        networks: the guide's language models and heads.
        observations: what it may see of the input.
        temperature: of the behaviour policy: text is drawn from ``q ** (1 / temperature)``;
            ``math.inf``: everything is drawn from the model instead.
        sites: that it was trained on, to warn of others.

    Attributes:
        draws: what was drawn, by site, so that it can be scored again with gradients.
    """

    def __init__(
        self,
        networks: _Networks,
        observations: Observations,
        temperature: float = 1.0,
        sites: TrainedSites | None = None,
    ) -> None:
        self._networks, self._observations = networks, observations
        self._temperature, self._sites = temperature, sites
        self.draws: dict[str, TextDraw | HeadDraw] = {}

    def propose(self, site: Any, trace: Trace) -> Given | None:
        name, fn = site["name"], site["fn"]
        if isinstance(fn, LMText):
            q = self._text_guide(site, trace)
            if q is None:
                return None
            behaviour = q
            if self._temperature == math.inf:
                behaviour = fn
            elif self._temperature != 1.0:
                heat = fn.temperature * self._temperature
                behaviour = q.with_prefix_ids(q.prefix_ids, q.lm, heat)
            uniforms = torch.rand(q.num_uniforms, dtype=torch.float64, device="cpu")
            value, log_q = suspend(DrawWait(name, behaviour, uniforms))
            self.draws[name] = TextDraw(q, value)
            return Given(value, proposal_log_prob=log_q)
        moves = num_moves(fn)
        if moves is None:
            return None
        draw = self._head_draw(site, trace, moves, None)
        head = self._networks.heads[draw.key]
        with torch.no_grad():
            q_fn = fn if self._temperature == math.inf else moved(fn, head(draw.features))
            value = q_fn.sample()
            log_q = q_fn.log_prob(value).sum()
        self.draws[name] = replace(draw, value=value)
        return Given(value, proposal_log_prob=log_q)

    def recall(
        self, site: Any, trace: Trace, value: torch.Tensor, features: torch.Tensor | None
    ) -> None:
        """Remember ``value`` as what was drawn at a site, if it is one that the guide draws.

        Args:
            site: the latent site's Pyro message.
            trace: the run so far.
            value: of the site.
            features: what the head reads there; None: to be found out.
        """
        name, fn = site["name"], site["fn"]
        if isinstance(fn, LMText):
            q = self._text_guide(site, trace)
            if q is not None:
                self.draws[name] = TextDraw(q, value)
            return
        moves = num_moves(fn)
        if moves is not None:
            self.draws[name] = replace(self._head_draw(site, trace, moves, features), value=value)

    def _text_guide(self, site: Any, trace: Trace) -> LMText | None:
        """What the guide draws a text from; None: it leaves the site to the model."""
        fn: LMText = site["fn"]
        # An adapter of the base, as of a program that learns, has the base's own vocabulary.
        if fn.lm.vocabulary is not self._networks.base.vocabulary or fn.batch_shape:
            return None
        if self._sites is not None:
            self._sites.check(site["name"], fn)
        prompt = guide_prompt(site, trace, self._observations)
        return fn.with_prefix_ids(prompt, self._networks.adapter_for(site["name"]), fn.temperature)

    def _head_draw(
        self, site: Any, trace: Trace, moves: int, features: torch.Tensor | None
    ) -> HeadDraw:
        """A draw from a site's head, its value not yet known."""
        key = self._head_key(site["name"], trace)
        if features is None:
            features = self._features(site["name"], trace)
        numbers = len(features) - self._networks.base.hidden_size
        head_for(self._networks.heads, key, site["name"], len(features), moves, numbers)
        return HeadDraw(key, features, site["fn"], torch.empty(0))

    def _head_key(self, name: str, trace: Trace) -> str:
        """The head of a site after these other latents that are no texts."""
        others = [
            other
            for other, node in trace.nodes.items()
            if node["type"] == "sample" and is_latent(node) and not isinstance(node["fn"], LMText)
        ]
        return _key([name, *others])

    def _features(self, name: str, trace: Trace) -> torch.Tensor:
        """What a head sees: the LM's state after the texts so far, and the other latents."""
        base = self._networks.base
        tokens: tuple[int, ...] = ()
        numbers: list[torch.Tensor] = []
        for node in trace.nodes.values():
            if node["type"] != "sample" or not is_latent(node):
                continue
            fn, value = node["fn"], node["value"]
            if isinstance(fn, LMText):
                if fn.batch_shape or not fn.lm.vocabulary.same_as(base.vocabulary):
                    continue
                if not tokens:
                    tokens = guide_prompt(node, Trace(), self._observations)
                tokens += fn.token_ids(value)
            else:
                numbers.append(value.detach().float().reshape(-1))
        if not tokens:
            seen = self._observations
            vocabulary = base.vocabulary
            tokens = (*vocabulary.bos_ids, *lines(seen, vocabulary), *seen.get(OPENING, ()))
        # As many features without a token to read: on another input there may be one.
        state = torch.zeros(base.hidden_size)
        if tokens:
            state = suspend(HiddenWait(name, base, tokens)).float()
        return torch.cat([*numbers, state])

    def learn_sites(self, sites: TrainedSites) -> None:
        """Note what its draws are trained on."""
        for name, draw in self.draws.items():
            if isinstance(draw, TextDraw):
                sites.learn(name, draw.fn)

    def finish(self, trace: Trace) -> None:
        """An automatic guide follows the model, so nothing can be left over."""

    def fork(self, streams: Proposer) -> AutomaticProposer:
        new = AutomaticProposer(self._networks, self._observations, self._temperature, self._sites)
        new.draws = dict(self.draws)
        return new

    def close(self) -> None:
        """Nothing of it is suspended on its own."""


def _key(names: list[str]) -> str:
    """Names of sites as the name of a module, which has no dots and is no attribute of modules."""
    escaped = [name.replace("_", "__").replace(".", "_d").replace("-", "_h") for name in names]
    return "-".join(["head", *escaped])


def head_for(
    heads: nn.ModuleDict,
    key: str,
    name: str,
    num_features: int,
    num_moves: int,
    num_numbers: int,
) -> Head:
    """The head of a site, made when the site is first met.

    Args:
        heads: those that there are.
        key: of the head.
        name: of the site, for messages.
        num_features, num_moves, num_numbers: see ``Head``.
    """
    if key not in heads:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(len(heads))
            heads[key] = Head(num_features, num_moves, num_numbers)
    head = heads[key]
    assert isinstance(head, Head)
    if (head.num_features, head.num_moves) != (num_features, num_moves):
        raise ValueError(
            f"site '{name}': its guide was made for {head.num_features} features and "
            f"{head.num_moves} parameters, and now there are {num_features} and {num_moves}: a "
            "latent site must keep its shape and the latents before it on every run"
        )
    return head


def score_draws(
    networks: _Networks, proposers: list[AutomaticProposer], *, grad: bool
) -> list[dict[str, SiteScore]]:
    """log q of all that the proposers drew, in one batched pass; per proposer, by site."""
    texts = [
        (i, name, draw)
        for i, proposer in enumerate(proposers)
        for name, draw in proposer.draws.items()
        if isinstance(draw, TextDraw)
    ]
    scores: list[dict[str, SiteScore]] = [{} for _ in proposers]
    results = score_texts(
        [draw.fn for _, _, draw in texts],
        [draw.value for _, _, draw in texts],
        [name for _, name, _ in texts],
        grad=grad,
        score_closing=True,
    )
    for (i, name, _), result in zip(texts, results, strict=True):
        scores[i][name] = result
    for i, proposer in enumerate(proposers):
        for name, draw in proposer.draws.items():
            if isinstance(draw, HeadDraw):
                with torch.set_grad_enabled(grad):
                    q_fn = moved(draw.fn, networks.heads[draw.key](draw.features))
                    scores[i][name] = (q_fn.log_prob(draw.value).sum(), None)
    return scores


# --- the text sites that a guide was trained on, so that its use for other ones is noticed ---------

Law = dict[str, Any]
"""What is fixed of a site's distribution, apart from its prefix; in JSON's types."""


class TrainedSites:
    """What each text site of a program was like when its guide was trained.

    A guide takes the support of the program that it is used for, so it is a valid proposal for any.
    But one that has learned texts of 4 tokens knows nothing of texts of 40.

    Args:
        laws: of each site, by its name.
    """

    def __init__(self, laws: Mapping[str, Law] | None = None) -> None:
        self.laws: dict[str, Law] = dict(laws or {})
        self._warned: set[str] = set()

    def learn(self, name: str, fn: LMText) -> None:
        """Note a site in training. What differs from one input to the next is not held to be fixed."""
        law = _law_of(fn)
        known = self.laws.setdefault(name, law)
        if known != law:
            self.laws[name] = {key: value for key, value in known.items() if value == law[key]}

    def check(self, name: str, fn: LMText) -> None:
        """Warn, once a site, where it is not what it was in training."""
        known = self.laws.get(name)
        if known is None or name in self._warned:
            return
        law = _law_of(fn)
        changed = [key for key, value in known.items() if value != law[key]]
        if not changed:
            return
        self._warned.add(name)
        before, now = (_listed({key: each[key] for key in changed}) for each in (known, law))
        warnings.warn(
            f"site '{name}': the guide was trained with {before}, and the program has {now}. It is a "
            "valid proposal, but for a posterior that it has not learned: train it anew, or use it "
            "with the program that it was trained for",
            stacklevel=2,
        )


def _law_of(fn: LMText) -> Law:
    return {
        "max_tokens": fn.stopping.max_tokens,
        "stop": list(fn.stopping.stop),
        "choices": fn.choices is not None,  # which ones may depend on the input
        "temperature": fn.temperature,
    }


def _listed(law: Law) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in law.items())
