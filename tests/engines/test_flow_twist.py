"""The flow of a guide as a twist: exact if the guide is, unbiased whatever it is."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pyro
import pytest
import small
import torch
from choices import every_way
from estimates import check_unbiased, check_z_test
from solved import lm_that_draws

import lmppl
from lmppl import lm_sample, require, tool
from lmppl.engines import smc, twists
from lmppl.runtime import DrawWait, Particle
from lmppl.testing import enumerate_program, tiny_lm
from lmppl.testing.programs import CASES

FLOW = {"method": "smc", "twist": "flow", "ess_threshold": 1.0}


@pytest.fixture
def judged(monkeypatch):
    """What every comparison of texts found: (weights without twist, log psi, known), in order."""
    update, seen = twists.Texts.update, []

    def recorded(self, log_weights):
        new = update(self, log_weights)
        weights, psi = log_weights.clone(), self.log_psi.clone()
        seen.append(SimpleNamespace(weights=weights, psi=psi, known=self._known.clone(), new=new))
        return new

    monkeypatch.setattr(twists.Texts, "update", recorded)
    return seen


# --- a perfect guide -----------------------------------------------------------------------------


def hard_end(x, y):
    """Texts that may not end where others may."""
    z = lm_sample("z", x, max_tokens=3, stop=".", temperature=3.0)
    require("more than b", str(z) != "b.")
    lm_sample("y", [x, z], obs=y)


PERFECT = {
    **{name: (CASES[name].program, CASES[name].args) for name in ("one site", "scale", "tool")},
    "factor": (CASES["factor"].program, CASES["factor"].args),
    "hard": (hard_end, ("ab.", "aba")),
}


@pytest.mark.parametrize("threshold", [0.99, 1.0])
@pytest.mark.parametrize("name", PERFECT)
def test_of_a_perfect_guide_all_texts_have_the_same_flow(judged, name, threshold):
    """psi is the evidence at every token, so nothing is resampled and nothing varies."""
    program, args = PERFECT[name]
    lm = CASES["one site"].lm
    exact = enumerate_program(program, *args, lm=lm)
    q = lm_that_draws(exact, args[0], lm)
    longest = 4 if name == "factor" else 3

    def guide(*args):
        lm_sample("z", args[0], max_tokens=longest, stop=".", lm=q)

    posterior = lmppl.infer(
        program, *args, lm=lm, guide=guide, num_samples=32, seed=0,
        **{**FLOW, "ess_threshold": threshold},
    )  # fmt: skip
    assert posterior.log_weights.tolist() == pytest.approx([exact.log_evidence] * 32, abs=2e-3)
    assert len(set(posterior["z"])) > 1 and judged
    assert bool((~judged[0].known).any()) == (name == "hard")
    for step in judged:
        assert step.psi.tolist() == pytest.approx([exact.log_evidence] * 32, abs=2e-3)
    if threshold < 1.0:  # else it may be for a rounding
        assert posterior.info["resamplings"] == 0


def test_the_lookahead_of_a_perfect_guide_is_another_target():
    """So that the test above is of the flow, and not of any twist."""
    case = CASES["factor"]
    q = lm_that_draws(case.enumerate(), "ba.", case.lm)

    def guide(x, reward):
        lm_sample("z", x, max_tokens=4, stop=".", lm=q)

    posterior = lmppl.infer(
        case.program, *case.args, lm=case.lm, method="smc", twist="lookahead", guide=guide,
        num_samples=16, ess_threshold=1.0, seed=0,
    )  # fmt: skip
    assert float(posterior.log_weights.max() - posterior.log_weights.min()) > 0.1


# --- E[Z-hat * weighted indicator of z] = R(z), whatever the guide ------------------------------


def chain(x, y):
    z = lm_sample("z", x, choices=["a", "b"], temperature=2.0)
    w = lm_sample("w", [x, z], max_tokens=2, stop="b", temperature=2.0)
    lm_sample("y", [x, w, z], obs=y)


def chain_guide(x, y):
    z = lm_sample("z", [x, "a"], choices=["a", "b"], temperature=3.0)
    lm_sample("w", [z, x], max_tokens=2, stop="b", temperature=4.0)


def last_half(x, y):
    """The first text is left to the model, and the guide is asked for it: it draws the last."""
    lm_sample("w", [x, "b"], max_tokens=2, stop="b", temperature=4.0)


def backwards(x, y):
    """The other order, so that the guide draws the last text while the program is at the first."""
    w = lm_sample("w", x, max_tokens=2, stop="b", temperature=4.0)
    lm_sample("z", [x, w], choices=["a", "b"], temperature=3.0)


def hard(x, y):
    z = lm_sample("z", x, max_tokens=2, temperature=3.0)
    require("a", "a" in z)
    lm_sample("y", [x, z], obs=y)


def sometimes(x, y):
    """Another text follows, or not."""
    z = lm_sample("z", x, max_tokens=2, stop="b", temperature=2.0)
    if "a" in z:
        z = lm_sample("w", [x, z], max_tokens=1, temperature=2.0)
    lm_sample("y", [x, z], obs=y)


def scaled(x, y):
    with pyro.poutine.scale(scale=0.5):
        z = lm_sample("z", x, max_tokens=2, stop="b", temperature=2.0)
    lm_sample("y", [x, z], obs=y)


# Programs with a guide, and the schemes that take seconds with it, and many seconds.
_ENUMERATED = [
    (small.longer, small.longer_guide, {"multinomial": pytest.mark.slow}),
    (small.long, small.long_guide, {"multinomial": pytest.mark.slow}),
    (chain, chain_guide, {"systematic": pytest.mark.slow, "multinomial": pytest.mark.long}),
    (hard, small.longer_guide, {"multinomial": pytest.mark.slow}),
    (
        sometimes,
        small.long_guide,
        {"systematic": pytest.mark.slow, "multinomial": pytest.mark.long},
    ),
    (scaled, small.long_guide, {"multinomial": pytest.mark.slow}),
]


@pytest.mark.parametrize(
    "program, guide, scheme",
    [
        pytest.param(program, guide, scheme, marks=marks.get(scheme, []))
        for program, guide, marks in _ENUMERATED
        for scheme in ("systematic", "multinomial")
    ],
)
def test_unbiased_by_enumeration(remembered, monkeypatch, program, guide, scheme):
    check_unbiased(
        every_way(monkeypatch),
        program,
        small.ARGS,
        small.small_lm(),
        guide=guide,
        num_samples=2,
        resampling=scheme,
        **FLOW,
    )


@pytest.mark.parametrize("its", ["flow", "lookahead", lambda text: 0.7 * text.count("a")])
def test_unbiased_if_texts_are_compared_every_second_token(remembered, monkeypatch, judged, its):
    def program(x, y):
        z = lm_sample("z", x, max_tokens=3, stop="b", temperature=2.0)
        lm_sample("y", [x, z], obs=y)

    check_unbiased(
        every_way(monkeypatch), program, small.ARGS, small.small_lm(),
        guide=lambda x, y: lm_sample("z", [x, "a"], max_tokens=3, stop="b", temperature=4.0),
        num_samples=2, twist_every=2, **{**FLOW, "twist": its},
    )  # fmt: skip
    # A text of one token, beside a longer one, is compared when that has two.
    assert any(bool(step.known.all()) for step in judged)


def shaken(program, lm):
    """An adapted model that has learned nothing."""
    guide = lmppl.LMGuide(program, lm=lm)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    return guide


def observed_text(x, y):
    """Observed texts with an end after a latent one."""
    z = lm_sample("z", x, max_tokens=2, stop="b", temperature=2.0)
    lm_sample("first", [x, z], max_tokens=2, obs=y)
    lm_sample("last", [z, x, y], max_tokens=3, obs=y)


@pytest.mark.long
def test_unbiased_by_enumeration_with_a_shaken_guide(remembered, monkeypatch):
    check_unbiased(
        every_way(monkeypatch),
        observed_text,
        small.ARGS,
        small.small_lm(),
        guide=shaken(observed_text, small.small_lm()),
        num_samples=2,
        **FLOW,
    )


@pytest.mark.parametrize("name", ["one site", "hard constraint"])
def test_unbiased_with_a_shaken_guide(remembered, name):
    case = CASES[name]
    guide = shaken(case.program, case.lm)
    check_z_test(case, 20, num_samples=8, guide=guide, **{**FLOW, "ess_threshold": 0.9})


# --- where there is no flow ----------------------------------------------------------------------


class Says(twists.TwistFunction):
    """What a function says."""

    def __init__(self, judge):
        self.judge = judge

    def __call__(self, particles, decoding, slots):
        return self.judge(slots)


def texts_under_way(judge, token_ids):
    """Texts with these tokens, and the decoding that they are of."""
    num = len(token_ids)
    fn = lmppl.LMText(small.small_lm(), "ab", max_tokens=9)
    particle = SimpleNamespace(waiting=DrawWait("z", fn, torch.zeros(9)))
    decoding = SimpleNamespace(token_ids=token_ids, is_dead=lambda slot: False)
    return twists.Texts(Says(judge), [particle] * num, range(num), decoding), decoding


def test_a_text_without_a_psi_keeps_its_share():
    """Of the weight of all, whatever psi the others have; and after resampling, too."""
    psi = [[-20.0, None, -23.0, None], [-3.0, None, None, -5.0]]
    steps = iter(psi)
    texts, decoding = texts_under_way(lambda slots: next(steps), [[0], [0], [0], [0]])
    weights = torch.tensor([0.1, -0.5, 1.2, 0.4], dtype=torch.float64)

    def shares():
        return torch.softmax(weights + texts.log_psi, 0)

    before = shares()
    assert texts.update(weights)
    assert shares()[[1, 3]].tolist() == pytest.approx(before[[1, 3]].tolist())
    assert texts.log_psi[[0, 2]].tolist() == [-20.0, -23.0]
    decoding.token_ids = [[0, 0]] * 4
    texts.select([2, 1, 2, 3])
    before = shares()
    assert texts.update(weights)
    assert shares()[[1, 2]].tolist() == pytest.approx(before[[1, 2]].tolist())


def test_texts_that_have_not_grown_are_not_judged_again():
    asked = []

    def judge(slots):
        asked.append(slots)
        return [1.0] * len(slots)

    texts, decoding = texts_under_way(judge, [[0, 0], [0]])
    weights = torch.zeros(2, dtype=torch.float64)
    texts.update(weights)
    texts.select([1, 0])
    decoding.token_ids = [[0, 1], [0, 0]]
    texts.update(weights)
    assert asked == [[0, 1], [0]] and not texts.update(weights)


def test_with_no_psi_at_all_nothing_changes():
    texts, _ = texts_under_way(lambda slots: [None, None], [[0], [0]])
    assert not texts.update(torch.tensor([0.0, 3.0], dtype=torch.float64))
    assert texts.log_psi.tolist() == [0.0, 0.0]


def test_one_that_is_lost_takes_nobody_with_it():
    texts, _ = texts_under_way(lambda slots: [-math.inf, None], [[0], [0]])
    assert texts.update(torch.zeros(2, dtype=torch.float64))
    assert texts.log_psi.tolist() == [-math.inf, 0.0]


def test_resampling_favours_no_text_that_cannot_end_here(remembered, judged):
    """Texts in whose middle the program cannot end, beside others with psi of e^-20: as many are
    copied as the proposal draws."""

    def program(x, y):
        z = lm_sample("z", x, max_tokens=2, temperature=2.0)
        require("not a alone", str(z) != "a")
        pyro.factor("tiny", torch.tensor(-20.0 - 3.0 * z.count("b")))

    def guide(x, y):
        lm_sample("z", x, max_tokens=2, temperature=4.0)

    def first_step(seed):
        judged.clear()
        lmppl.infer(
            program,
            *small.ARGS,
            lm=small.small_lm(),
            guide=guide,
            num_samples=12,
            seed=seed,
            **FLOW,
        )
        return judged[0]

    mixed = 0
    for step in map(first_step, range(10)):
        twisted = torch.softmax(step.weights + step.psi, 0)
        plain = torch.softmax(step.weights, 0)
        unknown = ~step.known
        assert float(twisted[unknown].sum()) == pytest.approx(float(plain[unknown].sum()))
        mixed += bool(unknown.any()) and bool(step.known.any())
    assert mixed > 5


def test_a_text_that_has_ended_badly_is_lost_at_once(remembered, judged):
    lmppl.infer(
        hard, *small.ARGS, lm=small.small_lm(), guide=small.longer_guide, num_samples=16, seed=1,
        **FLOW,
    )  # fmt: skip
    assert bool((judged[0].psi == -math.inf).any())


def test_unless_chance_has_a_say_in_it(remembered, judged):
    """A tool that failed once need not fail again: e^-inf would be a bias."""
    calls = []

    def flaky(text):
        calls.append(text)
        if len(calls) % 2:
            raise OSError

    def program(x, y):
        z = lm_sample("z", x, max_tokens=2, temperature=2.0)
        tool("flaky", flaky, str(z), on_error="reject")
        lm_sample("y", [x, z], obs=y)

    lmppl.infer(
        program, *small.ARGS, lm=small.small_lm(), guide=small.longer_guide, num_samples=16,
        seed=1, **FLOW,
    )  # fmt: skip
    assert bool((~judged[0].known).any()) and bool(judged[0].known.any())
    assert bool((judged[0].psi > -math.inf).all())


def test_a_site_before_another_is_drawn_without_a_twist(judged, monkeypatch):
    """Found at the first token: from then on no run ahead is paid for."""
    forks = []
    fork = Particle.fork

    def counted(self, streams=None, given=None):
        forks.extend(given or ())
        return fork(self, streams, given)

    monkeypatch.setattr(Particle, "fork", counted)

    def program(x, y):
        z = lm_sample("z", x, max_tokens=4, temperature=4.0)
        w = lm_sample("w", [x, z], max_tokens=4, temperature=4.0)
        lm_sample("y", [x, w], obs=y)

    def guide(x, y):
        z = lm_sample("z", [x, "a"], max_tokens=4, temperature=4.0)
        lm_sample("w", [z, x], max_tokens=4, temperature=4.0)

    posterior = lmppl.infer(
        program, *small.ARGS, lm=small.small_lm(), guide=guide, num_samples=8, seed=0,
        **{**FLOW, "ess_threshold": 0.0},
    )  # fmt: skip
    longest = [max(len(text.token_ids) for text in posterior[name]) for name in ("z", "w")]
    assert longest == [4, 4], "so each was looked at three times"
    assert forks.count("z") == 8
    assert forks.count("w") == sum(min(3, len(w.token_ids)) for w in posterior["w"])
    assert [step.new for step in judged] == [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    "program, guide",
    [(chain, last_half), (chain, backwards), (small.coin, small.long_guide)],
    ids=["last half", "backwards", "coin"],
)
def test_without_any_flow_all_is_as_without_a_twist(judged, program, guide):
    """The guide draws when the program is at another site, or a latent of another kind follows."""
    options = {"lm": small.small_lm(), "guide": guide, "num_samples": 12, "seed": 3}
    small.Coin.choices = SimpleNamespace(pick=lambda probs: 1)
    with_it = lmppl.infer(program, *small.ARGS, **options, **FLOW)
    without = lmppl.infer(program, *small.ARGS, **options, **{**FLOW, "twist": None})
    assert not any(step.new for step in judged)
    assert torch.equal(with_it.log_weights, without.log_weights)


@pytest.mark.parametrize("what", ["choices", "left to the model", "no closing token"])
def test_sites_without_any_flow_are_drawn_at_once(judged, what):
    lm = tiny_lm("ab", eos=False) if what == "no closing token" else CASES["chain"].lm
    options = {"choices": ["ab", "ba"]} if what == "choices" else {"max_tokens": 3}

    def program():
        z = lm_sample("z", "ab", **options)
        lm_sample("y", ["b", z], obs="b")

    def guide():
        if what != "left to the model":
            lm_sample("z", "b", **options)

    warning = pytest.warns(UserWarning, match="the guide guide proposed nothing")
    with warning if what == "left to the model" else nullcontext():
        posterior = lmppl.infer(program, lm=lm, guide=guide, num_samples=8, seed=0, **FLOW)
    assert len(posterior) == 8 and not judged


# --- errors --------------------------------------------------------------------------------------


def test_a_flow_needs_a_guide():
    case = CASES["one site"]
    with pytest.raises(ValueError, match="twist='flow'.*give guide="):
        lmppl.infer(case.program, *case.args, lm=case.lm, method="smc", twist="flow")


@pytest.mark.parametrize("value", [0, -1])
def test_twist_every_is_a_number_of_tokens(value):
    with pytest.raises(ValueError, match="twist_every=.*int of at least 1"):
        smc.SMC(twist_every=value)
