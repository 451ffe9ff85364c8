"""A program's arguments: how they are bound, and that every run has its own."""

from __future__ import annotations

import functools

import pytest
import torch
from pyro import poutine

import lmppl
from lmppl import lm_sample
from lmppl.runtime import Particle
from lmppl.runtime.arguments import bind, call
from lmppl.runtime.simulation import simulate
from lmppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=0)
LM.model.requires_grad_(False)


def dialogue(turns, notes=None):
    """A program that keeps its turns, and what it noted, in its arguments."""
    for i in range(2):
        turns.append(lm_sample(f"z{i}", turns, max_tokens=2, stop="."))
    lm_sample("y", turns, obs="b")
    if notes is not None:
        notes["deep"][0].append(len(turns))
    return tuple(turns), notes


def pure(turns, notes=None):
    return dialogue(list(turns), None if notes is None else {"deep": [[]]})


@pytest.mark.parametrize("method", ["importance", "smc", "exact", "gflownet"])
def test_particles_do_not_read_what_others_append_to_an_argument(method):
    turns, notes = ["ab."], {"deep": [[]]}
    options = {"ess_threshold": 1.0} if method == "smc" else {}
    if method == "gflownet":
        options["guide"] = lmppl.LMGuide(dialogue, lm=LM)
    found = lmppl.infer(
        dialogue, turns, notes, lm=LM, method=method, num_samples=8, seed=0, **options
    )
    if method == "gflownet":
        options["guide"] = lmppl.LMGuide(pure, lm=LM)
    expected = lmppl.infer(
        pure, turns, notes, lm=LM, method=method, num_samples=8, seed=0, **options
    )
    assert torch.equal(found.log_weights, expected.log_weights)
    for (said, noted), (wanted, _) in zip(found.returns, expected.returns, strict=True):
        assert said == wanted and len(said) == 3 and noted == {"deep": [[3]]}
    assert turns == ["ab."] and notes == {"deep": [[]]}


def test_training_and_simulation_give_each_run_its_own_arguments():
    turns = ["ab."]
    with lmppl.use(LM):
        runs = simulate(functools.partial(dialogue), (turns,), 3, seed=0)
    for run in runs:
        texts = [node["fn"].text(node["value"]) for node in run.sites.values()]
        assert run.sites["z1"]["fn"].prefix_ids == LM.encode(["ab.", texts[0]])
        assert run.sites["y"]["fn"].prefix_ids == LM.encode(["ab.", *texts[:2]])
    guide = lmppl.LMGuide(dialogue, lm=LM)
    guide.fit([(turns,)], steps=1, batch_size=2, seed=0)
    assert turns == ["ab."]


def test_arguments_that_partial_has_bound_are_copied_too():
    program = functools.partial(dialogue, notes={"deep": [[]]})
    posterior = lmppl.infer(program, ["ab."], lm=LM, method="importance", num_samples=3, seed=0)
    assert [notes for _, notes in posterior.returns] == [{"deep": [[3]]}] * 3


def test_copies_keep_their_shape_and_share_what_is_no_container():
    shared = [1]
    text = lmppl.LMText(LM, "a", max_tokens=2).text(torch.tensor([0, 1]))
    tensor, count = torch.zeros(2), 3
    loop: list = [shared]
    loop.append(loop)
    args = ([shared, shared], {"k": (shared, tensor)}, {1, 2}, (text, count), loop)
    first, by_name, numbers, same, copied_loop = call(lambda *given: given, args)
    assert first[0] is first[1] is by_name["k"][0] is copied_loop[0] is not shared
    assert copied_loop[1] is copied_loop is not loop
    assert by_name["k"][1] is tensor and same is args[3]
    assert numbers == {1, 2} and numbers is not args[2] and by_name is not args[1]
    assert Particle(lambda *given: given, args, seed=0).args is args  # by which inputs are known


def program(x, y=1, *, z=2):
    return x, y, z


@pytest.mark.parametrize(
    ("args", "kwargs", "result"),
    [
        ((1,), None, (1, 1, 2)),
        ((1,), {"y": 5}, (1, 5, 2)),
        ((), {"z": 4, "x": 0}, (0, 1, 4)),
    ],
)
def test_arguments_by_name_become_positional_where_they_can(args, kwargs, result):
    bound, positional = bind(program, args, kwargs)
    assert bound(*positional) == result
    assert isinstance(bound, functools.partial) == (kwargs is not None and "z" in kwargs)


def test_infer_takes_the_programs_keywords_and_guides_see_them():
    def infill(x, *, size=1, y=None):
        z = lm_sample("z", x, max_tokens=size)
        lm_sample("y", [x, z], obs=y)

    def guide(x):
        lm_sample("z", x, max_tokens=2)

    for options in ({}, {"guide": guide}):
        named = lmppl.infer(
            infill, lm=LM, method="smc", seed=0, kwargs={"x": "ab.", "size": 2, "y": "b"}, **options
        )
        bound = functools.partial(infill, size=2, y="b")
        expected = lmppl.infer(bound, "ab.", lm=LM, method="smc", seed=0, **options)
        assert torch.equal(named.log_weights, expected.log_weights)
    with pytest.raises(TypeError, match=r"infill\(x.*was given 1 positional.*\['nope'\].*nope"):
        lmppl.infer(infill, "ab.", lm=LM, kwargs={"nope": 1})
    with pytest.raises(TypeError, match="kwargs= takes a dict"):
        lmppl.infer(infill, "ab.", lm=LM, kwargs=["x"])


def generator(x):
    yield lm_sample("z", x, max_tokens=2)


async def coroutine(x):
    lm_sample("z", x, max_tokens=2)


class Callable:
    async def __call__(self, x):
        lm_sample("z", x, max_tokens=2)


def fine(x):
    lm_sample("z", x, max_tokens=2)


REFUSED = {
    "generator": (generator, "is a generator function"),
    "async def": (coroutine, "is an 'async def'"),
    "partial": (
        functools.partial(functools.partial(generator), x="ab."),
        "is a generator function",
    ),
    "wrapped": (functools.wraps(coroutine)(lambda *args: coroutine(*args)), "is an 'async def'"),
    "handler": (poutine.scale(functools.partial(generator), 2.0), "is a generator function"),
    "object": (Callable(), "Callable is an 'async def'"),
    "text": ("infill", "must be a function, given str"),
}
ENTRANCES = {
    "infer": lambda program: lmppl.infer(program, "ab.", lm=LM),
    "infer_batch": lambda program: lmppl.infer_batch(program, [("ab.",)], lm=LM),
    "LMGuide": lambda program: lmppl.LMGuide(program, lm=LM),
    "guide program": lambda program: lmppl.LMGuide(fine, program=program, lm=LM),
    "simulate": lambda program: simulate(program, ("ab.",), 1),
}


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_run_when_it_is_called_is_refused(case, entrance):
    given, message = REFUSED[case]
    with pytest.raises(TypeError, match=message):
        ENTRANCES[entrance](given)


def test_a_guide_program_of_infer_is_checked_too():
    with pytest.raises(TypeError, match="guide: generator is a generator function"):
        lmppl.infer(fine, "ab.", lm=LM, guide=generator)
