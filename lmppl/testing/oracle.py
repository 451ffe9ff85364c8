"""The exact answer: every trace of a program, found by exhaustive replay.

Written without lmppl's runtime, engines, decoding and scoring, so that agreement means something. A
program is run once for every path through its latent sites; text is enumerated and scored by
``lmppl.testing.naive``; continuous sites are replaced by quadrature nodes.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger

from lmppl.distributions import LMText, ToolCall
from lmppl.lm import LM
from lmppl.lm.tokens.constraints.constraint import Constraint
from lmppl.primitives import use
from lmppl.testing.languages import ConstrainedSite, Language
from lmppl.testing.naive import NaiveLM
from lmppl.testing.quadrature import quadrature_nodes


@dataclass
class ExactTrace:
    """One path through a program.

    Attributes:
        values: latent site to value: a tuple of token ids for text, else a number or a tuple.
        texts: latent text site to its visible text (without EOS).
        data: latent site to value as Pyro's trace holds it, for ``poutine.condition(data=...)``.
        log_joint: log of the joint density at ``values`` and the observations, nats; ``-inf`` for
            a path that is ruled out. Of continuous sites it holds the quadrature weight.
        log_prior: log-probability of drawing ``values`` by running the program forward (no
            observations, factors, scales). Of a path that is ruled out, up to where it was. Of a
            constrained site it is the density, which needn't sum to 1.
        returns: what the program returned; None for a path that is ruled out.
    """

    values: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    data: dict[str, torch.Tensor] = field(default_factory=dict)
    log_joint: float = 0.0
    log_prior: float = 0.0
    returns: Any = None


class Enumeration(tuple[ExactTrace, ...]):
    """All traces of a program, in the order of their enumeration."""

    @property
    def traces(self) -> tuple[ExactTrace, ...]:
        """The traces themselves."""
        return tuple(self)

    @property
    def latents(self) -> tuple[str, ...]:
        """The latent sites, of all paths, by first appearance."""
        return tuple(dict.fromkeys(name for trace in self for name in trace.values))

    @property
    def log_evidence(self) -> float:
        """Log of the sum of all joint densities, nats."""
        return _logsumexp([trace.log_joint for trace in self])

    def posterior(self, *names: str, text: bool = False) -> dict[Any, float]:
        """Exact posterior probabilities of the values of some latent sites (by default all).

        Args:
            names: which; one gives a dict from its values, several from tuples of values.
            text: give the text of text sites instead of their tokens, summed where equal.

        Raises:
            ValueError: a name that is no latent site; an evidence of zero.
        """
        if (log_evidence := self.log_evidence) == -math.inf:
            raise ValueError("no trace has positive density, so there is no posterior")
        return self._table(names, text, [t.log_joint - log_evidence for t in self])

    def prior(self, *names: str, text: bool = False) -> dict[Any, float]:
        """Exact probabilities of running the program forward.

        Args:
            names: which latent sites, as of ``posterior``.
            text: give the text of text sites instead of their tokens, summed where equal.

        Raises:
            ValueError: a name that is no latent site.
        """
        return self._table(names, text, [t.log_prior for t in self])

    def mean(self, fn: Callable[[ExactTrace], float]) -> float:
        """Posterior expectation of ``fn``, a function of a trace."""
        log_evidence = self.log_evidence
        live = [trace for trace in self if trace.log_joint > -math.inf]
        return math.fsum(math.exp(t.log_joint - log_evidence) * float(fn(t)) for t in live)

    def _table(self, names: Sequence[str], text: bool, log_probs: list[float]) -> dict[Any, float]:
        latents, table = self.latents, dict[Any, float]()
        unknown = [name for name in names if name not in latents]
        if unknown:
            raise ValueError(f"no latent site {unknown[0]!r}; there are {', '.join(latents)}")
        for trace, log_prob in zip(self, log_probs, strict=True):
            if log_prob > -math.inf:
                at = key(trace.values | trace.texts if text else trace.values, names or latents)
                table[at] = table.get(at, 0.0) + math.exp(log_prob)
        return table


def key(values: dict[str, Any], names: Sequence[str]) -> Any:
    """The value of the one name among ``names``, or the tuple of the values of several; None for a name
    that ``values``, as of ``ExactTrace.values``, lacks."""
    found = tuple(values.get(name) for name in names)
    return found[0] if len(names) == 1 else found


def trace_values(trace: Any) -> dict[str, Any]:
    """Latent values of ``trace``, a ``pyro.poutine.Trace``, in the form of ``ExactTrace.values``."""
    return {
        name: _plain(node["fn"], node["value"])
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not node["is_observed"] and _is_random(node["fn"])
    }


def enumerate_program(
    program: Callable[..., Any],
    *args: Any,
    lm: LM | None = None,
    quadrature: int | None = None,
    max_traces: int = 100_000,
    languages: Mapping[str | Constraint, Language] | None = None,
    **kwargs: Any,
) -> Enumeration:
    """Every trace of ``program(*args, **kwargs)`` with its exact joint density.

    Args:
        program: any Pyro program over ``lm_sample`` sites, discrete sites with a finite support
            and, with ``quadrature``, continuous ones. Given its sites' values it must be
            deterministic, tools included (a tool is called again for every path).
        lm: the model of sites that name none.
        quadrature: number of nodes for every continuous site; None refuses such sites.
        max_traces: the most traces.
        languages: what matches the constraints of text sites, by the site's name or by constraint.
            It is not asked of the constraints themselves. Texts that do not match have no trace.

    Raises:
        ValueError: a site that cannot be enumerated, a name used twice, an observed text that is no
            complete value, a constraint that ``languages`` lacks, a program that diverges when
            replayed, more than ``max_traces`` traces.
    """
    search = _Search(quadrature, languages or {})
    found: list[ExactTrace] = []
    with use(lm) if lm is not None else contextlib.nullcontext(), torch.no_grad():
        while len(found) < max_traces:
            found.append(search.run(program, args, kwargs))
            if not search.advance():
                return Enumeration(found)
    raise ValueError(f"the program has more than max_traces={max_traces} traces")


class _Option(NamedTuple):
    value: torch.Tensor
    log_prob: float  # of drawing it; for a quadrature node, the log of its weight
    node: bool = False


class _ZeroProbability(BaseException):
    """Ends a run that has probability zero."""


class _Search(Messenger):
    """Depth-first search over the values of latent sites, one run of the program per path."""

    def __init__(
        self, quadrature: int | None, languages: Mapping[str | Constraint, Language]
    ) -> None:
        super().__init__()
        self._num_nodes = quadrature
        self._languages = languages
        # Latent sites on the current path: what each may yet be, the present option last.
        self._path: list[tuple[str, list[_Option]]] = []
        self._naive = functools.cache(NaiveLM)

    def run(self, program: Callable[..., Any], args: Any, kwargs: Any) -> ExactTrace:
        self._depth, self._seen, self._trace = 0, set[str](), ExactTrace()
        try:
            with self:
                self._trace.returns = program(*args, **kwargs)
        except _ZeroProbability:
            self._trace.log_joint = -math.inf
        else:
            if self._depth < len(self._path):
                self._diverged(self._path[self._depth][0], "the end of the program")
        return self._trace

    def advance(self) -> bool:
        """Move to the next path; False if there is none."""
        while self._path:
            _, options = self._path[-1]
            options.pop()
            if options:
                return True
            self._path.pop()
        return False

    # --- Pyro's protocol. This messenger is the outermost, so every handler has had its say. ---

    def _process_message(self, msg: Any) -> None:
        if msg["type"] != "sample":
            return
        name, fn, trace = msg["name"], msg["fn"], self._trace
        if name in self._seen:
            raise ValueError(f"site '{name}' occurs twice in one run: names must differ")
        self._seen.add(name)
        if msg["is_observed"] or msg["value"] is not None or not _is_random(fn):
            return
        if self._depth == len(self._path):
            found = self._options(name, fn)
            if not found:  # nothing matches its constraint
                raise _ZeroProbability
            self._path.append((name, found[::-1]))
        expected, options = self._path[self._depth]
        option = options[-1]
        if expected != name:
            self._diverged(expected, f"site '{name}'")
        self._depth += 1
        msg["value"] = trace.data[name] = option.value
        msg["done"] = True
        trace.values[name] = _plain(fn, option.value)
        if isinstance(fn, LMText):
            trace.texts[name] = self._naive(fn.lm).text(trace.values[name])
        trace.log_prior += option.log_prob
        log_prob = torch.tensor(option.log_prob, dtype=torch.float64)
        # A node's weight holds dx as well, to which scale and mask do not apply.
        density = fn.log_prob(option.value).double() if option.node else log_prob
        trace.log_joint += float(log_prob - density + _scaled(density, msg))

    def _postprocess_message(self, msg: Any) -> None:
        if msg["type"] != "sample" or msg["name"] in self._trace.values:
            return
        fn = msg["fn"]
        if isinstance(fn, LMText):
            log_prob = torch.tensor(self._lm_log_prob(msg["name"], fn, msg["value"]))
        else:
            log_prob = fn.log_prob(msg["value"], *msg["args"], **msg["kwargs"])
        self._trace.log_joint += float(_scaled(log_prob.double(), msg))
        if self._trace.log_joint == -math.inf:
            raise _ZeroProbability

    def _options(self, name: str, fn: Any) -> list[_Option]:
        if isinstance(fn, LMText):
            pad = [-1] * fn.event_shape[0]
            options = [
                _Option(torch.tensor([*ids, *pad[len(ids) :]], dtype=torch.long), log_prob)
                for ids, log_prob in self._lm_table(name, fn).items()
            ]
        elif getattr(fn, "has_enumerate_support", False):
            options = [_Option(v, float(fn.log_prob(v).sum())) for v in _support(fn)]
        elif self._num_nodes is not None:
            try:
                nodes, log_weights = quadrature_nodes(fn, self._num_nodes)
            except (NotImplementedError, ValueError) as error:
                raise ValueError(f"site '{name}': {error}") from error
            pairs = zip(nodes.to(torch.get_default_dtype()), log_weights.tolist(), strict=True)
            options = [_Option(value, weight, node=True) for value, weight in pairs]
        else:
            raise ValueError(
                f"site '{name}': {type(fn).__name__} has no finite support; pass quadrature= (a "
                "number of nodes) if it is a scalar continuous site"
            )
        return [option for option in options if option.log_prob > -math.inf]

    def _lm_table(self, name: str, fn: LMText) -> dict[tuple[int, ...], float]:
        naive = self._naive(fn.lm)
        if fn.is_constrained:
            return self._constrained(name, fn).enumerate()
        if fn.choices is not None:
            sums = {ids: float(naive.log_prob(fn.prefix_ids, ids).sum()) for ids in fn.choices}
            total = _logsumexp([log_prob / fn.temperature for log_prob in sums.values()])
            return {ids: log_prob / fn.temperature - total for ids, log_prob in sums.items()}
        stop = None if fn.stopping.max_tokens is None else fn.stopping.stop
        return naive.enumerate(fn.prefix_ids, fn.event_shape[0], stop, fn.temperature)

    def _lm_log_prob(self, name: str, fn: LMText, value: torch.Tensor) -> float:
        """Density of an observed text, after a check that the site could have produced it."""
        ids = _token_ids(value)
        if fn.choices is not None:
            return self._lm_table(name, fn)[ids]
        if fn.is_constrained:
            return self._constrained(name, fn).log_prob(ids)
        naive = self._naive(fn.lm)
        stop, most = fn.stopping.stop, fn.stopping.max_tokens
        if most is not None and not naive.closes_first_at_end(ids, stop, most):
            raise ValueError(f"site '{name}': the observed tokens {ids} are no complete value")
        return float(naive.log_prob(fn.prefix_ids, ids, fn.temperature).sum())

    def _constrained(self, name: str, fn: LMText) -> ConstrainedSite:
        constraint = fn.stopping.constraint
        language = self._languages.get(name) or self._languages.get(constraint)  # type: ignore[arg-type]
        if language is None:
            raise ValueError(
                f"site '{name}': languages= says nothing of its constraint {constraint!r}: give a "
                f"lmppl.testing.Language, by the site's name or by the constraint"
            )
        stop, most = fn.stopping.stop, fn.event_shape[0]
        site = self._naive(fn.lm), language, fn.prefix_ids, most, stop, fn.temperature
        return ConstrainedSite(*site, is_local=fn.law == "local")

    def _diverged(self, expected: str, got: str) -> None:
        raise ValueError(
            f"the program diverged when it was replayed: site '{expected}' was expected, {got} "
            "was met. Given the values of its sites, a program must be deterministic."
        )


def _is_random(fn: Any) -> bool:
    """Whether a site is to be enumerated; a tool's result and a full plate's indices are not."""
    if type(fn).__name__ == "_Subsample":
        if fn.subsample_size is not None and fn.subsample_size < fn.size:
            raise ValueError("a subsampled plate cannot be enumerated: use the whole plate")
        return False
    return not isinstance(fn, ToolCall)


def _support(fn: Any) -> Iterator[torch.Tensor]:
    """All values of a discrete distribution, elements of a batch varying independently."""
    single = fn.enumerate_support(expand=False)
    cells = fn.batch_shape.numel()
    per_cell = single.expand(-1, *fn.batch_shape, *fn.event_shape)
    per_cell = per_cell.reshape(len(single), cells, *fn.event_shape)
    for index in itertools.product(range(len(single)), repeat=cells):
        value = torch.stack([per_cell[i, cell] for cell, i in enumerate(index)])
        yield value.reshape(fn.batch_shape + fn.event_shape)


def _scaled(log_prob: torch.Tensor, msg: Any) -> torch.Tensor:
    return scale_and_mask(log_prob, msg["scale"], msg["mask"]).sum()


def _token_ids(value: torch.Tensor) -> tuple[int, ...]:
    return tuple(token for token in value.tolist() if token != -1)


def _plain(fn: Any, value: torch.Tensor) -> Any:
    return _token_ids(value) if isinstance(fn, LMText) else _as_tuple(value.tolist())


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def _logsumexp(terms: Sequence[float]) -> float:
    return float(torch.tensor(terms, dtype=torch.float64).logsumexp(0))
