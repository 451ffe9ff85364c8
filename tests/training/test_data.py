"""What a guide is trained on: collections, streams, simulations; whether it tells inputs apart."""

import functools
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_helpers import LM, QUICK, infill, new_guide

import lmppl
from lmppl import lm_sample
from lmppl.testing import tiny_lm
from lmppl.testing.programs import CASES

# --- inputs --------------------------------------------------------------------------------------


def test_an_iterator_is_read_as_it_is_needed():
    read = []

    def stream():
        for y in itertools.cycle(["a", "b", "ab"]):
            read.append(y)
            yield "ab.", y

    guide = new_guide().fit(stream(), steps=3, inputs_per_step=2, **QUICK)
    assert [figures["inputs"] for figures in guide.history] == [2, 2, 2]
    assert len(read) == 6


def test_a_stream_that_ends_early():
    with pytest.warns(UserWarning, match="the data ended after 2 of 9 steps"):
        guide = new_guide().fit(
            iter([("ab.", "a"), ("ab.", "b"), ("ab.", "ab")]), steps=9, inputs_per_step=2, **QUICK
        )
    assert [figures["inputs"] for figures in guide.history] == [2, 1]


def test_a_bad_item_of_a_stream_is_named():
    with pytest.raises(TypeError, match="item 2 of the data .* it is a str"):
        new_guide().fit(iter([("ab.", "a"), ("ab.", "b"), "ab."]), steps=9, **QUICK)


def test_rows_of_a_table_are_inputs():
    """As of ``datasets.Dataset``: it has a length and yields dicts."""

    class Table:
        def __len__(self):
            return 2

        def __iter__(self):
            yield {"x": "ab.", "y": "a"}
            yield {"y": "b", "x": "ba"}

    guide = new_guide().fit(Table(), steps=2, **QUICK)
    assert [figures["inputs"] for figures in guide.history] == [2, 2]


def test_bound_keywords_are_no_part_of_an_input():
    def program(x, *, y, tokens=2):
        z = lm_sample("z", x, max_tokens=tokens, stop=".")
        lm_sample("y", [x, z], max_tokens=2, obs=y)

    bound = functools.partial(program, y="a")
    assert len(new_guide(bound).fit([("ab.",), {"x": "ba"}], steps=1, **QUICK).history) == 1


# --- simulated inputs ----------------------------------------------------------------------------


@pytest.mark.slow
def test_simulated_inputs_teach_a_guide_for_inputs_never_seen():
    """Held out: an observation that stands for any other; the ESS of an untrained guide is less."""
    evaluation = {"eval_data": [("ab.", y) for y in ("a.", "ba", "bb")], "eval_every": 100}
    guide = new_guide(condition_on=["y"])
    guide.fit(
        [("ab.",)],
        steps=150,
        simulate=40,
        eval_samples=128,
        **evaluation,
        **(QUICK | {"batch_size": 16}),
    )
    before = new_guide(condition_on=["y"])
    before.fit([("ab.",)], steps=1, simulate=1, learning_rate=1e-9, **evaluation, **QUICK)
    assert guide.history[-1]["eval_ess"] > 1.3 * before.history[-1]["eval_ess"]


def test_without_data_the_program_needs_no_arguments():
    def program():
        z = lm_sample("z", "ab.", max_tokens=2, stop=".")
        lm_sample("y", ["b", z], max_tokens=1, obs="a")

    guide = new_guide(program).fit(simulate=4, steps=3, **QUICK)
    assert len(guide.history) == 3
    with pytest.raises(TypeError, match="item 0 of the data does not fit"):
        new_guide().fit(simulate=4, steps=3, **QUICK)


def test_an_endless_stream_of_simulations():
    guide = new_guide().fit([("ab.", "aa")], steps=3, simulate=math.inf, inputs_per_step=2, **QUICK)
    assert [figures["inputs"] for figures in guide.history] == [2, 2, 2]


def test_simulations_without_an_observation_teach_nothing():
    with pytest.warns(UserWarning, match=r"observes nothing.*condition_on=.*sites: z, y"):
        new_guide().fit([("ab.",)], simulate=4, steps=1, **QUICK)


def test_map_style_data_sets_are_read():
    """As of ``torch.utils.data.Dataset``: a length and items, and nothing to iterate."""

    class Table:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return ("ab.", "ab"[: index + 1]) if index < 2 else "ab."

    with pytest.raises(TypeError, match="item 2 of the data .* it is a str"):
        new_guide().fit(Table(), steps=1, **QUICK)


def test_an_error_of_a_program_names_its_input():
    data = [("ab.", "a")] * 3 + [("ab.", "xyz")]
    with pytest.raises(ValueError, match="cannot encode 'xyz'") as caught:
        new_guide().fit(data, steps=4, **QUICK)
    assert "of infill('ab.', 'xyz'), at or after site 'z'" in caught.value.__notes__[0]


def rewarded(x, reward):
    z = lm_sample("z", x, max_tokens=2, stop=".")
    pyro.factor("reward", torch.tensor(reward * z.count("b")))


def test_inputs_that_look_alike_to_the_guide_are_reported():
    with pytest.warns(UserWarning, match="inputs 0 and 1 of the data have other arguments"):
        new_guide(rewarded).fit([("ab.", -2.0), ("ab.", 2.0)], steps=2, **QUICK)


def test_inputs_that_do_not_look_alike_are_not():
    new_guide(rewarded).fit([("ab.", -2.0), ("ba", 2.0)], steps=2, **QUICK)
    new_guide(rewarded).fit([("ab.", 2.0), ("ab.", 2.0)], steps=2, **QUICK)
    new_guide(infill).fit([("ab.", "b"), ("ab.", "a")], steps=2, **QUICK)

    def prompted(x, reward):
        z = lm_sample("z", x, max_tokens=2, infer={"guide_prompt": "a" if reward > 0 else "b"})
        pyro.factor("reward", torch.tensor(reward * z.count("b")))

    new_guide(prompted).fit([("ab.", -2.0), ("ab.", 2.0)], steps=2, **QUICK)
    hiding = new_guide(infill, condition_on=[])  # what differs is not to be seen
    hiding.fit([("ab.", "b"), ("ab.", "a")], steps=2, **QUICK)


def test_a_branch_that_cannot_observe_the_simulated_text_ends_there():
    """How long the observed text may be depends on a latent, and the program relies on its text."""
    reached = []

    def program(x, y=None):
        is_long = bool(pyro.sample("long", dist.Bernoulli(0.5)))
        text = lm_sample("y", x, max_tokens=6 if is_long else 2, stop=".", obs=y)
        reached.append((is_long, len(text.token_ids)))

    lm = tiny_lm("ab.", seed=0, eos=False)
    guide = lmppl.LMGuide(program, lm=lm, condition_on=[])
    guide.fit([("ab", "a.")], simulate=16, steps=6, **QUICK)
    assert min(guide.history.column("alive")) < 1.0
    assert all(is_long or 0 < length <= 2 for is_long, length in reached)


def test_factors_cannot_be_simulated():
    with pytest.raises(ValueError, match="is a factor, which simulated draws would ignore"):
        new_guide(CASES["factor"].program).fit([("ba.", -1.5)], steps=1, simulate=2, **QUICK)


def test_the_guide_sees_only_what_it_may():
    """A label that is simulated, and not named: the guide's prompts are those without it."""
    guide = new_guide(condition_on=[])
    guide.fit([("ab.", "aa")], steps=2, simulate=3, **QUICK)
    with lmppl.use(LM):
        assert guide.observations(("ab.", "aa")) == {}
