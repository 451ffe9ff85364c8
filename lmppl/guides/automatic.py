"""The automatic guide: the model's latent sites, drawn from an adapted copy of its LM.

Text sites copy ``stop``, ``max_tokens``, ``choices``, the constraint and ``temperature`` of the
model's, so their support is the model's, and differ in the prompt (``prompts.py``) and the weights
(LoRA). Under a constraint they draw among the tokens that it allows (``LMText.guided``). Other sites
get a head (``heads.py``). What neither can stand for is left to the model.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from pyro.poutine.trace_struct import Trace
from torch import nn

from lmppl import runtime
from lmppl.distributions import LMText, SiteScore, score_texts
from lmppl.exclusive import exclusive
from lmppl.guides import parameters, prompts
from lmppl.guides.guide import Guide
from lmppl.guides.heads import Head, head_for, make_head, moved, num_moves
from lmppl.guides.prompts import OPENING, Observations, ProgramInput, SiteNames
from lmppl.lm import LM
from lmppl.primitives import use
from lmppl.runtime import Given, Proposer, ProposerFactory, latents_of, suspend
from lmppl.runtime.arguments import Args
from lmppl.runtime.simulation import Simulated

if TYPE_CHECKING:
    from peft import LoraConfig


class AutomaticGuide(Guide):
    """The guide that follows a program: a ``Guide``. Its arguments are those of ``LMGuide``.

    Attributes:
        heads: of latent sites that are no texts, made as the sites are met.
        sites: what the text sites were like in training.
    """

    name = "automatic"
    reads_observations = True

    def __init__(
        self,
        model: Callable[..., Any],
        base: LM,
        condition_on: SiteNames = "all",
        lora: LoraConfig | None = None,
        adapter_per_site: bool = False,
    ) -> None:
        self._model, self.base, self._lora = model, base, lora
        self.condition_on: Any = "all" if condition_on == "all" else sorted(condition_on)
        self.adapter_per_site = adapter_per_site
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
        """The language model that a latent text site is drawn from. It has the same first weights
        every time, so that a seed of ``fit`` is enough to reproduce a guide."""
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
            states = map(parameters.base_state, (lm, self.base))
            self._drawn_for[lm] = parameters.same_base(*states)
        return self._drawn_for[lm]

    @property
    def adapted_sites(self) -> list[str]:
        """The sites that ``adapters()`` are for; ``""`` for all."""
        return list(self._adapters)

    # --- drawing and scoring ---------------------------------------------------------------------

    def proposer_factory(
        self, args: Args, *, temperature: float = 1.0, observations: Observations | None = None
    ) -> ProposerFactory:
        if observations is not None:
            return lambda slot, seed: AutomaticProposer(self, observations, temperature)
        (seen,) = self.observations_of([(self._model, args)])
        return lambda slot, seed: AutomaticProposer(self, seen, temperature, self.sites)

    def recaller(self, args: Args, observations: Observations) -> AutomaticProposer:
        return AutomaticProposer(self, observations)

    def observations_of(self, inputs: Sequence[ProgramInput]) -> list[Observations]:
        vocabulary = self.base.vocabulary
        with use(self.base):
            return prompts.find_observations(
                inputs, vocabulary, self.condition_on, strict=self._strict
            )

    def observations_of_simulation(
        self, one: Simulated, program: Callable[..., Any]
    ) -> Observations | None:
        if not one.is_all_observed or prompts.number_comes_first(one.sites):
            return None
        seen = set(one.observations)
        if self.condition_on != "all":
            seen &= set(self.condition_on)
        sites = {name: node for name, node in one.sites.items() if name in seen}
        return prompts.show(sites, program, self.base.vocabulary, strict=self._strict)

    @property
    def _strict(self) -> bool:
        """Whether what the guide reads must be certain, lest it takes one input for another."""
        return self._several_inputs or self.condition_on != "all"

    def score(
        self, proposers: Sequence[AutomaticProposer], *, grad: bool = True
    ) -> list[dict[str, SiteScore]]:
        scores: list[dict[str, SiteScore]] = [{} for _ in proposers]
        texts: list[tuple[dict[str, SiteScore], str, TextDraw]] = []
        by_head: dict[Head, list[tuple[dict[str, SiteScore], str, HeadDraw]]] = {}
        for score, proposer in zip(scores, proposers, strict=True):
            for name, draw in proposer.draws.items():
                if isinstance(draw, HeadDraw):
                    by_head.setdefault(draw.head, []).append((score, name, draw))
                    continue
                texts.append((score, name, draw))
                if grad:
                    self.sites.learn(name, draw.fn)
        names = [name for _, name, _ in texts]
        fns, values = [draw.fn for _, _, draw in texts], [draw.value for _, _, draw in texts]
        found = score_texts(fns, values, names, grad=grad, score_closing=True)
        for (score, name, _), site_score in zip(texts, found, strict=True):
            score[name] = site_score
        with torch.set_grad_enabled(grad):
            for head, draws in by_head.items():
                moves = head(torch.stack([draw.features for _, _, draw in draws]))
                for (score, name, draw), move in zip(draws, moves.unbind(), strict=True):
                    score[name] = (moved(draw.fn, move).log_prob(draw.value).sum(), None)
        return scores

    # --- parameters and state --------------------------------------------------------------------

    def start_training(self, *, several_inputs: bool) -> None:
        self._several_inputs = several_inputs
        self.sites = TrainedSites()

    def parts(self) -> dict[str, Any]:
        heads: Any = self.heads
        sizes = {key: list(head.sizes) for key, head in heads.items()}
        return {"adapters": sorted(self._adapters), "heads": sizes, "sites": self.sites.laws}

    def make_parts(self, parts: Mapping[str, Any]) -> None:
        for site in parts["adapters"]:
            self.adapter_for(site)
        for key, sizes in parts["heads"].items():
            make_head(self.heads, key, tuple(sizes))
        self.sites.merge(parts["sites"])

    def adapters(self) -> list[LM]:
        return list(self._adapters.values())

    def named_parameters(self) -> dict[str, nn.Parameter]:
        named: dict[str, nn.Parameter] = {}
        for site, adapter in self._adapters.items():  # each process has its own order of sites
            of_site = f"adapter-{site}" if self.adapter_per_site else "adapter-0"
            named |= {f"{of_site}.{name}": p for name, p in parameters.trainable(adapter).items()}
        return named | {f"heads.{name}": p for name, p in self.heads.named_parameters()}

    def identity(self) -> dict[str, Any]:
        return {
            "guide program": None,
            "condition_on": self.condition_on,
            "adapter_per_site": self.adapter_per_site,
        }

    def state_dict(self) -> dict[str, Any]:
        adapters = [parameters.adapter_state(adapter) for adapter in self.adapters()]
        heads = self.heads.items()
        return {
            "kind": "automatic",
            "lora": adapters[0]["config"] if adapters else parameters.config_state(self._lora),
            "condition_on": self.condition_on,
            "adapted_sites": self.adapted_sites if self.adapter_per_site else None,
            "adapters": adapters,
            "heads": {k: {"sizes": head.sizes, "tensors": head.state_dict()} for k, head in heads},
            "sites": self.sites.laws,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        sites = [""] if state["adapted_sites"] is None else state["adapted_sites"]
        for site, adapter in zip(sites, state["adapters"], strict=True):
            parameters.load_adapter_state(self.adapter_for(site), adapter)
        for key, head in state["heads"].items():
            if key not in self.heads:
                self.heads[key] = Head(*head["sizes"])
            self.heads[key].load_state_dict(head["tensors"])
        self.sites = TrainedSites(state["sites"])


@dataclass(frozen=True, eq=False)
class TextDraw:
    fn: LMText  # the guide's
    value: Any  # a tensor; None: not drawn yet


@dataclass(frozen=True, eq=False)
class HeadDraw:
    head: Head
    features: torch.Tensor  # (num_features,) float32
    fn: Any  # the model's own distribution
    value: Any

    def guide_fn(self) -> Any:
        """The distribution that it is drawn from."""
        return moved(self.fn, self.head(self.features))


@dataclass(eq=False)
class AutomaticProposer(Proposer):
    """Proposes the latents of one particle, and warns of sites that are other than ``sites``. What it
    drew is in ``draws``, by site, so that it can be scored again with gradients."""

    guide: AutomaticGuide
    observations: Observations
    temperature: float = 1.0
    sites: TrainedSites | None = None
    draws: dict[str, TextDraw | HeadDraw] = field(default_factory=dict)

    def propose(self, site: Any, trace: Trace) -> Given | None:
        name, is_prior = site["name"], self.temperature == math.inf
        draw = self._draw_at(site, trace)
        if draw is None:
            return None
        if isinstance(draw, TextDraw):
            q = draw.fn
            behaviour = site["fn"] if is_prior else q
            if not is_prior and self.temperature != 1.0:
                heat = q.temperature * self.temperature
                behaviour = q.with_prefix_ids(q.prefix_ids, q.lm, heat)
            uniforms = torch.rand(q.num_uniforms, dtype=torch.float64, device="cpu")
            value, _, log_q, _ = suspend(runtime.DrawWait(name, behaviour, uniforms))
        else:
            with torch.no_grad():
                q_fn = draw.fn if is_prior else draw.guide_fn()
                value = q_fn.sample()
                log_q = q_fn.log_prob(value).sum()
        self.draws[name] = replace(draw, value=value)
        return Given(value, proposal_log_prob=log_q)

    def recall(self, site: Any, trace: Trace, value: torch.Tensor, features: Any) -> None:
        """Remember a value as what was drawn at a site, if it is one that the guide draws;
        ``features`` are what its head reads there, if that is known."""
        draw = self._draw_at(site, trace, value, features)
        if draw is not None:
            self.draws[site["name"]] = draw

    def condition(self, site: Any, trace: Trace, value: torch.Tensor) -> torch.Tensor | None:
        """See ``MixtureProposer``."""
        self.recall(site, trace, value, None)
        draw = self.draws.get(site["name"])
        if isinstance(draw, TextDraw):
            return suspend(runtime.ScoreWait(site["name"], draw.fn, value))[0]
        with torch.no_grad():
            return None if draw is None else draw.guide_fn().log_prob(value).sum()

    def law(self, site: Any, trace: Trace) -> Any:
        """The distribution that the guide draws a site from; None: it leaves the site to the model. See
        ``laws.Laws``."""
        draw = self._draw_at(site, trace)
        if isinstance(draw, HeadDraw):
            with torch.no_grad():
                return draw.guide_fn()
        return None if draw is None else draw.fn

    def resumed(self, latents: Mapping[str, Any], streams: Proposer) -> AutomaticProposer:
        """A proposer that goes on after latents that are given; it does not remember them."""
        return replace(self, draws={})

    def _draw_at(
        self, site: Any, trace: Trace, value: Any = None, features: Any = None
    ) -> TextDraw | HeadDraw | None:
        """The guide's draw of a site, and what it is from; None: it leaves the site to the model."""
        name, fn, guide = site["name"], site["fn"], self.guide
        if isinstance(fn, LMText):
            if fn.batch_shape or not guide.draws_for(fn.lm):
                return None
            if self.sites is not None:
                self.sites.check(name, fn)
            prompt = prompts.guide_prompt(site, trace, self.observations, guide.told_of_cuts)
            q = fn.with_prefix_ids(prompt, guide.adapter_for(name), fn.temperature).guided()
            return TextDraw(q, value)
        moves = num_moves(fn)
        if moves is None:
            return None
        # There is a head for each list of latents before it that are no texts.
        nodes = latents_of(trace).items()
        names = [name, *(n for n, node in nodes if not isinstance(node["fn"], LMText))]
        features = self._features(name, trace) if features is None else features
        num_numbers = len(features) - guide.base.hidden_size
        head = head_for(guide.heads, names, (len(features), moves, num_numbers))
        return HeadDraw(head, features, fn, value)

    def _features(self, name: str, trace: Trace) -> torch.Tensor:
        """What a head reads: the numbers before it, and the LM's state after the texts."""
        base, seen = self.guide.base, self.observations
        tokens: tuple[int, ...] = ()
        numbers: list[torch.Tensor] = []
        for node in latents_of(trace).values():
            if not isinstance(node["fn"], LMText):
                numbers.append(node["value"].detach().float().reshape(-1))
            elif prompts.is_text(node, base.vocabulary):
                if not tokens:
                    tokens = prompts.guide_prompt(node, Trace(), seen, self.guide.told_of_cuts)
                tokens += node["fn"].token_ids(node["value"])
        if not tokens:
            bos = base.vocabulary.bos_ids
            tokens = (*bos, *prompts.lines(seen, base.vocabulary), *seen.get(OPENING, ()))
        # As many features without a token to read: on another input there may be one.
        state = torch.zeros(base.hidden_size)
        if tokens:
            last = tokens[-(base.context_length or len(tokens)) :]
            state = suspend(runtime.HiddenWait(name, base, last)).float()
        return torch.cat([*numbers, state])

    def fork(self, streams: Proposer) -> AutomaticProposer:
        return replace(self, draws=dict(self.draws))


Law = dict[str, Any]  # what is fixed of a site's distribution, apart from its prefix: JSON's types


class TrainedSites:
    """What each text site was like when a guide was trained, so that its use for others is noticed.

    A guide takes the support of the program that it is used for, so it is a valid proposal for any.
    But one that has learned texts of 4 tokens knows nothing of texts of 40.
    """

    def __init__(self, laws: Mapping[str, Law] | None = None) -> None:
        self.laws: dict[str, Law] = dict(laws or {})
        self._warned: set[str] = set()

    def learn(self, name: str, fn: LMText) -> None:
        """Note a site in training. What differs from one input to the next is not held to be fixed."""
        self.merge({name: _law_of(fn)})

    def merge(self, laws: Mapping[str, Law]) -> None:
        """Note what other processes have noted of sites."""
        for name, law in laws.items():
            known = self.laws.get(name, law)
            both = known.keys() & law.keys()
            self.laws[name] = {k: v for k, v in known.items() if k in both and v == law[k]}

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
        "constraint": repr(fn.stopping.constraint) if fn.is_constrained else None,
        "constrain": fn.constrain if fn.is_constrained else None,
    }
