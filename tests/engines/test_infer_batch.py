"""``infer_batch``: what ``infer`` gives on each input, in fewer calls of the language model."""

from __future__ import annotations

import functools
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine

import lmppl
from lmppl import Posterior, ZeroEvidenceError, infer_batch, lm_sample, require
from lmppl.primitives import _warned
from lmppl.runtime import nth_seed
from lmppl.testing import tiny_lm
from lmppl.testing.programs import CASES

LM = tiny_lm("ab.", seed=0)
METHODS = {
    "importance": {"method": "importance"},
    "smc": {"method": "smc", "ess_threshold": 0.9},
    "twisted smc": {"method": "smc", "twist": "lookahead", "ess_threshold": 0.9},
    "exact": {"method": "exact"},
}


@pytest.fixture(autouse=True)
def _fresh_state():
    _warned.clear()
    pyro.clear_param_store()
    yield
    assert not poutine.runtime._PYRO_STACK


def infill(x: str, y: str):
    z = lm_sample("z", x, max_tokens=3, stop=".")
    lm_sample("y", [x, z], obs=y)
    return z


INPUTS = [("ab.", "aba"), ("b.", "bb"), ("ba", "a"), ("a.b", "ab"), ("bb", "b.")]


def assert_same(one: Posterior, other: Posterior) -> None:
    assert [list(map(int, z.token_ids)) for z in one["z"]] == [
        list(map(int, z.token_ids)) for z in other["z"]
    ]
    torch.testing.assert_close(one.log_weights, other.log_weights, atol=1e-4, rtol=0)
    assert list(map(str, one.returns)) == list(map(str, other.returns))
    for key in ("engine", "tokens_sampled", "tokens_scored", "tokens_trained", "resamplings"):
        assert one.info.get(key) == other.info.get(key), key


def one_by_one(posteriors, program, inputs, **options):
    """Each posterior is that of its input alone."""
    posteriors = list(posteriors)
    assert len(posteriors) == len(inputs)
    alone: dict[Any, Posterior] = {}
    for i, (posterior, args) in enumerate(zip(posteriors, inputs, strict=True)):
        assert posterior.info["input"] == i
        seed = posterior.info["seed"]
        key = args if options.get("method") == "exact" else (args, seed)  # it draws nothing
        if key not in alone:
            alone[key] = lmppl.infer(program, *args, seed=seed, **options)
        assert_same(posterior, alone[key])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_each_posterior_is_that_of_infer(case, method):
    if case.quadrature and method == "exact":
        pytest.skip("a continuous latent")
    options = {"lm": case.lm, "num_samples": 6, **METHODS[method]}
    inputs = [case.args] * 3
    posteriors = list(infer_batch(case.program, inputs, seed=1, at_once=2, **options))
    if "z" not in posteriors[0].latents:
        pytest.fail("the comparison needs a site z")
    one_by_one(posteriors, case.program, inputs, **options)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_that_differ(method):
    options = {"lm": LM, "num_samples": 8, **METHODS[method]}
    one_by_one(infer_batch(infill, INPUTS, seed=3, **options), infill, INPUTS, **options)


def labelled(x: str, y: str):
    theta = pyro.sample("theta", pyro.distributions.Beta(2.0, 1.0))
    z = lm_sample("z", x, max_tokens=2, temperature=1.0 + float(theta))
    lm_sample("y", [x, z], obs=y)
    return z


@functools.cache
def fitted(program):
    guide = lmppl.LMGuide(program, lm=LM)
    guide.fit(INPUTS[:2], steps=2, batch_size=4, seed=0, progress=False)
    return guide


@pytest.mark.parametrize("program", [infill, labelled])
@pytest.mark.parametrize("method", ["gflownet", "smc", "importance"])
def test_with_a_fitted_guide(method, program):
    """Its texts are drawn from the adapted model; its head for a number asks for states."""
    options = {"lm": LM, "num_samples": 6, "method": method, "guide": fitted(program)}
    one_by_one(infer_batch(program, INPUTS, seed=0, **options), program, INPUTS, **options)


