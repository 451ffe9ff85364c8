"""A program's arguments: how they are bound, and that every run has its own."""

from __future__ import annotations

import functools
import math

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
        (({"z": 4, "x": 0},), None, (0, 1, 4)),  # one dict, by name
        (({"x": 0},), None, (0, 1, 2)),
        (({"y": 0},), None, ({"y": 0}, 1, 2)),  # x is missing
        (({"x": 0, "w": 1},), None, ({"x": 0, "w": 1}, 1, 2)),
        (({"x": 0, 3: 1},), None, ({"x": 0, 3: 1}, 1, 2)),
        (({"x": 0},), {}, ({"x": 0}, 1, 2)),
        (({"x": 0},), {"z": 3}, ({"x": 0}, 1, 3)),
        (({},), None, ({}, 1, 2)),
    ],
)
def test_arguments_by_name_become_positional_where_they_can(args, kwargs, result):
    bound, positional = bind(program, args, kwargs)
    assert bound(*positional) == result
    assert isinstance(bound, functools.partial) == (result[2] != 2)


def test_a_program_of_any_keywords_keeps_its_dict():
    def open_ended(given=None, *more, **rest):
        return given, more, rest

    for given in ({"rest": 1}, {"more": 1}, {"else": 1}, {}):
        bound, args = bind(open_ended, (given,))
        assert bound(*args) == (given, (), {})


def test_an_input_may_be_a_dict_in_infer_as_in_infer_batch():
    def infill(x, y, *, size=1):
        z = lm_sample("z", x, max_tokens=size)
        lm_sample("y", [x, z], obs=y)

    def of_a_dict(story):
        return infill(story["x"], story["y"], size=story["size"])

    item = {"x": "ab.", "y": "b", "size": 2}
    options = {"lm": LM, "method": "importance", "num_samples": 5}
    (batched,) = lmppl.infer_batch(infill, [item], seed=0, **options)
    seed = batched.info["seed"]
    shared = {"size": 1, "y": "b"}  # the input's own size counts
    (other,) = lmppl.infer_batch(
        infill, [{"x": "ab.", "size": 2}], kwargs=shared, seed=0, **options
    )
    expected = lmppl.infer(functools.partial(infill, size=2), "ab.", "b", seed=seed, **options)
    for found in (
        batched,
        other,
        lmppl.infer(infill, item, seed=seed, **options),
        lmppl.infer(infill, seed=seed, kwargs=item, **options),
        lmppl.infer(of_a_dict, item, seed=seed, **options),
        *lmppl.infer_batch(of_a_dict, [(item,)], seed=0, **options),
        *lmppl.infer_batch(of_a_dict, [{"story": item}], seed=0, **options),
    ):
        assert torch.equal(found.log_weights, expected.log_weights)
    with pytest.raises(TypeError, match=r"item 0 .*does not fit: the program .*'nope'"):
        next(lmppl.infer_batch(infill, [{**item, "nope": 1}], **options))
    with pytest.raises(TypeError, match="kwargs= takes a dict"):
        lmppl.infer_batch(infill, [item], kwargs=["x"], **options)


def test_diagnose_takes_arguments_by_name():
    def infill(x, y, *, size=1):
        z = lm_sample("z", x, max_tokens=size)
        lm_sample("y", [x, z], obs=y)

    def guide(x, y):
        lm_sample("z", [y], max_tokens=2)

    item = {"x": "ab.", "y": "b", "size": 2}
    options = {"lm": LM, "guide": guide, "num_samples": 10, "seed": 0}
    exact = lmppl.infer(infill, item, lm=LM, method="exact")
    found = [
        lmppl.diagnose(infill, item, posterior=exact, **options),
        lmppl.diagnose(infill, kwargs=item, posterior=exact, **options),
        lmppl.diagnose(infill, "ab.", "b", kwargs={"size": 2}, posterior=exact, **options),
    ]
    assert found[0].eubo == found[1].eubo == found[2].eubo and math.isfinite(found[0].eubo)


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
