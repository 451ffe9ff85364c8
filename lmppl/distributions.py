"""A language model as a Pyro distribution.

The values of ``LMText`` are right-padded ``LongTensor``s of token ids, so that everything in Pyro that
stores, stacks, replays or compares values works; ``LMText.text`` gives the ``Text`` that a program
sees. ``draw_texts`` and ``score_texts`` serve many distributions at once, as of many particles.
"""

from __future__ import annotations

import copy
import hashlib
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from typing import Any, Literal, NamedTuple

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.poutine.runtime import am_i_wrapped
from torch.distributions import constraints

from lmppl.checks import check_choice, check_int, check_number, nearest
from lmppl.exclusive import exclusive
from lmppl.lm import LM
from lmppl.lm.batches.inverse_cdf import inverse_cdf
from lmppl.lm.batches.requests import Allowed, Draw, Drawn, Score, Scored, Way
from lmppl.lm.tokens.constraints.constraint import Constraint
from lmppl.lm.tokens.stopping import Stopping
from lmppl.lm.tokens.text import Text

_MOST_TEXTS = 1024  # that a distribution remembers
PAD = -1  # never a token, so a value cannot be confused with one that ends in EOS

SiteScore = tuple[torch.Tensor, Scored | None]
"""Log-density of a site's value (0-d, nats), and its terms token by token where it is a text."""

Law = Literal["global", "local", "proposal"]
"""What the density of a constrained text is: see ``LMText``."""

Purpose = Literal["density", "weights", "simulation"]
"""What a text under a global constraint is drawn for. ``"density"``: log q is the density of
``LMText.proposal()``. ``"weights"``: p / q is a proper weight of the draw, and need be no more: a
constraint that is cheaper to ask about a few tokens is, and log q is a pseudo-density then.
``"simulation"``: as the model writes it, so that what does not match comes up as often as there."""


class DrawnText(NamedTuple):
    """A value that was drawn of a distribution over texts.

    Of a text that goes on with tokens which were there before, the log-probabilities are of the new
    tokens.
    """

    value: torch.Tensor  # of shape ``event_shape``
    # Under the distribution, 0-d float32, nats; ``-inf`` without a match (but of the law of draws).
    log_prob: torch.Tensor
    # Of the draw: the same, but of a text under a global constraint (see ``Purpose``).
    log_q: torch.Tensor
    drawn: Drawn | None  # its tokens one by one; None for choices


def check_lm(what: str, lm: Any) -> LM:
    """``lm``, if it is a language model. Raises ``TypeError``, beginning with ``what``, if not."""
    if not isinstance(lm, LM):
        name = repr(lm) if isinstance(lm, str) else "..."
        raise TypeError(
            f"{what}: lm takes a lmppl.LM, given {type(lm).__name__}: load one with "
            f"lmppl.LM.from_pretrained({name}), or wrap a model with lmppl.LM(model, tokenizer)"
        )
    return lm


class _TokenSequence(constraints.Constraint):
    """Right-padded token sequences that the site could have produced."""

    is_discrete, event_dim = True, 1

    def __init__(self, supports: Callable[[torch.Tensor], bool]) -> None:
        self._supports = supports
        super().__init__()

    def check(self, value: torch.Tensor) -> torch.Tensor:
        rows = map(self._supports, value.reshape(-1, value.shape[-1]))
        return torch.tensor(list(rows)).reshape(value.shape[:-1])