@pytest.mark.parametrize("method", ["gflownet", "smc"])
def test_with_a_guide_program(method):
    def guide(x, y):
        lm_sample("z", [x, y], max_tokens=3, stop=".", temperature=2.0)

    options = {"lm": LM, "num_samples": 6, "method": method, "guide": guide}
    one_by_one(infer_batch(infill, INPUTS, seed=0, **options), infill, INPUTS, **options)


def test_inputs_share_the_calls_of_the_language_model(monkeypatch):
    lm = tiny_lm("ab.", seed=0)
    calls = []
    for name in ("draw", "score"):
        method = getattr(lm, name)
        monkeypatch.setattr(
            lm, name, lambda r, n=name, m=method, **k: calls.append((n, len(r))) or m(r, **k)
        )
    options = {"lm": lm, "num_samples": 4, "method": "smc"}
    list(infer_batch(infill, INPUTS, seed=0, **options))
    assert calls == [("draw", 20), ("score", 20)]
    calls.clear()
    list(infer_batch(infill, INPUTS, seed=0, at_once=2, **options))
    assert [n for _, n in calls] == [8, 8, 8, 8, 4, 4]
    with lmppl.profile() as together:
        list(infer_batch(infill, INPUTS, seed=0, **options))
    with lmppl.profile() as apart:
        list(infer_batch(infill, INPUTS, seed=0, at_once=1, **options))
    assert together.passes < apart.passes / 2


def several(n: int):
    """Takes as many rounds as it is told."""
    for i in range(n):
        lm_sample(f"z{i}", "ab", max_tokens=2)
        lm_sample(f"y{i}", "ab", obs="b")
    return n


def test_the_order_is_that_of_the_inputs():
    lengths = [5, 1, 3, 1, 2, 4, 1]
    inputs = [(n,) for n in lengths]
    for at_once in (1, 3, 7):
        found = infer_batch(several, inputs, lm=LM, num_samples=2, seed=0, at_once=at_once)
        assert [posterior.returns[0] for posterior in found] == lengths


def test_neither_at_once_nor_other_inputs_change_a_posterior():
    options = {"lm": LM, "num_samples": 8, "method": "smc"}
    all_at_once = list(infer_batch(infill, INPUTS, seed=4, **options))
    for some in (
        infer_batch(infill, INPUTS, seed=4, at_once=1, **options),
        infer_batch(infill, INPUTS[:2], seed=4, **options),
    ):
        for one, other in zip(all_at_once, some, strict=False):
            assert one.info["seed"] == other.info["seed"]
            assert_same(one, other)
    assert len({posterior.info["seed"] for posterior in all_at_once}) == len(INPUTS)
    others = infer_batch(infill, INPUTS, seed=5, **options)
    assert all_at_once[0].info["seed"] != next(others).info["seed"]


@pytest.mark.parametrize("kind", [list, iter, torch.tensor], ids=["list", "iterator", "tensor"])
def test_with_a_seed_for_each_input_a_part_gets_what_the_whole_would_give_it(kind):
    options = {"lm": LM, "num_samples": 8, "method": "smc"}
    whole = list(infer_batch(infill, INPUTS, seed=4, **options))
    part = [3, 1]
    seeds = kind([nth_seed(4, i) for i in part])
    found = infer_batch(infill, [INPUTS[i] for i in part], seed=seeds, **options)
    for i, posterior in zip(part, found, strict=True):
        assert posterior.info["seed"] == whole[i].info["seed"]
        assert_same(posterior, whole[i])


@pytest.mark.parametrize(
    ("seeds", "error", "message"),
    [
        ([7], ValueError, "input 1 of the batch has no seed: seed= holds 1 of them"),
        ([7, None], TypeError, "seed=None: it must be an int"),
        ([7, 2**64], ValueError, "below"),
    ],
)
def test_an_input_without_a_seed_is_an_error_in_its_turn(seeds, error, message):
    found = infer_batch(infill, INPUTS, lm=LM, num_samples=2, seed=seeds)
    assert next(found).info["seed"] == 7
    with pytest.raises(error, match=message):
        next(found)


