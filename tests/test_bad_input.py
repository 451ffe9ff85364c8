"""Bad input: a clear error that names the site, what was given and what to do; nothing is lost.

(Arguments of another type, or out of range, are in the table of ``test_misuse.py``.)
"""

from __future__ import annotations

import inspect
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import lmppl
from lmppl import LMText, ReplayError, ZeroEvidenceError, lm_sample, require, tool
from lmppl.primitives import _default_lm, _lasting, _warned
from lmppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=0, context_length=32)
LM.model.requires_grad_(False)
FOREIGN = tiny_lm("xyz", seed=0)
FOREIGN.model.requires_grad_(False)
METHODS = ["exact", "importance", "smc"]


@pytest.fixture(autouse=True)
def _fresh_state():
    _warned.clear()
    lasting, token = list(_lasting), _default_lm.set(None)
    _lasting.clear()
    yield
    _default_lm.reset(token)
    _lasting[:] = lasting
    # Whatever went wrong, the global state is as before.
    assert not poutine.runtime._PYRO_STACK and torch.is_grad_enabled()


def infer(program, *args, method="importance", **options):
    options.setdefault("num_samples", 4)
    return lmppl.infer(program, *args, lm=options.pop("lm", LM), method=method, seed=0, **options)


def one_site():
    return lm_sample("z", "ab", max_tokens=2)


# --- the call ---


@pytest.mark.parametrize(
    ("method", "near"),
    [
        ("smcc", "smc"),
        ("importnce", "importance"),
        ("gflownets", "gflownet"),
        ("exakt", "exact"),
        ("SMC", "smc"),
    ],
)
def test_an_unknown_method_names_the_nearest(method, near):
    with pytest.raises(ValueError, match=f"unknown method '{method}'; did you mean '{near}'"):
        infer(one_site, method=method)


def test_a_hopeless_method_lists_all():
    with pytest.raises(ValueError, match=r"unknown method 'xxxxx'\. Allowed: importance, smc"):
        infer(one_site, method="xxxxx")
    with pytest.raises(TypeError, match=r"name or an engine object, given int"):
        infer(one_site, method=3)


@pytest.mark.parametrize(
    ("option", "near"),
    [("ess_treshold", "ess_threshold"), ("twst", "twist"), ("num_sample", "num_samples")],
)
def test_an_unknown_option_names_the_nearest(option, near):
    with pytest.raises(TypeError, match=f"no option '{option}'; did you mean '{near}'"):
        infer(one_site, method="smc", **{option: 1})


def test_a_keyword_of_the_program_is_known_by_the_programs_argument():
    def program(verdict=None):
        lm_sample("y", "ab", max_tokens=1, obs=verdict)

    for keyword in ("verdict", "verdct"):
        meant = (
            rf"no option '{keyword}'; the program has an argument 'verdict'.*kwargs=\{{'verdict': "
        )
        with pytest.raises(TypeError, match=meant):
            infer(program, **{keyword: "a"})
    with pytest.raises(TypeError, match=r"no option 'zzz'\. Allowed: prior.*kwargs=\{'zzz': "):
        infer(program, zzz="a")


def test_a_name_that_is_like_no_other_suggests_none():
    with pytest.raises(TypeError, match=r"no option 'do_sample'\. Allowed: name"):
        lm_sample("z", "ab", max_tokens=1, do_sample=True)
    with pytest.raises(TypeError, match=r"no option 'prompt'; it is called 'prefix' here"):
        lm_sample("z", prompt="ab", max_tokens=1)


def test_an_observation_that_is_nearly_a_choice_names_it():
    words = tiny_lm([" Japan", " Italy", "Japan"], seed=0)
    with pytest.raises(ValueError, match=r"'Japan' is none of the.*; did you mean ' Japan'\?"):
        infer(lambda: lm_sample("z", " Italy", choices=[" Italy", " Japan"], obs="Japan"), lm=words)


def test_enumeration_that_finds_nothing_does_not_advise_more_samples():
    def impossible():
        lmppl.require("never", lm_sample("z", "ab", choices=["a", "b"]) == "c")

    with pytest.raises(lmppl.ZeroEvidenceError, match=r"\(2\)\. These are all there are") as caught:
        infer(impossible, method="exact")
    assert "more samples" not in str(caught.value)
    with pytest.raises(lmppl.ZeroEvidenceError, match="Draw more samples"):
        infer(impossible, method="smc", num_samples=3)


