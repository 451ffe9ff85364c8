"""The laws that a Markov move draws from: a latent site's distribution given what came before it.

A ``Proposer`` draws values and says how probable they were. A move has to know more: it keeps the
beginning of a text, and asks how probable it was to draw the text that it replaces. So it takes the
distribution itself, of the program or of a guide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from pyro.poutine.trace_struct import Trace

from lmppl.distributions import LMText
from lmppl.guides.program import check_alike, proposer_factory
from lmppl.runtime.arguments import Args
from lmppl.runtime.sites import is_text


class Laws(Protocol):
    """Where the moves of a chain take their proposals from."""

    def law(self, site: Any, trace: Trace) -> Any:
        """The distribution from which a latent site is drawn. It is asked within a particle's run,
        and may wait for a language model.

        Args:
            site: the site's Pyro message, or its node in a trace.
            trace: what the run had recorded before it.
        """


@dataclass(frozen=True)
class PriorLaws:
    """The program's own laws; of texts at ``p ** (1 / temperature)``, token by token."""

    temperature: float = 1.0

    def law(self, site: Any, trace: Trace) -> Any:
        return _tempered(site["fn"], self.temperature)


@dataclass(eq=False)
class GuideLaws:
    """The laws of a guide, and the program's for the sites that it leaves to it.

    Args:
        proposer: a proposer of the guide, which has ``law(site, trace)``.
        temperature: as of ``PriorLaws``.

    Attributes:
        has_proposed: whether the guide had a law for some site.
    """

    proposer: Any
    temperature: float = 1.0
    has_proposed: bool = False

    def law(self, site: Any, trace: Trace) -> Any:
        law = self.proposer.law(site, trace)
        if law is None:
            law = site["fn"]
        else:
            self.has_proposed = True
            _check_same_support(site["name"], site["fn"], law)
        return _tempered(law, self.temperature)


def laws_of(guide: Any, args: Args, temperature: float = 1.0) -> PriorLaws | GuideLaws:
    """The laws of what was given as ``guide=`` (None: of the program), on the arguments of the program.

    Raises:
        TypeError: for a guide that cannot say its laws.
    """
    factory = proposer_factory(guide, args)
    if factory is None:
        return PriorLaws(temperature)
    proposer = factory(0, 0)
    if not hasattr(proposer, "law"):
        raise TypeError(
            "Markov moves need a guide that can say which distribution it draws a site from, an "
            f"LMGuide or a guide program: {type(proposer).__name__} has no law(site, trace)"
        )
    return GuideLaws(proposer, temperature)


def _tempered(law: Any, temperature: float) -> Any:
    """What is drawn from: of a constrained text its masked distribution, at another temperature."""
    if not is_text(law):
        return law
    law = law.proposal()
    if temperature == 1.0:
        return law
    return law.with_prefix_ids(law.prefix_ids, law.lm, law.temperature * temperature)


def _check_same_support(name: str, fn: Any, law: Any) -> None:
    """Raise ``ValueError`` unless a guide's law draws values of the model's site."""
    check_alike(name, fn, law)
    if isinstance(fn, LMText):
        if law.stopping != fn.stopping or law.choices != fn.choices:
            raise ValueError(
                f"site '{name}': the guide draws with {_shown(law)}, the model with {_shown(fn)}: a "
                "Markov move keeps the beginning of a text, so give both the same"
            )
    elif law.shape() != fn.shape():
        raise ValueError(
            f"site '{name}': the guide draws a value of shape {tuple(law.shape())}, the model has "
            f"shape {tuple(fn.shape())}"
        )


def _shown(fn: LMText) -> str:
    stopping = fn.stopping
    shown = {"max_tokens": stopping.max_tokens, "stop": list(stopping.stop)}
    if fn.choices is not None:
        shown = {"choices": [fn.lm.vocabulary.decode(choice) for choice in fn.choices]}
    return ", ".join(f"{key}={value!r}" for key, value in shown.items())