def test_a_seeded_run_leaves_torchs_stream_alone_and_another_takes_from_it():
    before = torch.get_rng_state()
    list(infer_batch(infill, INPUTS, lm=LM, num_samples=2, seed=1))
    assert torch.equal(before, torch.get_rng_state())
    free = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        free += [next(infer_batch(infill, INPUTS, lm=LM, num_samples=2)).info["seed"]]
    free += [next(infer_batch(infill, INPUTS, lm=LM, num_samples=2)).info["seed"]]
    assert free[0] == free[1] != free[2]


def test_inputs_are_taken_as_they_are_needed():
    taken = []

    def source():
        for i, each in enumerate(INPUTS * 3):
            taken.append(i)
            yield each

    found = infer_batch(infill, source(), lm=LM, num_samples=2, seed=0, at_once=3)
    assert not taken
    for yielded, _ in enumerate(found):
        assert len(taken) <= yielded + 3
    assert len(taken) == yielded + 1 == 15


def test_few_particles_are_in_flight_by_default():
    def taken(num_samples):
        count: list[int] = []
        source = (count.append(1) or each for each in INPUTS * 100)
        found = infer_batch(infill, source, lm=LM, num_samples=num_samples, seed=0)
        next(found)
        found.close()
        return len(count)

    assert [taken(n) for n in (1, 64, 128, 600)] == [64, 8, 4, 1]


def test_inputs_by_name_and_bound_arguments():
    inputs = [{"y": y, "x": x} for x, y in INPUTS]
    options = {"lm": LM, "num_samples": 4}
    one_by_one(infer_batch(infill, inputs, seed=0, **options), infill, INPUTS, **options)
    bound = functools.partial(infill, y="ab")
    found = list(infer_batch(bound, [["ab."], {"x": "b"}], seed=0, **options))
    assert_same(found[1], lmppl.infer(infill, "b", "ab", seed=found[1].info["seed"], **options))
    assert list(infer_batch(infill, [], seed=0, **options)) == []
    with pytest.raises(TypeError, match="functools.partial has bound 'y'"):
        next(infer_batch(bound, [{"x": "b", "y": "b"}], seed=0, **options))


def test_the_default_model_is_that_of_the_call():
    with lmppl.use(LM):
        found = infer_batch(infill, INPUTS, num_samples=4, seed=0)
    with lmppl.use(tiny_lm("ab.", seed=5)):
        one_by_one(found, infill, INPUTS, lm=LM, num_samples=4)


def test_the_callback_is_told_which_input():
    figures = []
    list(infer_batch(infill, INPUTS, lm=LM, num_samples=2, seed=0, callback=figures.append))
    assert {each["input"] for each in figures} == set(range(len(INPUTS)))
    assert {each["engine"] for each in figures} == {"smc"}


# --- errors --------------------------------------------------------------------------------------


def fussy(x: str, y: str):
    z = infill(x, y)
    if x == "bb":
        raise ZeroDivisionError("two b")
    require("no end", x != "b.")
    return z


BAD = [
    INPUTS[0],
    "ab.",
    INPUTS[4],
    INPUTS[1],
    ("ab" * 200, "a"),
    {"x": "ab", "y": "b", "w": "b"},
    INPUTS[2],
]


def test_a_bad_input_is_answered_by_its_exception(particles):
    options = {"lm": LM, "num_samples": 4}
    found = list(infer_batch(fussy, BAD, seed=0, on_error="return", **options))
    assert [type(each) for each in found] == [
        Posterior, TypeError, ZeroDivisionError, ZeroEvidenceError, ValueError, TypeError, Posterior,
    ]  # fmt: skip
    for i, each in enumerate(found):
        if isinstance(each, Exception):
            assert any(f"input {i} of the batch" in note for note in each.__notes__)
        else:
            alone = lmppl.infer(fussy, *BAD[i], seed=each.info["seed"], **options)
            assert_same(each, alone)
    assert "item 1 of the data" in str(found[1]) and "it is a str" in str(found[1])
    assert "item 5 of the data" in str(found[5]) and "'w'" in str(found[5])
    assert found[3].posterior.killed == {"no end": 4} and "context" in str(found[4])
    assert all(particle.finished for particle in particles)