def test_names_of_other_libraries_are_known():
    guide = lmppl.LMGuide(one_site, lm=LM)
    for call, option, hint in (
        (guide.fit, "step", "it is called 'steps' here. Allowed: steps, simulate"),
        (guide.fit, "lr", "it is called 'learning_rate' here"),
        (guide.fit, "num_return_sequences", r"that is infer\(num_samples=...\)"),
        (partial(infer, one_site), "epochs", r"that is fit\(steps=...\)"),
        (partial(infer, one_site), "max_new_tokens", r"that is lm_sample\(max_tokens=...\)"),
        (partial(infer, one_site), "num_return_sequences", "it is called 'num_samples' here"),
        (partial(infer, one_site), "top_p", "another distribution than the model's"),
        (partial(lm_sample, "z", "ab"), "top_k", "another distribution than the model's"),
        (
            partial(lm_sample, "z", "ab"),
            "max_new_tokens",
            "it is called 'max_tokens' here",
        ),
        (partial(lm_sample, "z", "ab"), "temprature", "did you mean 'temperature'"),
    ):
        with pytest.raises(TypeError, match=f"no option '{option}'.*{hint}"):
            call(**{option: 1})
    posterior = infer(lambda: lm_sample("step_1", "ab", max_tokens=1))
    with pytest.raises(KeyError, match="site 'step'; did you mean 'step_1'"):
        posterior.probs("step")
    with pytest.raises(TypeError, match=r"no option 'max_tokens'; that is lm_sample\(max_tokens"):
        infer(one_site, max_tokens=8)
    assert inspect.signature(lm_sample).parameters["stop"].default is None


def test_a_space_as_stop_is_warned_of_once():
    words = tiny_lm(["a", " a", " ", "."], seed=0)
    with pytest.warns(UserWarning, match="site 'z': stop=' ' has closed.* first token") as caught:
        infer(lambda: lm_sample("z", "a", max_tokens=2, stop=" "), lm=words, num_samples=64)
        infer(lambda: lm_sample("z", "a", max_tokens=2, stop=[" "]), lm=words, num_samples=64)
    assert len(caught) == 1 and caught[0].filename == __file__
    infer(lambda: lm_sample("x", "a", max_tokens=1, stop="."), lm=words, num_samples=64)
    no_spaces = tiny_lm("ab", seed=0)  # closed by EOS or at its length
    infer(lambda: lm_sample("w", "a", max_tokens=1, stop=" "), lm=no_spaces, num_samples=64)


def test_a_programs_keyword_is_told_apart():
    both = r"The program's go in kwargs=\{'y': \.\.\.\}, .*functools\.partial\(model, y=\.\.\.\)"
    with pytest.raises(TypeError, match=both):
        infer(lambda x, y=None: one_site(), "a", y="b")


def test_options_beside_an_engine_object():
    with pytest.raises(TypeError, match=r"ess_threshold.*SMC\(ess_threshold=...\)"):
        infer(one_site, method=lmppl.SMC(), ess_threshold=0.3)


def test_what_is_no_program_and_arguments_that_do_not_fit():
    with pytest.raises(TypeError, match="model must be a function, given str"):
        infer("infill")
    with pytest.raises(TypeError, match=r"one_site\(\).*given 2 positional arguments"):
        infer(one_site, "a", "b")
    with pytest.raises(TypeError, match="guide= takes"):
        infer(one_site, guide=3)


def test_no_language_model():
    with pytest.raises(ValueError, match=r"site 'z' names no language model.*lmppl.use\(lm\)"):
        infer(one_site, lm=None)
    with pytest.raises(ValueError, match="site 'z' names no language model"):
        one_site()
    with pytest.raises(TypeError, match="given LlamaForCausalLM"):
        infer(one_site, lm=LM.model)


# --- sites ---

