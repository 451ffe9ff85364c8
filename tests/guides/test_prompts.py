"""What the automatic guide reads."""

import functools
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_helpers import draw_samples, latent_ids, shaken

import lmppl
from lmppl import lm_sample, require, tool
from lmppl.guides.prompts import find_observations
from lmppl.testing import enumerate_program, guide_log_probs, tiny_lm

# Enough characters to write ``b = 1.0`` on a line of its own.
LM = tiny_lm(["a", "b", ".", "\n", " ", "=", "1", "0"], seed=0, bos=True)
PLAIN = tiny_lm("ab.", seed=0)
EOS = LM.vocabulary.eos_id
(BOS,) = LM.vocabulary.bos_ids


def ids(text, lm=LM):
    return lm.vocabulary.encode(text)


def observed(program, *args, lm=LM, condition_on="all", strict=True):
    with lmppl.use(lm):
        (found,) = find_observations([(program, args)], lm.vocabulary, condition_on, strict=strict)
        return dict(found)


def test_many_inputs_are_observed_in_one_batch():
    """Each as on its own, simulated ones with a program of their own, in as many calls as one."""
    inputs = [(infill, ("a", y)) for y in ("b", "ab", "ba")]
    with lmppl.use(LM):
        drawn = LM.tokens_sampled
        together = find_observations(inputs, LM.vocabulary, "all", strict=True)
        per_input = (LM.tokens_sampled - drawn) / 3
    assert together == [observed(*each[:1], *each[1]) for each in inputs]
    assert per_input <= 2 * 2


def prompts(program, *args, lm=LM, condition_on="all"):
    """Of every latent text in one run."""
    guide = lmppl.LMGuide(program, lm=lm, condition_on=condition_on)
    (sample,) = draw_samples(guide, program, args, 1)
    return {name: draw.fn.prefix_ids for name, draw in sample.proposer.draws.items()}


def infill(x, y):
    z = lm_sample("z", x, max_tokens=2)
    lm_sample("y", [x, z], obs=y)


def two(x, first, last):
    z = lm_sample("z", x, max_tokens=2)
    lm_sample("first", [x, z], obs=first)
    w = lm_sample("w", [x, z], max_tokens=2)
    lm_sample("last", [x, w], obs=last)


def test_later_observations_come_before_the_prefix_a_line_each():
    assert prompts(infill, "ab", "b.") == {"z": (BOS, *ids("b.\n"), *ids("ab"))}
    assert prompts(infill, "ab", "b.", lm=PLAIN) == {"z": ids("b.ab", PLAIN)}  # it has no newline


def test_observations_that_the_run_has_passed_are_left_out_and_sites_are_told_apart():
    guide = lmppl.LMGuide(two, lm=LM)
    (sample,) = draw_samples(guide, two, ("a", "b.", "ba"), 1)
    z, w = (sample.proposer.draws[name].fn.prefix_ids for name in ("z", "w"))
    assert z == (BOS, *ids("b.\nba\n"), *ids("a"))
    text = sample.particle.sites["z"]
    drawn = text["fn"].text(text["value"])
    marks = (EOS, *drawn.parts[0], EOS) if drawn.finish_reason == "eos" else (EOS,)
    assert w == (BOS, *marks, *ids("ba\n"), *ids("a"), *drawn.parts[0])


def test_marks_tell_sites_and_the_ends_of_texts_apart():
    """With [x, z] as the prefix of w, "ab" may be z, or "a" that ended and the beginning of w."""

    def program(x):
        z = lm_sample("z", x, max_tokens=2)
        lm_sample("w", [x, z], max_tokens=2)

    guide = lmppl.LMGuide(program, lm=PLAIN)
    eos = PLAIN.vocabulary.eos_id
    found = set()
    for sample in draw_samples(guide, program, ("a",), 40):
        z = latent_ids(sample.particle)["z"]
        found.add(z[-1] == eos)
        visible = tuple(token for token in z if token != eos)
        marks = (eos, *visible, eos) if z[-1] == eos else (eos,)
        prompt = sample.proposer.draws["w"].fn.prefix_ids
        assert prompt == (*marks, *ids("a", PLAIN), *visible)
    assert found == {True, False}


def after(x):
    z = lm_sample("z", x, max_tokens=2, stop=".")
    lm_sample("w", [x, z], max_tokens=3, stop=".")


def beside(x):
    lm_sample("z", x, max_tokens=2, stop=".")
    lm_sample("w", x, max_tokens=3, stop=".")


