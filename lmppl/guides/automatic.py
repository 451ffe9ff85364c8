"""The automatic guide: the model's latent sites, drawn from an adapted copy of its LM.

Text sites copy ``stop``, ``max_tokens``, ``choices`` and ``temperature`` of the model's, so their
support is the model's, and differ in the prompt (``prompts.py``) and the weights (LoRA). Other
sites get a head (``heads.py``). What neither can stand for is left to the model.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
from pyro.poutine.trace_struct import Trace
from torch import nn

from lmppl.distributions import LMText, SiteScore, score_texts
from lmppl.exclusive import exclusive
from lmppl.guides.heads import Head, head_for, head_key, moved, num_moves
from lmppl.guides.parameters import (
    adapter_config,
    adapter_state,
    base_state,
    config_state,
    load_adapter_state,
    same_base,
    trainable,
)
from lmppl.guides.prompts import (
    OPENING,
    Observations,
    find_observations,
    guide_prompt,
    lines,
    number_comes_first,
    show,
)
from lmppl.lm import LM
from lmppl.primitives import use
from lmppl.runtime import DrawWait, Given, HiddenWait, Proposer, ScoreWait, is_latent, suspend
from lmppl.runtime.simulation import Simulated

if TYPE_CHECKING:
    from peft import LoraConfig


class AutomaticGuide:
    """The guide that follows a program: a ``Guide``.

    Args:
        model: the program.
        base: its language model, from which the adapters are made.
        condition_on: names of the observed sites that it may see, or ``"all"``.
        lora: peft's configuration of the adapters; None: the default.
        adapter_per_site: give each latent text site an adapter of its own.

    Attributes:
        heads: of latent sites that are no texts, made as the sites are met.
        sites: what the text sites were like in training.
    """

    name = "automatic"
    reads_observations = True
    param_names: list[str] = []

    def __init__(
        self,
        model: Callable[..., Any],
        base: LM,
        condition_on: Literal["all"] | Collection[str] = "all",
        lora: LoraConfig | None = None,
        adapter_per_site: bool = False,
    ) -> None:
        self._model, self.base, self.condition_on = model, base, condition_on
        self.adapter_per_site, self._lora = adapter_per_site, lora
        self.heads = nn.ModuleDict()
        self.sites = TrainedSites()
        self._several_inputs = False
        self.told_of_cuts: set[str] = set()  # sites of which it was warned that they read not all
        self._drawn_for: WeakKeyDictionary[LM, bool] = WeakKeyDictionary()
        self._adapters: dict[str, LM] = {}  # of sites; under "" the one that all share
        if not adapter_per_site:
            self.adapter_for("")

    @exclusive()
    def adapter_for(self, name: str) -> LM:
        """The language model from which it draws a latent text site.

        A new adapter has the same first weights every time, so that a seed of ``fit`` is enough to
        reproduce a guide.
        """
        key = name if self.adapter_per_site else ""
        if key not in self._adapters:
            device = self.base.device
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(0)
                self._adapters[key] = self.base.adapter(self._lora)
        return self._adapters[key]

    def draws_for(self, lm: LM) -> bool:
        """Whether it draws the texts of a language model: of its base, loaded once or again, in any
        dtype, and of adapters of it. Those of others it leaves to the model."""
        if lm.vocabulary is self.base.vocabulary:  # its adapters have it, too
            return True
        if lm not in self._drawn_for:
            self._drawn_for[lm] = same_base(base_state(lm), base_state(self.base))
        return self._drawn_for[lm]

    @property
    def adapted_sites(self) -> list[str]:
        """The sites that ``adapters()`` are for; ``""`` for all."""
        return list(self._adapters)

    # --- drawing and scoring ---------------------------------------------------------------------

    def proposer_factory(
        self,
        args: tuple[Any, ...],
        *,
        temperature: float = 1.0,
        observations: Observations | None = None,
    ) -> Callable[[int, int], Proposer]:
        if observations is not None:
            return lambda slot, seed: AutomaticProposer(self, observations, temperature)
        (seen,) = self.observations_of([(self._model, args)])
        return lambda slot, seed: AutomaticProposer(self, seen, temperature, self.sites)

    def recaller(self, args: tuple[Any, ...], observations: Observations) -> AutomaticProposer:
        return AutomaticProposer(self, observations)

    def observations_of(
        self, inputs: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]
    ) -> list[Observations]:
        with use(self.base):
            return find_observations(
                inputs, self.base.vocabulary, self.condition_on, strict=self._strict
            )

    def observations_of_simulation(
        self, one: Simulated, program: Callable[..., Any]
    ) -> Observations | None:
        if not one.is_all_observed or number_comes_first(one.sites):
            return None
        sites = {
            name: node
            for name, node in one.sites.items()
            if name in one.observations
            and (self.condition_on == "all" or name in self.condition_on)
        }
        return show(sites, program, self.base.vocabulary, strict=self._strict)

    @property
    def _strict(self) -> bool:
        """Whether what the guide reads must be certain, lest it takes one input for another."""
        return self._several_inputs or self.condition_on != "all"

    def score(
        self, proposers: Sequence[AutomaticProposer], *, grad: bool = True
    ) -> list[dict[str, SiteScore]]:
        scores: list[dict[str, SiteScore]] = [{} for _ in proposers]
        texts: list[tuple[int, str, TextDraw]] = []
        by_head: dict[str, list[tuple[int, str, HeadDraw]]] = {}
        for i, proposer in enumerate(proposers):
            for name, draw in proposer.draws.items():
                if isinstance(draw, HeadDraw):
                    by_head.setdefault(draw.key, []).append((i, name, draw))
                    continue
                texts.append((i, name, draw))
                if grad:
                    self.sites.learn(name, draw.fn)
        names = [name for _, name, _ in texts]
        fns, values = [draw.fn for _, _, draw in texts], [draw.value for _, _, draw in texts]
        found = score_texts(fns, values, names, grad=grad, score_closing=True)
        for (i, name, _), score in zip(texts, found, strict=True):
            scores[i][name] = score
        with torch.set_grad_enabled(grad):
            for key, draws in by_head.items():
                moves = self.heads[key](torch.stack([draw.features for _, _, draw in draws]))
                for (i, name, draw), move in zip(draws, moves.unbind(), strict=True):
                    scores[i][name] = (moved(draw.fn, move).log_prob(draw.value).sum(), None)
        return scores

    # --- parameters and state --------------------------------------------------------------------

    def start_training(self, *, several_inputs: bool) -> None:
        self._several_inputs = several_inputs
        self.sites = TrainedSites()

    def find_parameters(self, args: tuple[Any, ...]) -> None:
        """Nothing is to be found: they are made as sites are met."""

    def adapters(self) -> list[LM]:
        return list(self._adapters.values())

    def named_parameters(self) -> dict[str, nn.Parameter]:
        named: dict[str, nn.Parameter] = {}
        for i, adapter in enumerate(self._adapters.values()):
            named |= {f"adapter-{i}.{name}": p for name, p in trainable(adapter).items()}
        return named | {f"heads.{name}": p for name, p in self.heads.named_parameters()}

    def identity(self) -> dict[str, Any]:
        return {
            "guide program": None,
            "condition_on": _listed_names(self.condition_on),
            "adapter_per_site": self.adapter_per_site,
        }

    def state_dict(self) -> dict[str, Any]:
        adapters, heads = self.adapters(), {}
        for key, head in self.heads.items():
            heads[key] = {"sizes": head.sizes, "tensors": head.state_dict()}
        return {
            "kind": "automatic",
            "lora": adapter_config(adapters[0]) if adapters else config_state(self._lora),
            "condition_on": _listed_names(self.condition_on),
            "adapted_sites": self.adapted_sites if self.adapter_per_site else None,
            "adapters": [adapter_state(adapter) for adapter in adapters],
            "heads": heads,
            "sites": self.sites.laws,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        sites = [""] if state["adapted_sites"] is None else state["adapted_sites"]
        for site, adapter in zip(sites, state["adapters"], strict=True):
            load_adapter_state(self.adapter_for(site), adapter)
        for key, head in state["heads"].items():
            if key not in self.heads:
                self.heads[key] = Head(*head["sizes"])
            self.heads[key].load_state_dict(head["tensors"])
        self.sites = TrainedSites(state["sites"])


def _listed_names(condition_on: Literal["all"] | Collection[str]) -> Any:
    return "all" if condition_on == "all" else sorted(condition_on)


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
        guide: its language models and heads are drawn from.
        observations: what it may see of the input.
        temperature: of the behaviour policy: text is drawn from ``q ** (1 / temperature)``;
            ``math.inf``: everything is drawn from the model instead.
        sites: that it was trained on, to warn of others.

    Attributes:
        draws: what was drawn, by site, so that it can be scored again with gradients.
    """

    def __init__(
        self,
        guide: AutomaticGuide,
        observations: Observations,
        temperature: float = 1.0,
        sites: TrainedSites | None = None,
    ) -> None:
        self._guide, self._observations = guide, observations
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
        key, features = self._head_at(name, trace, moves, None)
        with torch.no_grad():
            is_prior = self._temperature == math.inf
            q_fn = fn if is_prior else moved(fn, self._guide.heads[key](features))
            value = q_fn.sample()
            log_q = q_fn.log_prob(value).sum()
        self.draws[name] = HeadDraw(key, features, fn, value)
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
            self.draws[name] = HeadDraw(*self._head_at(name, trace, moves, features), fn, value)

    def condition(self, site: Any, trace: Trace, value: torch.Tensor) -> torch.Tensor | None:
        """Go on as if it had drawn ``value`` at a site.

        Returns:
            log q of the value, given what was drawn before (0-d, nats); None if the guide leaves the
            site to the model.
        """
        self.recall(site, trace, value, None)
        draw = self.draws.get(site["name"])
        if draw is None:
            return None
        if isinstance(draw, TextDraw):
            return suspend(ScoreWait(site["name"], draw.fn, value))[0]
        with torch.no_grad():
            return moved(draw.fn, self._guide.heads[draw.key](draw.features)).log_prob(value).sum()

    def _text_guide(self, site: Any, trace: Trace) -> LMText | None:
        """What the guide draws a text from; None: it leaves the site to the model."""
        fn: LMText = site["fn"]
        if fn.batch_shape or not self._guide.draws_for(fn.lm):
            return None
        if self._sites is not None:
            self._sites.check(site["name"], fn)
        prompt = guide_prompt(site, trace, self._observations, self._guide.told_of_cuts)
        return fn.with_prefix_ids(prompt, self._guide.adapter_for(site["name"]), fn.temperature)

    def _head_at(
        self, name: str, trace: Trace, moves: int, features: torch.Tensor | None
    ) -> tuple[str, torch.Tensor]:
        """The key of a site's head, one for each list of latents before it that are no texts, and what
        the head reads there (None: to be found out)."""
        others = [
            other
            for other, node in trace.nodes.items()
            if node["type"] == "sample" and is_latent(node) and not isinstance(node["fn"], LMText)
        ]
        key = head_key([name, *others])
        if features is None:
            features = self._features(name, trace)
        num_numbers = len(features) - self._guide.base.hidden_size
        head_for(self._guide.heads, key, name, (len(features), moves, num_numbers))
        return key, features

    def _features(self, name: str, trace: Trace) -> torch.Tensor:
        """What a head sees: the LM's state after the texts so far, and the other latents."""
        base = self._guide.base
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
                    told = self._guide.told_of_cuts
                    tokens = guide_prompt(node, Trace(), self._observations, told)
                tokens += fn.token_ids(value)
            else:
                numbers.append(value.detach().float().reshape(-1))
        if not tokens:
            seen = self._observations
            vocabulary = base.vocabulary
            tokens = (*vocabulary.bos_ids, *lines(seen, vocabulary), *seen.get(OPENING, ()))
        # As many features without a token to read: on another input there may be one.
        state = torch.zeros(base.hidden_size)
        if base.context_length is not None:
            tokens = tokens[-base.context_length :]
        if tokens:
            state = suspend(HiddenWait(name, base, tokens)).float()
        return torch.cat([*numbers, state])

    def finish(self, trace: Trace) -> None:
        """An automatic guide follows the model, so nothing can be left over."""

    def fork(self, streams: Proposer) -> AutomaticProposer:
        new = AutomaticProposer(self._guide, self._observations, self._temperature, self._sites)
        new.draws = dict(self.draws)
        return new

    def close(self) -> None:
        """Nothing of it is suspended on its own."""


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
        known, law = self.laws.get(name, {}), _law_of(fn)
        changed = [key for key, value in known.items() if value != law[key]]
        if not changed or name in self._warned:
            return
        self._warned.add(name)
        before, now = (", ".join(f"{k}={of[k]!r}" for k in changed) for of in (known, law))
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