SITES = [
    (lambda: lm_sample("z", "ab"), r"site 'z' is latent and needs max_tokens=.*choices="),
    (lambda: lm_sample("z", "ab", stop="."), r"site 'z' is latent and needs max_tokens="),
    (lambda: lm_sample("z", "ab", max_tokens=2, stop=""), r"site 'z'.*must not be empty"),
    (lambda: lm_sample("z", "ab", max_tokens=2, stop=["."[:0]]), r"site 'z'.*must not be empty"),
    (lambda: lm_sample("z", "ab", max_tokens=0), r"site 'z'.*max_tokens=0"),
    (lambda: lm_sample("z", "ab", max_tokens=-1), r"site 'z'.*max_tokens=-1"),
    (lambda: lm_sample("z", "ab", max_tokens=0, obs="a"), r"site 'z'.*max_tokens=0"),
    (lambda: lm_sample("z", "", max_tokens=2), r"site 'z'.*prefix is empty.*BOS"),
    (lambda: lm_sample("z", [], max_tokens=2), r"site 'z'.*prefix is empty"),
    (lambda: lm_sample("z", "ab", max_tokens=2, temperature=0), r"site 'z'.*temperature=0"),
    (lambda: lm_sample("z", "ab", choices=["a", "a"]), r"site 'z'.*twice"),
    (lambda: lm_sample("z", "ab", choices=["a", "ab"]), r"site 'z'.*prefix of"),
    (lambda: lm_sample("z", "ab", choices=[]), r"site 'z'.*at least one"),
    (lambda: lm_sample("z", "ab" * 20, max_tokens=2), r"site 'z'.*context.*32 tokens"),
    (lambda: lm_sample("z", "ab", max_tokens=40), r"site 'z'.*context.*32 tokens"),
    (lambda: lm_sample("y", "ab" * 20, obs="a"), r"site 'y'.*context.*32 tokens"),
    (lambda: lm_sample("y", "ab", obs="a.b", stop="."), r"site 'y'.*runs past its close"),
    (lambda: lm_sample("y", "ab", obs="abab", max_tokens=3), r"site 'y'.*max_tokens=3"),
    (lambda: lm_sample("y", "ab", obs="b", choices=["a.", "ab."]), r"site .y..*none of the"),
    (lambda: lm_sample("y", "ab", obs=""), r"site 'y'.*empty"),
    (lambda: lm_sample("", "ab", max_tokens=2), r"name must be a non-empty string"),
]  # fmt: skip


@pytest.mark.parametrize(("site", "message"), SITES, ids=[message for _, message in SITES])
@pytest.mark.parametrize("where", ["infer", "trace"])
def test_a_bad_site_is_named(site, message, where):
    with pytest.raises(ValueError, match=message):
        if where == "infer":
            infer(site)
        else:
            with lmppl.use(LM):
                poutine.trace(site).get_trace().log_prob_sum()


def test_bad_types_are_named_too():
    def observed():
        lm_sample("y", "ab", obs=3)

    def prefix():
        lm_sample("z", ["ab", 3], max_tokens=2)

    with pytest.raises(TypeError, match="site 'y': obs must be a str or a Text, given int"):
        infer(observed)
    with pytest.raises(TypeError, match="site 'z': .*not int"):
        infer(prefix)


def test_an_observed_text_that_cannot_be_closed():
    endless = tiny_lm("ab.", seed=0, eos=False)

    def program():
        one_site()
        lm_sample("y", "ab", obs="ab", stop=".")

    with pytest.raises(ValueError, match="site 'y'.*does not close.*no EOS"):
        infer(program, lm=endless)