def by_half(x):
    z = lm_sample("z", x, max_tokens=2, stop=".")
    lm_sample("w", [x, z] if "a" in z else x, max_tokens=3, stop=".")


@pytest.mark.parametrize("program", [after, beside, by_half])
def test_no_two_states_of_a_run_have_one_prompt(program):
    """All that was drawn before a token, from the tokens that the guide has seen by then."""
    guide = lmppl.LMGuide(program, lm=PLAIN)
    states = {}
    for sample in draw_samples(guide, program, ("a",), 300, temperature=3.0):
        drawn = latent_ids(sample.particle)
        before = ()
        for name, draw in sample.proposer.draws.items():
            for t in range(len(drawn[name])):
                seen = draw.fn.prefix_ids + drawn[name][:t]
                assert states.setdefault(seen, (before, t)) == (before, t)
            before = (*before, drawn[name])
    assert len(states) > 30


def test_a_text_that_ended_is_not_repeated_where_something_follows_it():
    def program(x):
        z = lm_sample("z", x, max_tokens=2)
        lm_sample("w", [z, x], max_tokens=2)

    guide = lmppl.LMGuide(program, lm=PLAIN)
    eos = PLAIN.vocabulary.eos_id
    for sample in draw_samples(guide, program, ("ab.",), 20):
        z = latent_ids(sample.particle)["z"]
        visible = tuple(token for token in z if token != eos)
        if visible == ids(".", PLAIN):
            continue  # it happens to be the end of the prefix
        marks = (eos, eos) if z[-1] == eos else (eos,)
        prompt = sample.proposer.draws["w"].fn.prefix_ids
        assert prompt == (*marks, *visible, *ids("ab.", PLAIN))


def test_no_more_than_sixteen_marks():
    def program(x):
        drawn = []
        for i in range(20):
            drawn.append(lm_sample(f"z{i}", [*drawn, x], choices=["a", "b"]))

    found = prompts(program, "a", lm=PLAIN)
    eos = PLAIN.vocabulary.eos_id
    assert [each.count(eos) for each in found.values()] == [*range(16), 16, 16, 16, 16]
    assert all(each[-1:] == ids("a", PLAIN) for each in found.values())


def apart(x, y):
    """What is observed in the end ties texts that do not depend on each other."""
    z = lm_sample("z", x, max_tokens=2, stop=".")
    w = lm_sample("w", x, max_tokens=2, stop=".")
    lm_sample("y", [x, z, w], obs=y)


def test_a_text_that_the_prefix_does_not_hold_stands_in_front():
    guide = lmppl.LMGuide(apart, lm=LM)
    for sample in draw_samples(guide, apart, ("a", "b."), 20):
        z = tuple(t for t in latent_ids(sample.particle)["z"] if t != EOS)
        mark = (EOS, *z, *ids("\n")) if z else (EOS, EOS)
        prompt = sample.proposer.draws["w"].fn.prefix_ids
        assert prompt == (BOS, *mark, *ids("b.\n"), *ids("a"))


def test_numbers_stand_in_front():
    def program(x):
        pyro.sample("b", dist.Bernoulli(0.5))
        pyro.sample("a", dist.Delta(torch.tensor([1.0 + 1e-9, 0.1])).to_event(1))
        lm_sample("z", x, max_tokens=2)

    guide = lmppl.LMGuide(program, lm=tiny_lm([*"ab.\n =[],0123456789"], seed=0))
    eos = guide.base.vocabulary.eos_id
    seen = set()
    for sample in draw_samples(guide, program, ("a",), 8):
        b = float(sample.particle.sites["b"]["value"])
        shown = [ids(f"{text}\n", guide.base) for text in (f"b = {b}", "a = [1, 0.1]")]
        prompt = sample.proposer.draws["z"].fn.prefix_ids
        assert prompt == (eos, *shown[0], eos, *shown[1], *ids("a", guide.base))
        seen.add(b)
    assert seen == {0.0, 1.0}


def test_whole_numbers_are_told_apart_without_digits():
    def program(x):
        pyro.sample("k", dist.Poisson(9.0))
        pyro.sample("s", dist.Bernoulli(0.5).expand([3]).to_event(1))
        lm_sample("z", x, max_tokens=2)

    guide = lmppl.LMGuide(program, lm=PLAIN)
    prompts_of = {}
    for sample in draw_samples(guide, program, ("a",), 100):
        sites = sample.particle.sites
        state = (float(sites["k"]["value"]), *sites["s"]["value"].tolist())
        prompts_of.setdefault(state, set()).add(sample.proposer.draws["z"].fn.prefix_ids)
    assert len(prompts_of) > 20 and all(len(each) == 1 for each in prompts_of.values())
    assert len({each for own in prompts_of.values() for each in own}) == len(prompts_of)