@pytest.mark.parametrize("bad", [1, 2, 3, 4, 5])
def test_an_exception_ends_the_run_in_its_turn(bad, particles):
    taken = []
    inputs = [INPUTS[0], INPUTS[2], BAD[bad], *[INPUTS[3]] * 20]
    source = (taken.append(1) or each for each in inputs)
    found = infer_batch(fussy, source, lm=LM, num_samples=4, seed=0, at_once=4)
    assert isinstance(next(found), Posterior) and isinstance(next(found), Posterior)
    with pytest.raises((TypeError, ZeroDivisionError, ZeroEvidenceError, ValueError)) as raised:
        next(found)
    assert any("input 2 of the batch" in note for note in raised.value.__notes__)
    assert len(taken) <= 6 and all(particle.finished for particle in particles)
    with pytest.raises(StopIteration):
        next(found)


def test_an_exception_of_the_iterable_is_raised_after_what_came_before(particles):
    def source():
        yield from INPUTS[:2]
        raise OSError("the file ends here")

    found = infer_batch(infill, source(), lm=LM, num_samples=2, seed=0, on_error="return")
    assert isinstance(next(found), Posterior) and isinstance(next(found), Posterior)
    with pytest.raises(OSError, match="ends here"):
        next(found)
    assert all(particle.finished for particle in particles)


@pytest.mark.parametrize("how", ["close", "break", "interrupt"])
def test_leaving_early_ends_what_is_suspended(how, particles):
    ended = []

    def program(n: int):
        try:
            if how == "interrupt" and n == 3:
                lm_sample("first", "ab", max_tokens=1)
                raise KeyboardInterrupt
            several(n)
        finally:
            ended.append(n)

    def take(found):
        for _ in found:
            if how == "break":
                break
            if how == "close":
                found.close()

    inputs = [(n,) for n in (1, 4, 3, 5)]
    found = infer_batch(program, inputs, lm=LM, num_samples=3, seed=0, on_error="return")
    if how == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            take(found)
    else:
        take(found)
    del found
    assert len(particles) == 12 and all(particle.finished for particle in particles)
    assert sorted(ended) == [1] * 3 + [3] * 3 + [4] * 3 + [5] * 3


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"inputs": "ab."}, TypeError, "one str: put it in a list"),
        ({"inputs": {"x": "a", "y": "b"}}, TypeError, "given one dict"),
        ({"inputs": 3}, TypeError, "int"),
        ({"method": "gflownet"}, ValueError, "train one on many"),
        ({"method": lmppl.GFlowNet(correct=False)}, ValueError, "guide="),
        ({"method": "smd"}, ValueError, "did you mean 'smc'"),
        ({"twits": None}, TypeError, "did you mean 'twist'"),
        ({"profile": True}, TypeError, "with lmppl.profile"),
        ({"num_samples": 0}, ValueError, "num_samples=0"),
        ({"seed": "7"}, TypeError, "seed='7'"),
        ({"at_once": 0}, ValueError, "at_once=0"),
        ({"at_once": 2.5}, TypeError, "at_once=2.5"),
        ({"on_error": "ignore"}, ValueError, "on_error='ignore'"),
        ({"model": "infill"}, TypeError, "model must be a function"),
    ],
)
def test_a_wrong_call_is_an_error_at_once(wrong, error, message):
    call = {"model": infill, "inputs": INPUTS, "lm": LM, **wrong}
    with pytest.raises(error, match=message):
        infer_batch(call.pop("model"), call.pop("inputs"), **call)
