"""Votes of a few draws, on tiny language models."""

from __future__ import annotations

import pytest
from pyro import poutine

import lmppl
from lmppl import lm_sample, require
from lmppl.testing import tiny_lm
from paper.voting import guided_shares, score, shares

LM = tiny_lm("ab.", seed=0)


def latents(allowed: str) -> list[str]:
    z = lm_sample("z", "ab.", choices=["a", "b"], temperature=5.0)
    require("allowed", str(z) in allowed)
    return [z]


def reply(z: str) -> str:
    return f"{z}{lm_sample('answer', z, choices=['a', 'b'])}"


def program(allowed: str) -> str:
    return reply(*latents(allowed))


def only_a(allowed: str) -> None:
    lm_sample("z", "ab.", choices=["a"])


def both(allowed: str) -> None:
    lm_sample("z", "ab.", choices=["a", "b"], temperature=5.0)


def test_shares_are_those_of_live_draws():
    options = {"lm": LM, "method": "importance", "seed": 0}
    all_, only, none = shares(program, [("ab",), ("b",), ("",)], **options)
    assert {answer[0] for answer in all_} == {"a", "b"} and {answer[0] for answer in only} == {"b"}
    for found in (all_, only):
        assert sum(found.values()) == pytest.approx(1)
        assert list(found.values()) == sorted(found.values(), reverse=True)
    assert none == {}


def test_a_guide_draws_the_latents_and_the_model_the_answer():
    options = {"lm": LM, "seed": 0}
    found = guided_shares(latents, reply, [("ab",), ("b",)], guide=only_a, **options)
    assert found[1] == {}, "all of its draws are dead"
    exact = lmppl.infer(poutine.condition(program, {"z": "a"}), "a", lm=LM, method="exact")
    law = exact.probs(returns=True)
    assert sum(found[0].values()) == pytest.approx(1) and set(found[0]) <= set(law)
    assert found[0][max(law, key=law.get)] == pytest.approx(max(law.values()), abs=0.35)
    (some,) = guided_shares(latents, reply, [("b",)], guide=both, **options)
    assert sum(some.values()) == pytest.approx(1) and {answer[0] for answer in some} == {"b"}


def test_what_is_wrong_in_a_program_is_raised():
    def broken(allowed: str) -> str:
        raise KeyError(allowed)

    with pytest.raises(KeyError):
        shares(broken, [("a",)], lm=LM, method="importance", seed=0)


def test_most_draws_decide_and_no_answer_is_wrong():
    found = [{"a": 0.6, "b": 0.4}, {"b": 0.9, "a": 0.1}, {}]
    assert score(found, ["a", "a", "a"]) == pytest.approx({"accuracy": 1 / 3, "share": 0.7 / 3})