@pytest.mark.parametrize("use", ["prefix", "joined", "obs"])
def test_a_text_of_another_tokenizer_suggests_str(use):
    def program():
        z = lm_sample("z", "xy", max_tokens=2, lm=FOREIGN)
        if use == "prefix":
            lm_sample("w", ["a", z], max_tokens=2)
        elif use == "joined":
            lm_sample("w", "a" + z, max_tokens=2)
        else:
            lm_sample("w", "a", obs=z)

    with pytest.raises(ValueError, match=r"site 'w'.*another tokenizer.*str\(z\)") as caught:
        infer(program)
    assert "z=" in caught.value.__notes__[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_site_name_used_twice(method):
    def program():
        one_site()
        one_site()

    with pytest.raises(ValueError, match="site 'z' is used twice"):
        infer(program, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_a_program_without_a_latent_site(method):
    def program():
        lm_sample("y", "ab", obs="a")

    with pytest.raises(ValueError, match="no latent site.*obs="):
        infer(program, method=method)


@pytest.mark.parametrize("method", ["importance", "smc"])
@pytest.mark.parametrize("latent", ["z", "theta"])
def test_a_masked_latent(method, latent):
    def program():
        with poutine.mask(mask=False):
            one_site() if latent == "z" else pyro.sample("theta", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=f"site '{latent}' is latent and masked out"):
        infer(program, method=method)


# --- zero probability ---


@pytest.mark.parametrize("method", METHODS)
def test_when_all_weights_are_zero_the_error_names_the_sites_and_carries_the_posterior(method):
    def program():
        z = one_site()
        if "a" in z:
            require("no a", False)
        tool("parse", int, z, on_error="reject")

    with pytest.raises(ZeroEvidenceError) as caught:
        infer(program, method=method, num_samples=40)
    posterior = caught.value.posterior
    assert "'no a'" in str(caught.value) and "'parse'" in str(caught.value)
    assert set(posterior.killed) == {"no a", "parse"}
    assert sum(posterior.killed.values()) == len(posterior)
    assert posterior.log_evidence == -math.inf and posterior.ess == 0.0
    assert all(z is not None for z in posterior["z"])  # how far each one came
    assert repr(posterior)


def test_a_factor_kills_too_and_a_survivor_is_enough():
    def program(keep):
        z = one_site()
        pyro.factor("score", torch.tensor(0.0 if z == keep else -math.inf))

    with pytest.raises(ZeroEvidenceError, match="'score'"):
        infer(program, "nothing like it")
    posterior = infer(program, "ab", method="exact")
    assert posterior.probs("z") == {"ab": pytest.approx(1.0)}


# --- the language model ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_name_the_site(method, bad):
    broken = tiny_lm("ab.", seed=0)
    broken.model.requires_grad_(False)
    with torch.no_grad():
        broken.model.lm_head.weight[1] = bad
    with pytest.raises(ValueError, match="site 'z'.*NaN"):
        infer(one_site, lm=broken, method=method)

    def observed():
        lm_sample("z", "ab", max_tokens=1, lm=LM)
        lm_sample("y", "ab", obs="a", lm=broken)

    with pytest.raises(ValueError, match="site 'y'.*NaN"):
        infer(observed, method=method)
    with pytest.raises(ValueError, match="site 'z'.*NaN"), lmppl.use(broken):
        poutine.trace(one_site).get_trace()


# --- exceptions of others ---


@pytest.mark.parametrize("method", METHODS)
def test_an_exception_in_a_program_or_tool_keeps_its_type(method):
    class Mine(Exception):
        pass

    def fail(text):
        raise Mine(text)

    def in_tool():
        tool("fetch", fail, one_site())

    def in_program():
        fail(one_site())

    for program, site in ((in_tool, "fetch"), (in_program, "z")):
        with pytest.raises(Mine) as caught:
            infer(program, method=method)
        (note,) = caught.value.__notes__
        assert f"site '{site}'" in note and f"z={str(caught.value.args[0])!r}" in note


def test_an_interrupt_ends_every_particle_and_leaves_no_state():
    ended = []

    def program():
        with poutine.scale(scale=2.0):
            try:
                z = one_site()
                if len(ended) == 0:
                    raise KeyboardInterrupt
                lm_sample("w", ["a", z], max_tokens=1)
            finally:
                ended.append(len(poutine.runtime._PYRO_STACK))

    with pytest.raises(KeyboardInterrupt):
        infer(program, num_samples=8)
    assert ended == [2] * 8


def test_a_program_that_does_not_repeat_itself():
    import itertools

    runs = itertools.count()

    def program():
        z = one_site()
        lm_sample("y", [z, "a"], obs="b")
        lm_sample("w", ["ab", "b"][next(runs) % 2], max_tokens=1)

    with pytest.raises(ReplayError, match="at site 'w' a replayed run has another") as caught:
        infer(program, method="exact")
    assert "lmppl.tool" in str(caught.value)


# --- guides ---


@pytest.mark.parametrize("method", ["importance", "smc"])
def test_a_guide_that_proposes_a_site_that_the_model_has_not(method):
    def guide():
        one_site()
        lm_sample("q", "ab", max_tokens=1)

    with pytest.raises(
        ValueError, match=r"the guide proposes site 'q', which the model has not.*z"
    ):
        infer(one_site, method=method, guide=guide)


def test_guides_that_do_not_fit_the_model():
    def longer():
        lm_sample("z", "ab", max_tokens=6)

    def number():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def foreign():
        lm_sample("z", "xy", max_tokens=2, lm=FOREIGN)

    def rejecting():
        one_site()
        require("never", False)

    for guide, message in [
        (longer, "site 'z'.*same max_tokens and stop"),
        (number, "site 'z'.*Normal.*LMText"),
        (foreign, "site 'z'.*another tokenizer"),
        (rejecting, "the guide rejects its own draw at site 'never'"),
    ]:
        with pytest.raises(ValueError, match=message):
            infer(one_site, guide=guide, num_samples=16)


def test_exact_takes_no_guide_no_continuous_latent_and_no_large_space():
    with pytest.raises(ValueError, match="no guide"):
        infer(one_site, method="exact", guide=one_site)
    with pytest.raises(ValueError, match="site 'theta'.*no finite support"):
        infer(lambda: pyro.sample("theta", dist.Normal(0.0, 1.0)), method="exact")
    with pytest.raises(ValueError, match="site 'z' passes max_traces=10"):
        infer(one_site, method="exact", max_traces=10)


def test_a_value_that_pyro_conditions_on_must_fit_the_site():
    with pytest.raises(ValueError, match="site 'z'.*max_tokens=2"):
        infer(pyro.condition(one_site, data={"z": "abab"}))
    assert LMText(LM, "ab", max_tokens=2).event_shape == (2,)