def test_the_latest_stand_in_front_where_there_is_no_room_for_all():
    def program(x):
        for i in range(5):
            lm_sample(f"z{i}", x, choices=["ab" * 40, "ba" * 40])
        lm_sample("w", x, max_tokens=2)

    found = prompts(program, "a", lm=PLAIN)["w"]  # of a model with a context of 256 tokens
    eos = PLAIN.vocabulary.eos_id
    assert found[:2] == (eos, eos) and found.count(eos) == 2 + 3 * 2
    assert len(found) == 2 + 3 * 82 + 1
    long = prompts(program, "a" * 150, lm=PLAIN)["w"]
    assert long.count(eos) == 4 + 2 and len(long) == 4 + 82 + 150


@pytest.mark.parametrize("context_length", range(19, 30))
def test_what_stands_in_front_fits_the_context(context_length):
    """Wherever the prefix and the text themselves do."""

    def program(x):
        for i in range(3):
            lm_sample(f"z{i}", x, max_tokens=9)

    lm = tiny_lm("ab.\n", seed=0, context_length=context_length)
    guide = lmppl.LMGuide(program, lm=lm)
    for sample in draw_samples(guide, program, ("ab",), 64):
        for draw in sample.proposer.draws.values():
            assert len(draw.fn.prefix_ids) + 9 <= context_length


def test_an_eos_in_an_observation_is_not_shown():
    def program(x, y):
        z = lm_sample("z", x, max_tokens=2)
        lm_sample("y", [x, z], max_tokens=5, obs=y)

    assert observed(program, "a", "b") == {"y": ids("b")}


