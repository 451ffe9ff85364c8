"""A guide notices that it is used for other texts than it was trained on."""

import functools
import warnings

import pytest

import lmppl
from lmppl import lm_sample
from lmppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=0)


def write(x, most=3, **others):
    return lm_sample("z", x, max_tokens=most, lm=LM, **others)


def trained(*inputs, program=write):
    return lmppl.LMGuide(program, lm=LM).fit(list(inputs), steps=2, seed=0, batch_size=8)


def use(guide, program, *args, method="importance"):
    return lmppl.infer(program, *args, lm=LM, method=method, guide=guide, num_samples=4, seed=0)


@pytest.mark.parametrize("method", ["importance", "smc", "gflownet"])
def test_another_length_is_noticed_once(method):
    guide = trained(("a",))
    use(guide, write, "b", method=method)  # another input is what it is for
    with pytest.warns(UserWarning, match="'z'.*trained with max_tokens=3.*has max_tokens=5"):
        use(guide, write, "a", 5, method=method)
    use(guide, write, "a", 6, method=method)  # warnings are errors here


@pytest.mark.parametrize(
    "others, said",
    [
        ({"stop": "."}, r"with stop=\[\], and the program has stop=\['\.'\]"),
        ({"temperature": 0.5}, r"temperature=1\.0, and the program has temperature=0\.5"),
        ({"stop": ".", "temperature": 0.5}, r"stop=\['\.'\], temperature=0\.5"),
    ],
)
def test_what_has_changed_is_said(others, said):
    with pytest.warns(UserWarning, match=said):
        use(trained(("a",)), functools.partial(write, **others), "a")


def test_choices_are_other_texts():
    def choose(x):
        return lm_sample("z", x, choices=["a", "b"], lm=LM)

    with pytest.warns(UserWarning, match="max_tokens=3, choices=False.*max_tokens=None, choices="):
        use(trained(("a",)), choose, "a")


def test_what_differs_between_training_inputs_is_free():
    guide = trained(("a", 3), ("b", 5))
    use(guide, write, "a", 4)
    with pytest.warns(UserWarning, match="temperature=2"):
        use(guide, functools.partial(write, temperature=2.0), "a", 4)


def test_choices_may_depend_on_the_input():
    def choose(x, texts):
        return lm_sample("z", x, choices=texts, lm=LM)

    guide = trained(("a", ["a", "b"]), ("b", ["aa", "ab", "b"]), program=choose)
    use(guide, choose, "a", ["bb", "ab"])


def test_training_goes_by_its_own_lengths():
    guide = trained(("a",))
    guide.fit([("a", 5)], steps=1, seed=0, batch_size=8)
    use(guide, write, "a", 5)
    with pytest.warns(UserWarning, match="max_tokens=5.*max_tokens=3"):
        use(guide, write, "a")


def test_a_loaded_guide_remembers(tmp_path):
    trained(("a",)).save(tmp_path / "guide")
    guide = lmppl.LMGuide.load(tmp_path / "guide", write, lm=LM)
    use(guide, write, "a")
    with pytest.warns(UserWarning, match="max_tokens=3.*max_tokens=7"):
        use(guide, write, "a", 7)


def test_an_untrained_guide_has_nothing_to_say():
    guide = lmppl.LMGuide(write, lm=LM)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use(guide, write, "a", 3)
        use(guide, write, "a", 5)