class LMText(TorchDistribution):
    """Distribution of the text with which a language model continues a prefix.

    With ``max_tokens`` (and ``stop``) it ranges over sequences that close at the first token that is
    an EOS or completes a stop string, at the latest at ``max_tokens``, with density
    ``prod_k p(t_k | prefix, t_<k)``, which sums to one. With ``choices`` it is a categorical over
    whole strings, ``softmax(log p(tokens) / temperature)``.

    With ``constraint`` its values are those texts whose body matches. ``constrain="global"``: the
    density is still ``prod_k p(t_k | prefix, t_<k)``, and so sums to the probability of a match. A draw
    takes each token among those that the constraint allows, from ``proposal()``. ``constrain="local"``:
    every step is renormalised over the allowed tokens; what comes to a dead end, where none is allowed
    or ``max_tokens`` are reached without a match, is lost, so the density sums to at most one. The
    densities of ``proposal()`` and ``guided()`` are those of draws, dead ends included, and sum to one.

    Args:
        lm: the language model.
        prefix: a ``str``, a ``Text`` or a list of them.
        max_tokens: the largest number of tokens, the closing one included.
        stop: a stop string or several; the one that closes belongs to the value.
        choices: whole strings to choose from.
        temperature: every next-token distribution is renormalised as ``p ** (1 / temperature)``.
        num_tokens: exactly that many tokens, nothing closes: the probability that the continuation
            *begins so* (what an observed site without ``stop`` and ``max_tokens`` scores). It
            excludes ``max_tokens``, ``stop``, ``choices`` and ``constraint``.
        constraint: what the body must match.
        constrain: ``"global"`` or ``"local"``, what that makes of the density.

    Shapes: ``batch_shape`` is ``()`` (see ``expand`` and ``batch``), ``event_shape`` is
    ``(max_tokens,)``; a value is a ``LongTensor`` of token ids, padded on the right with -1.

    Raises:
        ValueError: for arguments that define no distribution.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = False
    name = ""  # of the site that it stands at, for error messages
    steered = True  # whether draws under a constraint avoid what is known to come to a dead end
    texts_in_prefix: frozenset[tuple[int, ...]]  # the tokens of each ``Text`` in it, without EOS

    def __init__(
        self,
        lm: LM,
        prefix: str | Sequence[str],
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        choices: Sequence[str] | None = None,
        temperature: float = 1.0,
        num_tokens: int | None = None,
        constraint: Constraint | None = None,
        constrain: Literal["global", "local"] = "global",
    ) -> None:
        self.lm = check_lm("LMText", lm)
        self.temperature = check_number("temperature", temperature, above=0)
        check_choice("constrain", constrain, ("global", "local"))
        if constraint is not None:
            _check_constraint(constraint)
        if constraint is not None and choices is not None:
            raise ValueError(
                f"{constraint.name} beside choices: choices are whole strings already. Drop "
                f"{constraint.name}, and the choices that do not match; or drop choices, and say "
                "max_tokens"
            )
        self.constrain = constrain
        self.law: Law = constrain
        self.steered = constrain == "global"
        limits: Any = (stop, max_tokens, constraint)
        self.stopping = Stopping(lm.vocabulary, *limits)
        if num_tokens is not None:
            num_tokens = check_int("num_tokens", num_tokens, least=0)
            if choices is not None or self.stopping.closes:
                raise ValueError("num_tokens excludes max_tokens, stop, choices and constraint")
        if choices is not None and max_tokens is not None:
            raise ValueError("choices are whole strings, so they exclude max_tokens: drop one")
        if max_tokens is None and choices is None and num_tokens is None:
            raise ValueError(
                "a distribution over text needs max_tokens (the largest number of tokens, stop or "
                "not) or choices (whole strings)"
            )
        self.choices = None if choices is None else _encode_choices(self.stopping, choices)
        self._rows: tuple[tuple[int, ...], ...] = (lm.encode(prefix),)
        strings = [prefix] if isinstance(prefix, str) else prefix
        parts = [part for text in strings if isinstance(text, Text) for part in text.parts]
        self.texts_in_prefix = frozenset(part for part in parts if isinstance(part, tuple))
        self._texts: dict[tuple[int, ...], Text] = {}  # of values, as runs ask for equal ones
        most = self.stopping.max_tokens or num_tokens or 0
        width = max(map(len, self.choices or ()), default=most)
        super().__init__(torch.Size(()), torch.Size((width,)), validate_args=False)

    @classmethod
    def batch(cls, lm: LM, prefixes: Sequence[Any], **kwargs: Any) -> LMText:
        """A batch of distributions that differ in their prefix: ``batch_shape == (len(prefixes),)``.

        Args:
            lm: the language model.
            prefixes: one a member.
            **kwargs: the other arguments of ``LMText``, which all share.

        Raises:
            ValueError: for a string in place of a list, an empty list, and as ``LMText``.
        """
        if isinstance(prefixes, str) or not prefixes:
            raise ValueError(f"LMText.batch needs a list of prefixes, given {prefixes!r}")
        rows = [cls(lm, prefix, **kwargs) for prefix in prefixes]
        return rows[0]._with_rows(tuple(row.prefix_ids for row in rows), (len(rows),))

    def _with_rows(self, rows: tuple[tuple[int, ...], ...], batch_shape: Sequence[int]) -> LMText:
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__, _rows=rows)
        shapes = torch.Size(batch_shape), self.event_shape
        TorchDistribution.__init__(new, *shapes, validate_args=False)
        return new

    def with_prefix_ids(self, prefix_ids: tuple[int, ...], lm: LM, temperature: float) -> LMText:
        """The same support after another prefix, under another model and temperature."""
        new = self._with_rows((prefix_ids,), ())
        new.lm, new.temperature = lm, temperature
        return new

    @property
    def is_constrained(self) -> bool:
        """Whether it has a constraint."""
        return self.stopping.constraint is not None

    def proposal(self) -> LMText:
        """The law of its draws; without a constraint, itself. Each step is renormalised over the tokens
        that the constraint allows, under a global one without those after which it is known that no
        match can be reached in time. What comes to a dead end has density, too."""
        return self._as_proposal(self.steered)

    def guided(self) -> LMText:
        """As a guide draws it, for which dead ends are of no use: as ``proposal()`` of a global
        constraint, whatever the law."""
        return self._as_proposal(True)

    def _as_proposal(self, steered: bool) -> LMText:
        if not self.is_constrained:
            return self
        new = self._with_rows(self._rows, self.batch_shape)
        new.law, new.steered = "proposal", steered
        return new

    @property
    def _allowed(self) -> Allowed | None:
        """Over which tokens each step of its density is renormalised; None: all."""
        if not self.is_constrained or self.law == "global":
            return None
        return Allowed(self.stopping, steered=self.steered)

    def __deepcopy__(self, memo: dict[int, Any]) -> LMText:
        return self  # it never changes, and holds a language model

    def expand(self, batch_shape: Any, _instance: Any = None) -> LMText:
        index = torch.arange(len(self._rows)).reshape(self.batch_shape).expand(batch_shape)
        return self._with_rows(tuple(self._rows[i] for i in index.flatten().tolist()), batch_shape)

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """The tokens of the prefix (of an unbatched distribution)."""
        if len(self._rows) != 1:
            raise ValueError(f"a batch of shape {tuple(self.batch_shape)} has no single prefix")
        return self._rows[0]

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        return self.choices is not None

    @property
    def support(self) -> constraints.Constraint:
        return _TokenSequence(self.supports)

    def same_as(self, other: Any) -> bool:
        """Whether ``other`` is the same distribution: prefix tokens, support, temperature, model."""
        return isinstance(other, LMText) and self._identity == other._identity

    @property
    def _identity(self) -> tuple[Any, ...]:
        stopping = self.stopping
        limits = stopping.stop, stopping.max_tokens, stopping.constraint, self.law, self.steered
        rows = self._rows, self.batch_shape, self.event_shape
        return self.lm, rows, self.choices, limits, self.temperature

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that defines the distribution but the language model's weights: prefix tokens,
        tokenizer, support, temperature and constraint (by its ``repr``). Equal in all processes."""
        shown = re.sub(r" at 0x[0-9a-f]+", "", repr(self._identity[1:]))  # addresses of functions
        return hashlib.sha256(f"{self.lm.vocabulary.fingerprint} {shown}".encode()).hexdigest()

    def __repr__(self) -> str:
        first, most, stop = self._rows[0], self.stopping.max_tokens, self.stopping.stop
        tail = self.lm.vocabulary.decode(first[-24:])
        parts = [self.lm.name, "..." * (len(first) > 24) + repr(tail)]
        if self.choices is not None:
            parts.append(f"{len(self.choices)} choices")
        else:
            parts.append(
                f"num_tokens={self.event_shape[0]}" if most is None else f"max_tokens={most}"
            )
        if stop:
            parts.append(f"stop={(stop[0] if len(stop) == 1 else list(stop))!r}")
        if self.is_constrained:
            parts.append(f"{self.stopping.constraint!r}, constrain={self.constrain!r}")
        if self.temperature != 1.0:
            parts.append(f"temperature={self.temperature:g}")
        if self.batch_shape:
            parts.append(f"batch_shape={tuple(self.batch_shape)}")
        return f"LMText({', '.join(parts)})"

    @property
    def num_uniforms(self) -> int:
        """How many uniforms a draw takes: one a token, or one for a choice."""
        return 1 if self.choices is not None else self.event_shape[0]

    def value(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Token ids as a right-padded value, shape ``event_shape``."""
        width = self.event_shape[0]
        return torch.tensor(list(token_ids) + [PAD] * (width - len(token_ids)), dtype=torch.long)

    def token_ids(self, value: torch.Tensor) -> tuple[int, ...]:
        """The tokens of one value, without the padding."""
        ids = value.tolist()
        return tuple(ids[: ids.index(PAD)] if PAD in ids else ids)

    def text(self, value: torch.Tensor) -> Text:
        """The ``Text`` of one ``value``, of shape ``event_shape``."""
        ids = self.token_ids(value)
        if ids not in self._texts:
            if len(self._texts) >= _MOST_TEXTS:
                self._texts.clear()
            self._texts[ids] = self.stopping.text(ids)
        return self._texts[ids]

    def encode(self, obs: str) -> torch.Tensor:
        """A string as a value, shape ``event_shape``.

        Args:
            obs: a ``str``, which is scored as its canonical tokens, or a ``Text``, as its own.

        Raises:
            ValueError: if the site could not have produced it; says where and why.
        """
        if self.choices is None:
            ids = self.lm.encode_observed(obs, self.stopping)
        else:
            ids = obs.token_ids if isinstance(obs, Text) else self.lm.vocabulary.encode(obs)
            closed = [ids + self.lm.vocabulary.encode(stop) for stop in self.stopping.stop]
            ids = next((tokens for tokens in (ids, *closed) if tokens in self.choices), ids)
            if ids not in self.choices:
                allowed = [self.lm.vocabulary.decode(choice) for choice in self.choices]
                raise ValueError(
                    f"{str(obs)!r} is none of the choices {allowed}{nearest(obs, allowed, cutoff=0.7)}"
                )
        if len(ids) > (most := self.event_shape[0]):
            raise ValueError(f"{str(obs)!r} has {len(ids)} tokens, the site holds {most}")
        return self.value(ids)

    def as_value(self, given: Any) -> torch.Tensor:
        """A string or a tensor as a value of this distribution, shape ``event_shape``.

        Raises:
            TypeError: for anything else.
            ValueError: for a tensor of another shape or what is no token, and as ``encode`` does.
        """
        if isinstance(given, str):
            return self.encode(given)
        _check_token_ids(given)
        size, ids = self.lm.vocabulary.size, given.flatten().tolist()
        if given.shape != self.event_shape:
            what = f"shape {tuple(self.event_shape)}, given shape {tuple(given.shape)}"
        elif ids and not PAD <= min(ids) <= max(ids) < size:
            what = f"tokens below {size}, given {ids}"
        else:
            return given.long()
        raise ValueError(f"a value has {what} (short ones are padded with {PAD} on the right)")

    def supports(self, value: torch.Tensor) -> bool:
        """Whether one ``value`` is a sequence that the site could have produced (under the law of draws,
        also one that came to a dead end)."""
        padded = value.tolist()
        ids = tuple(padded[: padded.index(PAD)] if PAD in padded else padded)
        if padded.count(PAD) != len(padded) - len(ids):
            return False
        if ids and not 0 <= min(ids) <= max(ids) < self.lm.vocabulary.size:
            return False
        if self.choices is not None:
            return ids in self.choices
        if self.stopping.max_tokens is None:
            return len(ids) == self.event_shape[0]
        if self.is_constrained:
            may_die = self.law == "proposal"
            return self.stopping.is_value(ids) or (
                may_die and self.stopping.is_dead_end(ids, steered=self.steered)
            )
        if ids in self._texts:
            return self._texts[ids].finish_reason is not None
        closed = self.stopping.scan(ids)
        return closed is not None and closed[0] == len(ids)

    def mismatch(self, value: torch.Tensor) -> str:
        """Why a value has probability zero under the constraint, in words; empty if it has not, or there
        is no constraint."""
        return self.stopping.mismatch(self.token_ids(value)) if self.is_constrained else ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A draw at a site, outside of lmppl's engines."""
        if self.is_constrained and self.law == "global" and am_i_wrapped():
            _warn_of_global_draw(self.name)
        return super().__call__(*args, **kwargs)

    @exclusive()
    def sample(self, sample_shape: Sequence[int] = ()) -> torch.Tensor:
        """Shape ``sample_shape + batch_shape + (max_tokens,)``; uses torch's random stream."""
        shape = torch.Size(sample_shape) + self.batch_shape
        repeats = torch.Size(sample_shape).numel()
        members = [self._with_rows((row,), ()) for row in self._rows] * repeats
        uniforms = [torch.rand(self.num_uniforms, dtype=torch.float64) for _ in members]
        values = [drawn.value for drawn in draw_texts(members, uniforms, purpose="weights")]
        return torch.stack(values).reshape(shape + self.event_shape)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """Log-density in nats, shape ``value.shape[:-1]`` broadcast with ``batch_shape``; ``-inf`` for
        a value that the site could not have produced. Differentiable with respect to the parameters
        of ``lm`` that require a gradient.

        Raises:
            ValueError: for a value of another event shape.
        """
        _check_token_ids(value)
        if value.shape[-1:] != self.event_shape:
            shapes = f"{tuple(self.event_shape)}, given shape {tuple(value.shape)}"
            raise ValueError(f"a value of this site has event shape {shapes}")
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        values = value.expand(shape + self.event_shape).reshape(-1, self.event_shape[0])
        members = [self._with_rows((row,), ()) for row in self.expand(shape)._rows]
        scored = score_texts(members, list(values), grad=torch.is_grad_enabled())
        return torch.stack([log_prob for log_prob, _ in scored]).reshape(shape)

    def enumerate_support(self, expand: bool = True) -> torch.Tensor:
        """All choices, shape ``(num_choices,) + batch_shape + event_shape`` (without ``expand``, with
        ones in place of ``batch_shape``).

        Raises:
            NotImplementedError: without ``choices``.
        """
        if self.choices is None:
            raise NotImplementedError("only a site with choices= enumerates its support")
        values = torch.stack([self.value(choice) for choice in self.choices])
        values = values.reshape(-1, *[1] * len(self.batch_shape), *self.event_shape)
        return values.expand(-1, *self.batch_shape, *self.event_shape) if expand else values


_warned_of_draws: set[str] = set()


def _warn_of_global_draw(name: str) -> None:
    """Warn, once a site, that Pyro would take a density for that of the draw."""
    if name not in _warned_of_draws:
        _warned_of_draws.add(name)
        warnings.warn(
            f"site '{name}': its text is drawn under the masks of its constraint, and its density is "
            "the model's (constrain='global'). Pyro's own tools take the one for the other, so what "
            "they weigh a draw of the program with (Importance, an ELBO whose guide has this site) is "
            "wrong. Use lmppl.infer, which knows both, or constrain='local'",
            stacklevel=2,
        )


def _check_constraint(constraint: Any) -> None:
    """Raise ``TypeError``, with what was probably meant, unless it is a constraint."""
    if isinstance(constraint, Constraint):
        return
    if isinstance(constraint, type) and issubclass(constraint, Constraint):
        hint = f"give an object of it, as {constraint.__name__}()"
    elif isinstance(constraint, str):
        hint = "a regular expression goes to regex=, a grammar to grammar="
    elif callable(constraint):
        hint = (
            "make a subclass of Constraint with the function as its method allows(self, prefix), "
            "which says whether a match may begin so; and complete(self, text), if not every such "
            "text is one"
        )
    else:
        hint = "make a subclass of it, with a method allows(self, prefix)"
    raise TypeError(
        f"constraint takes a lmppl.constraints.Constraint, given {type(constraint).__name__} "
        f"({constraint!r}): {hint}"
    )


def _check_token_ids(value: Any) -> None:
    """Raise ``TypeError`` unless a value is a tensor of integers."""
    is_tensor = isinstance(value, torch.Tensor)
    if not is_tensor or value.is_floating_point() or value.dtype is torch.bool:
        given = f"a tensor of {value.dtype}" if is_tensor else f"{type(value).__name__} ({value!r})"
        raise TypeError(f"a value is a str, a Text or a LongTensor of token ids, given {given}")


def _encode_choices(stopping: Stopping, choices: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Canonical tokens of each choice, followed by the first stop string where there is one."""
    if isinstance(choices, (str, bytes)) or not isinstance(choices, Sequence):
        given = type(choices).__name__
        raise TypeError(f"choices={choices!r}: give a list of strings, given {given}")
    if wrong := [choice for choice in choices if not isinstance(choice, str)]:
        given = type(wrong[0]).__name__
        raise TypeError(
            f"choices={list(choices)!r}: give a list of strings, given {given} among them"
        )
    if not choices or not all(choices):
        raise ValueError(f"choices={list(choices)!r}: give at least one string, none of them empty")
    vocabulary = stopping.vocabulary
    suffix = stopping.stop[0] if stopping.stop else ""
    encoded = [
        tuple(choice.token_ids) if isinstance(choice, Text) and not suffix
        else vocabulary.encode(str(choice) + suffix)
        for choice in choices
    ]  # fmt: skip
    for choice, ids in zip(map(str, choices), encoded, strict=True):
        closed = stopping.scan(ids)
        if closed is not None and (closed[0] < len(ids) or _ends_early(choice, stopping)):
            raise ValueError(
                f"choice {choice!r} with stop={list(stopping.stop)!r}: the site would close within "
                "the choice, which holds a stop string or EOS (or does with the first stop string "
                "after it): take another stop=, or leave it out"
            )
    for (one, first), (two, second) in permutations(
        zip(map(str, choices), encoded, strict=True), 2
    ):
        if first == second or one == two:
            raise ValueError(f"choices holds {one!r} twice: give each once")
        if not suffix and second[: len(first)] == first:
            raise ValueError(
                f"choice {one!r} is a prefix of {two!r}: give stop= (a string that ends each), or "
                "choices of which none begins another"
            )
    return tuple(encoded)


def _ends_early(choice: str, stopping: Stopping) -> bool:
    """Whether a stop string would take part of a choice that the first of them is to close."""
    closed, longest = choice + stopping.stop[0], len(stopping.stop[0])
    ends = (stop for stop in stopping.stop if len(stop) > longest and closed.endswith(stop))
    return any(stop in closed[:-1] for stop in stopping.stop) or any(ends)


# --- many at once ------------------------------------------------------------------------------


def draw_texts(
    distributions: Sequence[LMText],
    uniforms: Sequence[torch.Tensor],
    names: Sequence[str] | None = None,
    begun: Sequence[tuple[int, ...]] | None = None,
    purpose: Purpose | Sequence[Purpose] = "density",
) -> list[DrawnText]:
    """Draw one value of each (unbatched) distribution, of any models, prefixes and kinds; log-densities
    are under the very logits that it was drawn from.

    Args:
        uniforms: for each distribution, ``(num_uniforms,)`` float64 in [0, 1).
        names: the sites' names, for error messages; by default the distributions'.
        begun: the tokens that each value begins with, which are not drawn; by default none.
        purpose: what all, or each, are drawn for.
    """
    num = len(distributions)
    begun = [()] * num if begun is None else begun
    purposes = [purpose] * num if isinstance(purpose, str) else purpose
    members = list(zip(distributions, uniforms, _names(distributions, names), begun, strict=True))
    texts = [
        (d.lm, draw_request(d, u, n, b, p))
        for (d, u, n, b), p in zip(members, purposes, strict=True)
        if d.choices is None
    ]
    drawn = _served("draw", texts)
    chosen = [(d, name) for d, _, name, _ in members if d.choices is not None]
    tables = iter(choice_log_probs([d for d, _ in chosen], [name for _, name in chosen]))
    results = []
    for d, u, _, first in members:
        if d.choices is None:
            results.append(drawn_text(d, next(drawn), first))
        else:
            table = next(tables)
            k = int(inverse_cdf(table.double().exp(), u[:1]))
            results.append(DrawnText(d.value(d.choices[k]), table[k], table[k], None))
    return results


def draw_request(
    d: LMText,
    uniforms: torch.Tensor,
    name: str,
    begun: tuple[int, ...] = (),
    purpose: Purpose = "density",
) -> Draw:
    """What draws a text; the other arguments are as of ``draw_texts``."""
    way: Way = "masks"
    if d.stopping.constraint is not None and d.law == "global":
        if purpose == "simulation":
            way = "model"
        elif purpose == "weights" and d.stopping.constraint.is_lazy:
            way = "rejection"
    return Draw(d.prefix_ids, d.stopping, uniforms, d.temperature, name, d.steered, begun, way)


def drawn_text(d: LMText, drawn: Drawn, begun: tuple[int, ...] = ()) -> DrawnText:
    """What has been drawn of a distribution, after the tokens ``begun``."""
    log_prob = log_q = drawn.log_probs.sum()
    if drawn.log_masses is not None:
        log_q = log_prob - drawn.log_masses.sum()
        log_prob = log_prob if d.law == "global" else log_q
    if not drawn.matches and d.law != "proposal":
        log_prob = torch.tensor(-math.inf)
    return DrawnText(d.value((*begun, *drawn.token_ids)), log_prob, log_q, drawn)


def score_texts(
    distributions: Sequence[LMText],
    values: Sequence[torch.Tensor],
    names: Sequence[str] | None = None,
    *,
    grad: bool = False,
    score_closing: bool | Sequence[bool] = False,
) -> list[tuple[torch.Tensor, Scored | None]]:
    """Score one value under each (unbatched) distribution; ``names`` as of ``draw_texts``.

    Args:
        grad: keep the graph to the models' parameters that require a gradient.
        score_closing: whether, of all or each, to score the closing token at every position, too
            (``Scored``).

    Returns:
        Pairs: the log-density (0-d float32, nats; ``-inf`` outside the support), and its terms
        token by token (None for choices and outside the support).
    """
    results: list[Any] = [None] * len(distributions)
    texts: dict[int, tuple[LM, Score]] = {}
    chosen: dict[int, tuple[LMText, str]] = {}
    closing = [score_closing] * len(values) if isinstance(score_closing, bool) else score_closing
    members = zip(distributions, values, _names(distributions, names), closing, strict=True)
    for i, (d, value, name, is_closed) in enumerate(members):
        if not d.supports(value):
            results[i] = (torch.tensor(-math.inf), None)
        elif d.choices is not None:
            chosen[i] = d, name
        elif not (ids := d.token_ids(value)):
            results[i] = (torch.tensor(0.0), None)  # an empty prefix likelihood
        else:
            c = d.stopping.closing_token if is_closed else None
            texts[i] = d.lm, Score(d.prefix_ids, ids, d.temperature, c, d._allowed, name)
    options = [request for d, name in chosen.values() for request in _choice_requests(d, name)]
    scored = _served("score", [*texts.values(), *options], grad=grad)  # prompts are shared by all
    for i in texts:
        terms = next(scored)
        results[i] = (terms.log_prob, terms)
    for i, (d, _) in chosen.items():
        assert d.choices is not None
        results[i] = (_choice_law(d, scored)[d.choices.index(d.token_ids(values[i]))], None)
    return results


def choice_log_probs(distributions: Sequence[LMText], names: Sequence[str]) -> list[torch.Tensor]:
    """For each distribution, normalised log-probabilities of its choices, ``(num_choices,)``."""
    members = list(zip(distributions, names, strict=True))
    requests = [request for d, name in members for request in _choice_requests(d, name)]
    scored = _served("score", requests)
    return [_choice_law(d, scored) for d in distributions]


def _choice_requests(d: LMText, name: str) -> list[tuple[LM, Score]]:
    """What ``_choice_law`` needs."""
    return [  # the temperature applies to whole strings, so tokens are scored at 1
        (d.lm, Score(d.prefix_ids, choice, name=name)) for choice in d.choices or ()
    ]


def _choice_law(d: LMText, scored: Iterator[Any]) -> torch.Tensor:
    """Normalised log-probabilities of the choices, ``(num_choices,)``, of the next ones scored."""
    log_probs = torch.stack([next(scored).log_prob for _ in d.choices or ()])
    return torch.log_softmax(log_probs / d.temperature, -1)


def _names(distributions: Sequence[LMText], names: Sequence[str] | None) -> Sequence[str]:
    return names or [d.name for d in distributions]


def _served(method: str, requests: Sequence[tuple[LM, Any]], **options: Any) -> Iterator[Any]:
    """Answers to requests, in their order. Each model gets its own in one call of ``method``."""
    by_lm: dict[LM, list[Any]] = {}
    for lm, request in requests:
        by_lm.setdefault(lm, []).append(request)
    answers = {lm: iter(getattr(lm, method)(own, **options)) for lm, own in by_lm.items()}
    return iter([next(answers[lm]) for lm, _ in requests])


# --- results of tools ----------------------------------------------------------------------------


class ToolResult(torch.Tensor):
    """Any Python object as the value of a Pyro site: a 0-d tensor that carries ``.result``.

    Pyro's ``Predictive`` stacks the values of all sites; a tool's result may be anything, so the
    trace holds this tensor (always 0) and the object rides on it.
    """

    result: Any
    error: Exception | None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What Pyro does to a value (``detach``, ``clone``) keeps the object."""
        out = super().__torch_function__(func, types, args, kwargs or {})
        source = next((arg for arg in args if isinstance(arg, ToolResult)), None)
        if isinstance(out, ToolResult) and source is not None and out.shape == source.shape:
            out.__dict__.update(source.__dict__)
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> ToolResult:
        return ToolResult.wrap(copy.deepcopy(self.result, memo), self.error)

    @staticmethod
    def wrap(result: Any, error: Exception | None = None) -> ToolResult:
        self = torch.zeros(()).as_subclass(ToolResult)
        self.result, self.error = result, error
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ToolResult({getattr(self, 'result', None)!r})"


class ToolCall(TorchDistribution):
    """A call of a Python function as a site: sampling calls it, and its density is 1 (with
    ``on_error="reject"``, 0 of a call that raised)."""

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = False
    support = constraints.real  # type: ignore[assignment]

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...], on_error: str) -> None:
        self.fn, self.call_args, self.on_error = fn, args, on_error
        super().__init__(validate_args=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> ToolCall:
        return self  # its function may be anything

    def sample(self, sample_shape: Sequence[int] = ()) -> torch.Tensor:
        try:
            return ToolResult.wrap(self.fn(*self.call_args))
        except Exception as error:
            if self.on_error == "reject":
                return ToolResult.wrap(None, error)
            raise

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        return torch.tensor(-math.inf if getattr(value, "error", None) is not None else 0.0)