def test_condition_on():
    assert observed(two, "a", "b.", "ba") == {"first": ids("b."), "last": ids("ba")}
    assert observed(two, "a", "b.", "ba", condition_on=["last"]) == {"last": ids("ba")}
    assert observed(two, "a", "b.", "ba", condition_on=[]) == {}
    assert prompts(two, "a", "b.", "ba", condition_on=["first"])["z"] == (
        BOS, *ids("b.\n"), *ids("a"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="condition_on names 'z'.*observed sites: first, last"):
        observed(two, "a", "b.", "ba", condition_on=["z"])
    with pytest.raises(TypeError, match=r"condition_on='last': give 'all' or a list of names"):
        lmppl.LMGuide(two, lm=LM, condition_on="last")


def test_a_label_that_is_predicted_is_not_seen():
    """Trained on inputs with a label, a guide that may not see it works on one without."""

    def program(x, label=None):
        z = lm_sample("z", x, max_tokens=2)
        lm_sample("label", [x, z], max_tokens=2, obs=label)
        lm_sample("y", [z, x], obs="ab")

    guide = lmppl.LMGuide(program, lm=LM, condition_on=["y"])
    with lmppl.use(LM):
        assert guide.observations(("a", "b.")) == guide.observations(("a", None))


# --- runs that differ ----------------------------------------------------------------------------


def differs(x, y, prompt=None):
    """What is observed depends on what was drawn."""
    infer = None if prompt is None else {"guide_prompt": prompt}
    z = lm_sample("z", x, max_tokens=6, temperature=9.0, infer=infer)
    lm_sample("y", x, obs=y + str(z))


def absent(x, y):
    """Whether something is observed depends on what was drawn."""
    z = lm_sample("z", x, max_tokens=6, temperature=9.0)
    lm_sample(f"y after {str(z)!r}", x, obs=y)


@pytest.mark.parametrize("program", [differs, absent])
def test_runs_that_observe_different_things_need_a_prompt(program):
    assert observed(program, "ab", "b", strict=False) == {}
    with pytest.raises(ValueError, match=r"observe site 'y.*' differently.*guide_prompt"):
        observed(program, "ab", "b")


def test_several_inputs_need_a_prompt_and_one_does_not():
    guide = lmppl.LMGuide(differs, lm=PLAIN)
    guide.fit([("ab", "b")], steps=1, seed=0, batch_size=8)
    with pytest.raises(ValueError, match="guide_prompt"):
        guide.fit([("ab", "b"), ("ab", "a")], steps=1, seed=0, batch_size=8)


def test_a_prompt_is_what_was_asked_for():
    assert observed(differs, "ab", "b", "a.") == {}
    found = prompts(differs, "ab", "b", "a.", lm=PLAIN)
    assert found == {"z": ids("a.", PLAIN)}
    guide = lmppl.LMGuide(differs, lm=PLAIN)
    guide.fit([("ab", "b", "a."), ("ab", "a", "b.")], steps=1, seed=0, batch_size=8)


def test_a_prompt_replaces_all_that_the_guide_would_see():
    def program(x, y):
        z = lm_sample("z", x, max_tokens=2, infer={"guide_prompt": [x, ".", y]})
        lm_sample("y", [x, z], obs=y)

    assert prompts(program, "ab", "b.") == {"z": (BOS, *ids("ab.b."))}


def two_echoes(x):
    z = lm_sample("z", x, max_tokens=6, temperature=9.0)
    lm_sample("echo", x, obs="b" + str(z))
    lm_sample("other", x, obs="a" + str(z))


def test_condition_on_settles_it_too():
    def program(x, y):
        z = lm_sample("z", x, max_tokens=6, temperature=9.0)
        lm_sample("echo", x, obs="b" + str(z))
        lm_sample("y", [x, z], obs=y)

    with pytest.raises(ValueError, match="'echo' differently"):
        observed(program, "ab", "b", lm=PLAIN)
    with pytest.raises(ValueError, match="'other' differently"):
        observed(two_echoes, "ab", lm=PLAIN, condition_on=["other"])
    assert observed(program, "ab", "b", lm=PLAIN, condition_on=["y"]) == {"y": ids("b", PLAIN)}


def test_a_rejected_run_hides_no_observation():
    """The guide would read other prompts on other inputs, or in use than in training."""

    def program(x, y, wanted="b"):
        z = lm_sample("z", x, max_tokens=1, temperature=4.0)
        require("wanted", z == wanted)
        lm_sample("y", [x, z], obs=y)

    for prefix in ("a", "b", "ab", "ba", "aab", "ab."):
        assert observed(program, prefix, "b", lm=PLAIN) == {"y": ids("b", PLAIN)}
        only = observed(program, prefix, "b", lm=PLAIN, condition_on=["y"])
        assert only == {"y": ids("b", PLAIN)}
    assert observed(program, "a", "b", "never", lm=PLAIN) == {}
    with pytest.raises(ValueError, match="none of 64 runs of it came to its end"):
        observed(program, "a", "b", "never", lm=PLAIN, condition_on=["y"])


# --- what counts, and how it is shown ------------------------------------------------------------


def test_factors_tools_and_conditions_are_no_observations():
    def program(x):
        z = lm_sample("z", x, max_tokens=1)
        pyro.factor("f", torch.tensor(1.0))
        require("r", True)
        tool("t", len, z)
        pyro.deterministic("d", torch.tensor(2.0))
        with pyro.plate("p", 2):
            pyro.sample("k", dist.Bernoulli(0.5))

    assert observed(program, "a", lm=PLAIN) == {}


def test_numbers_are_shown_with_their_names():
    def program(x):
        lm_sample("z", x, max_tokens=1)
        pyro.sample("b", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    assert observed(program, "a") == {"b": ids("b = 1.0")}


def numbered(x):
    lm_sample("z", x, max_tokens=1)
    pyro.sample("count", dist.Normal(0.0, 1.0), obs=torch.tensor(7.0))


def test_what_the_tokenizer_cannot_write_is_left_out_with_a_warning():
    assert observed(numbered, "a", strict=False) == {}
    with pytest.warns(UserWarning, match=r"cannot see the observations \['count'\]"):
        assert observed(numbered, "a") == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert observed(numbered, "a") == {}  # once is enough


def test_a_text_of_another_tokenizer_is_written_anew():
    other = tiny_lm(["b.", "a"], seed=1)

    def program(x):
        lm_sample("z", x, max_tokens=1)
        lm_sample("y", "a", obs="ab.", lm=other)

    assert observed(program, "a", lm=PLAIN) == {"y": ids("ab.", PLAIN)}


# --- what does not fit the context ---------------------------------------------------------------

SMALL = tiny_lm("ab.\n", seed=0, context_length=20)


def three(x, *observed):
    z = lm_sample("z", x, max_tokens=3, stop=".")
    w = lm_sample("w", [x, z], max_tokens=3, stop=".")
    for i, y in enumerate(observed):
        lm_sample(f"y{i}", ["b", w], obs=y)


def cut_prompts(*observed, program=three, lm=SMALL):
    guide = lmppl.LMGuide(program, lm=lm)
    with pytest.warns(UserWarning, match=r"site '[zw]': the guide reads \d+ of the \d+ tokens"):
        samples = draw_samples(guide, program, ("b", *observed), 20)
    with lmppl.use(lm):  # and is warned of once
        draw_samples(guide, program, ("b", *observed), 20)
    return [
        (s.proposer.draws["z"].fn.prefix_ids, s.proposer.draws["w"].fn.prefix_ids) for s in samples
    ]


def test_observations_are_cut_to_their_beginnings_where_the_context_has_no_room():
    eos = SMALL.vocabulary.eos_id
    inked = functools.partial(ids, lm=SMALL)
    long, short = "ab" * 6 + "a.", "b."
    # Of the 20 tokens z takes 3 and its prefix 1: 16 are left. A line of 12, and one of 2, and ends.
    for z, w in cut_prompts(long, short):
        assert z == (*inked(long[:12] + "\n" + short + "\n"), *inked("b"))
        # w has a longer prefix, and a mark of z in front of all.
        prefix = w[max(i for i, token in enumerate(w) if token == inked("\n")[0]) + 1 :]
        k = 20 - 3 - len(prefix) - 1 - 2 - 2
        lines = inked(long[:k] + "\n" + short + "\n")
        marks = w[: len(w) - len(lines) - len(prefix)]
        assert w == (*marks, *lines, *prefix) and eos in marks and len(w) + 3 <= 20
    (z, _), *_ = cut_prompts("ab" * 4, "ab" * 3)  # there is just room for z
    assert z == (*inked("abababab\nababab\n"), *inked("b"))
    (z, _), *_ = cut_prompts("ab" * 5, "ab" * 5)
    assert z == (*inked("abababa\nabababa\n"), *inked("b"))


@pytest.mark.slow
def test_a_guide_that_reads_the_beginnings_is_a_distribution_and_learns():
    args = ("b", "ab" * 6 + "a.", "b.")
    guide = lmppl.LMGuide(three, lm=SMALL)
    with pytest.warns(UserWarning, match="Name those that it needs in condition_on"):
        guide.fit([args], steps=2, batch_size=8, seed=0, progress=False)
    exact = enumerate_program(three, *args, lm=SMALL)
    log_q = guide_log_probs(shaken(guide), three, args, list(exact), SMALL)
    assert float(log_q.exp().sum()) == pytest.approx(1.0, abs=1e-4)


def test_a_prefix_that_fills_the_context_leaves_no_room_for_observations():
    def program(x, y):
        z = lm_sample("z", x, max_tokens=3, stop=".")
        lm_sample("y", ["b", z], obs=y)

    for length, k in ((13, 3), (14, 2), (15, 1), (16, 0), (17, 0)):
        guide = lmppl.LMGuide(program, lm=SMALL)
        with pytest.warns(UserWarning) if k < 3 else warnings.catch_warnings():
            (sample,) = draw_samples(guide, program, ("b" * length, "ab."), 1)
        shown = "ab."[:k] + "\n" if k else ""
        assert sample.proposer.draws["z"].fn.prefix_ids == ids(shown + "b" * length, SMALL)
    with pytest.raises(ValueError, match="a prefix of 18 tokens and 3 more do not fit"):
        draw_samples(lmppl.LMGuide(program, lm=SMALL), program, ("b" * 18, "ab."), 1)


def test_a_prompt_of_the_user_that_is_too_long_is_named():
    def program(x):
        lm_sample("z", x, max_tokens=3, infer={"guide_prompt": "ab" * 9})

    with pytest.raises(
        ValueError, match="site 'z': its guide_prompt of 18 tokens, and up to 3 more"
    ):
        draw_samples(lmppl.LMGuide(program, lm=SMALL), program, ("b",), 1)


def test_a_head_reads_the_latest_tokens_that_the_context_holds():
    def program(x, y):
        pyro.sample("n", dist.Normal(0.0, 1.0))
        z = lm_sample("z", x, max_tokens=3, stop=".")
        pyro.sample("m", dist.Normal(0.0, 1.0))
        lm_sample("y0", [x, z], obs=y)
        lm_sample("y1", [x, z], obs=y)

    guide = lmppl.LMGuide(program, lm=SMALL)
    with pytest.warns(UserWarning, match="site 'z': the guide reads"):
        (sample,) = draw_samples(guide, program, ("b", "ab" * 7), 1)
    assert set(sample.proposer.draws) == {"n", "z", "m"}
