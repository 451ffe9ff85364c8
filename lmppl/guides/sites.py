"""The text sites that a guide was trained on, so that its use for other ones is noticed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from lmppl.distributions import LMText

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
        "max_tokens": fn.closing.max_tokens,
        "stop": list(fn.closing.stop),
        "choices": fn.choices is not None,  # which ones may depend on the input
        "temperature": fn.temperature,
    }


def _listed(law: Law) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in law.items())
