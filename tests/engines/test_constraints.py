"""Constraints in importance sampling and SMC: unbiased by enumeration of the sampler's choices.

R(z) is that of ``method="exact"``, which is compared with brute force elsewhere.
"""

import math
from collections import Counter

import numpy as np
import pyro
import pytest
import small
import torch
from choices import every_way
from estimates import check_unbiased, weighted_values
from pyro import poutine

import lmppl
from lmppl import lm_sample
from lmppl.constraints import Constraint, Regex
from lmppl.engines import smc, twists
from lmppl.guides import mixture
from lmppl.lm.batches import rejection
from lmppl.lm.batches.decoding import Decoding
from lmppl.runtime.simulation import simulate
from lmppl.testing import tiny_lm

pytestmark = pytest.mark.usefixtures("remembered")
LM = small.small_lm()  # a, b and EOS
PAIR = tiny_lm("ab", eos=False, seed=3)
IMPORTANCE = {"method": "importance", "num_samples": 1}
SMC = {"method": "smc", "num_samples": 2, "ess_threshold": 1.0}


class Words(Constraint):
    """Texts of a's and b's in which no letter comes three times in a row, and that end with an a."""

    def allows(self, prefix):
        return "aaa" not in prefix and "bbb" not in prefix

    def complete(self, text):
        return self.allows(text) and text.endswith("a")


class Begins(Constraint):
    """Texts that begin so."""

    def __init__(self, beginning):
        self.beginning = beginning

    def allows(self, prefix):
        length = min(len(prefix), len(self.beginning))
        return prefix[:length] == self.beginning[:length]

    def complete(self, text):
        return text.startswith(self.beginning)


class FewB(Constraint):
    """At most one b."""

    def allows(self, prefix):
        return prefix.count("b") < 2


def one_site(x, y):
    """Matches of different lengths, which lose different shares on the way."""
    z = lm_sample("z", x, max_tokens=3, regex="aab|abb|ba?", temperature=2.0)
    lm_sample("y", [x, z], obs=y)


def in_the_middle(x, y):
    k = lm_sample("k", x, choices=["a", "b"], temperature=3.0)
    z = lm_sample("z", [x, k], max_tokens=2, regex="ab?|b")
    w = lm_sample("w", [x, z], max_tokens=1, temperature=2.0)
    lm_sample("y", [x, z, w], obs=y)


def branches(x, y):
    """Texts under a constraint and free ones meet at one barrier."""
    k = pyro.sample("k", small.Coin(0.5))
    if k:
        z = lm_sample("z", x, max_tokens=3, regex="aa?|bab")
    else:
        z = lm_sample("w", [x, "b"], max_tokens=1, temperature=2.0)
    lm_sample("y", [x, z], obs=y)


def two_branches(x, y):
    """So do texts under two constraints of different lengths."""
    k = pyro.sample("k", small.Coin(0.3))
    if k:
        z = lm_sample("z", x, max_tokens=2, regex="ab|bb?")
    else:
        z = lm_sample("w", [x, "b"], max_tokens=3, regex="aab|b", temperature=2.0)
    lm_sample("y", [x, z], obs=y)


def scaled(x, y):
    """log R is scaled, log q is not."""
    with poutine.scale(scale=0.5):
        z = lm_sample("z", x, max_tokens=3, regex="a|ba?b", temperature=1.5)
    lm_sample("y", [x, z], obs=y)


def local(x, y):
    """Dead ends keep their mass."""
    z = lm_sample("z", x, max_tokens=2, regex="abb|ba?", constrain="local")
    lm_sample("y", [x, z], obs=y)


def stopped(x, y):
    z = lm_sample("z", x, max_tokens=3, stop="b", regex="a?a", temperature=2.0)
    lm_sample("y", [x, z], obs=y)


def by_predicate(x, y):
    z = lm_sample("z", x, max_tokens=2, constraint=Words(), temperature=2.0)
    lm_sample("y", [x, z], obs=y)


def rarely(x, y):
    z = lm_sample("z", x, max_tokens=2, constraint=FewB(), temperature=0.7)
    lm_sample("y", [x, z], obs=y)


def begins(x, y):
    """Of a model without EOS, as there are few ways to draw by rejection from two tokens."""
    z = lm_sample("z", x, max_tokens=2, constraint=Begins("a"), temperature=2.0, lm=PAIR)
    lm_sample("y", [x, z], obs=y, lm=PAIR)


def predicate_and_branch(x, y):
    k = pyro.sample("k", small.Coin(0.5))
    if k:
        z = lm_sample("z", x, max_tokens=1, constraint=Words())
    else:
        z = lm_sample("w", x, max_tokens=2, regex="ab|b")
    lm_sample("y", [x, z], obs=y)


without_the_constraint = pytest.mark.filterwarnings("ignore:.*the guide's site the same constraint")


def free_guide(x, y):
    """A guide that knows nothing of the constraint."""
    lm_sample("z", [x, "a"], max_tokens=3, temperature=3.0)


def held_guide(x, y):
    """A guide with another constraint, some of whose texts do not match."""
    lm_sample("z", [x, "a"], max_tokens=3, regex="a.*|b", temperature=3.0)


def middle_guide(x, y):
    """The constrained site is left to the program."""
    lm_sample("k", x, choices=["b", "a"], temperature=5.0)


def twist(text):
    return 1.3 * text.count("b") - 0.4 * text.count("a")


def check(monkeypatch, program, **options):
    posterior = lmppl.infer(program, *small.ARGS, lm=LM, method="exact")
    expected = weighted_values(posterior)
    return check_unbiased(
        every_way(monkeypatch), program, small.ARGS, LM, expected=expected, **options
    )


# --- E[Z-hat * weighted indicator of z] = R(z) ---------------------------------------------------

REGEXES = [one_site, in_the_middle, branches, two_branches, scaled, local, stopped]
PREDICATES = [by_predicate, rarely, begins, predicate_and_branch]


@pytest.mark.filterwarnings("ignore:.* is asked about every token")  # by enumeration
@pytest.mark.parametrize("program", [*REGEXES, *PREDICATES])
def test_importance_is_unbiased(monkeypatch, program):
    check(monkeypatch, program, **IMPORTANCE)


@pytest.mark.filterwarnings("ignore:.* is asked about every token")
@pytest.mark.filterwarnings("ignore:twist= names 'z'")  # of runs that all take the other branch
@pytest.mark.parametrize(
    "program, its",
    [
        (one_site, None),
        (one_site, "lookahead"),
        (branches, None),
        (branches, "lookahead"),
        (two_branches, None),
        (two_branches, {"z": twist}),
        (scaled, twist),
        (begins, None),
    ],
)
def test_smc_is_unbiased(monkeypatch, program, its):
    check(monkeypatch, program, twist=its, **SMC)


@pytest.mark.parametrize("defense", [0.1, 1.0])
def test_smc_is_unbiased_whatever_the_defence(monkeypatch, defense):
    check(monkeypatch, one_site, twist=twist, twist_defense=defense, **SMC)


def test_smc_is_unbiased_at_three_particles(monkeypatch):
    check(monkeypatch, one_site, **{**SMC, "num_samples": 3, "ess_threshold": 0.8})


# --- guides, and a share of the program's own draws ----------------------------------------------


def short_guide(x, y):
    """A guide whose texts need not match the predicate."""
    lm_sample("z", [x, "a"], max_tokens=2, temperature=3.0)


@pytest.mark.filterwarnings("ignore:.* is asked about every token")  # its density must be known
@pytest.mark.parametrize(
    "program, guide",
    [
        pytest.param(one_site, free_guide, marks=without_the_constraint),
        (one_site, held_guide),
        (in_the_middle, middle_guide),
        (by_predicate, short_guide),
    ],
)
def test_a_share_of_the_programs_draws_is_unbiased(monkeypatch, program, guide):
    check(monkeypatch, program, guide=guide, prior_fraction=0.3, **IMPORTANCE)


@without_the_constraint
def test_the_models_density_in_the_place_of_that_of_the_draw_is_found(monkeypatch):
    monkeypatch.setattr(mixture, "score_draw", lambda site, value, log_prob: log_prob)
    with pytest.raises(AssertionError):
        check(monkeypatch, one_site, guide=free_guide, prior_fraction=0.3, **IMPORTANCE)


# --- and known mistakes are found ----------------------------------------------------------------


def pay_on_the_way(patch):
    """A copy pays with the resampling for what it pays again at the close."""

    def mutant(log_weights, a, ancestors):
        mean = torch.full_like(log_weights, float(log_weights.logsumexp(0))) - math.log(len(a))
        return mean[ancestors]

    patch.setattr(twists, "log_weights_of_copies", mutant)


def forget_it_in_one_term(patch):
    """Drawn with L in the twisted term alone, and divided by shares with L in both."""
    ancestors, shares, without = smc.SMC._ancestors, twists.shares, []

    def mutant_shares(log_weights, log_psi, defense):
        right = shares(log_weights, log_psi, defense)
        alive = torch.where(log_weights > -math.inf, 0.0, -math.inf).double()
        without[:] = [(1 - defense) * shares(log_weights, log_psi, 0.0)]
        without[0] += defense * torch.softmax(alive, 0)
        return right

    patch.setattr(twists, "shares", mutant_shares)
    patch.setattr(smc.SMC, "_ancestors", lambda self, a, g: ancestors(self, without[0], g))


def copy_without_it(patch):
    """A copy goes on as if its constraint had cost nothing so far."""
    select = Decoding.select

    def mutant(self, ancestors):
        select(self, ancestors)
        self.log_masses = [[0.0] * len(ids) for ids in self.token_ids]

    patch.setattr(Decoding, "select", mutant)


@pytest.mark.parametrize("mutate", [pay_on_the_way, forget_it_in_one_term, copy_without_it])
def test_wrong_masses_are_found(monkeypatch, mutate):
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check(monkeypatch, one_site, twist=twist, twist_defense=0.5, **SMC)


# --- dead ends -----------------------------------------------------------------------------------


def needs_more(constrain):
    """A match takes four tokens, which nobody can know beforehand."""
    lm_sample("z", "ab", max_tokens=3, grammar='start: "a" start "b" | "aabb"', constrain=constrain)


@pytest.mark.parametrize("constrain", ["global", "local"])
@pytest.mark.parametrize("method", ["importance", "smc", "exact"])
def test_if_all_are_dead_the_error_says_what_they_lacked(method, constrain):
    with pytest.raises(lmppl.ZeroEvidenceError, match="raise max_tokens") as caught:
        lmppl.infer(needs_more, constrain, lm=LM, method=method, num_samples=8, seed=0)
    assert set(caught.value.posterior.killed) == {"z"}


def test_a_dead_end_is_no_ones_ancestor():
    """Some are dead before others close, and are replaced."""

    def program():
        lm_sample("z", "ab", max_tokens=4, constraint=NoWayOn(), temperature=2.0)

    posterior = lmppl.infer(program, lm=LM, method="smc", num_samples=30, seed=0, ess_threshold=1.0)
    weights = lmppl.infer(program, lm=LM, method="importance", num_samples=30, seed=0)
    assert weights.killed["z"] > 3 and posterior.killed.get("z", 0) < weights.killed["z"]


class NoWayOn(Constraint):
    """Texts of a's; ``b`` may begin one, but nothing follows it."""

    def allows(self, prefix):
        return prefix in ("", "b") or set(prefix) == {"a"}

    def complete(self, text):
        return len(text) > 2 and set(text) == {"a"}


# --- forward simulation --------------------------------------------------------------------------


def simulated_program(x, y, constrain):
    z = lm_sample("z", x, max_tokens=3, regex="aab|abb|ba?", temperature=2.0, constrain=constrain)
    w = lm_sample("w", [x, z], max_tokens=1, temperature=2.0)
    lm_sample("y", [x, w], max_tokens=2, regex="a|b", constrain=constrain, obs=y)


@pytest.mark.parametrize("constrain", ["global", "local"])
def test_simulations_are_draws_of_the_joint(constrain):
    """Of the program without its observed value but with its constraint; the shares of what is expected
    20 times are within 4 standard errors."""

    def unobserved(x, y, constrain):
        z = lm_sample(
            "z", x, max_tokens=3, regex="aab|abb|ba?", temperature=2.0, constrain=constrain
        )
        w = lm_sample("w", [x, z], max_tokens=1, temperature=2.0)
        lm_sample("y", [x, w], max_tokens=2, regex="a|b", constrain=constrain)

    args, num = ("ab", "a", constrain), 300
    exact = weighted_values(lmppl.infer(unobserved, *args, lm=LM, method="exact"))
    total = math.fsum(exact.values())
    with lmppl.use(LM):
        runs = simulate(simulated_program, args, num, seed=0)
    found = Counter(
        tuple(
            sorted((name, site["fn"].token_ids(site["value"])) for name, site in run.sites.items())
        )
        for run in runs
    )
    assert found.keys() <= exact.keys()
    for values, joint in exact.items():
        share = joint / total
        error = math.sqrt(share * (1.0 - share) / num)
        assert num * share < 20 or abs(found[values] / num - share) < 4 * error, dict(values)


def test_a_constraint_that_never_holds_is_named():
    def program():
        lm_sample("z", "ab", max_tokens=8, regex="aaaaaaaa")

    with pytest.raises(ValueError, match="drawn freely here") as caught, lmppl.use(LM):
        simulate(program, (), 2, seed=0, max_attempts=3)
    assert "'z' (" in str(caught.value)


# --- drawing by rejection ------------------------------------------------------------------------

TABLES = {  # masses, and which tokens are allowed
    "some": ([0.4, 0.1, 0.3, 0.2], [1, 3]),
    "one": ([0.5, 0.25, 0.125, 0.125], [2]),
    "all": ([0.2, 0.8], [0, 1]),
    "hardly any": ([1.0 - 1e-6, 1e-6], [1]),
    "none": ([0.6, 0.4], []),
}


def estimates_by_rejection(patch, masses, allowed):
    """E[L-hat; the token], by token, over all ways to draw."""
    asked, found = [], dict.fromkeys(range(len(masses)), 0.0)

    def allows(token):
        assert token not in asked, "asked twice"
        asked.append(token)
        return token in allowed

    for choices in every_way(patch):
        asked.clear()
        token, log_prob, log_mass = rejection.draw_allowed(np.array(masses), 0.5, allows)
        if log_mass > -math.inf:
            assert log_prob == pytest.approx(math.log(masses[token] / sum(masses)))
        found[token] += choices.probability * math.exp(log_mass)
    return found


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("table", TABLES)
def test_the_estimated_mass_is_unbiased_and_independent_of_the_token(monkeypatch, table, scale):
    masses, allowed = TABLES[table]
    found = estimates_by_rejection(monkeypatch, [scale * mass for mass in masses], allowed)
    # P(token) = p / A, and E[L-hat | token] = A.
    expected = {k: mass if k in allowed else 0.0 for k, mass in enumerate(masses)}
    assert found == pytest.approx(expected)


def test_numbers_of_one_uniform_draw_tokens_as_often_as_they_should():
    """Without anything patched."""
    masses, allowed = np.array([0.5, 0.1, 0.05, 0.35]), {1, 3}
    drawn = [
        rejection.draw_allowed(masses, uniform, allowed.__contains__)
        for uniform in torch.rand(4000, generator=torch.Generator().manual_seed(0)).tolist()
    ]
    share = sum(token == 1 for token, *_ in drawn) / len(drawn)
    assert {token for token, *_ in drawn} == allowed
    assert abs(share - 0.1 / 0.45) < 4 * math.sqrt(0.1 / 0.45 * 0.35 / 0.45 / len(drawn))
    mass = np.exp([accepted.log_mass for accepted in drawn])
    assert abs(mass.mean() - 0.45) < 4 * mass.std() / math.sqrt(len(drawn))
    again = rejection.draw_allowed(masses, 0.123, allowed.__contains__)
    assert again == rejection.draw_allowed(masses, 0.123, allowed.__contains__)


def test_a_pool_loses_nothing_to_rounding():
    masses = np.full(1000, 1e-12)
    masses[::7] = 1.0
    pool = rejection.Pool(masses)
    for token in range(0, 1000, 7):
        pool.remove(token)
    rest = [token for token in range(1000) if token % 7]
    assert pool.mass == pytest.approx(1e-12 * len(rest))
    assert [pool.draw((k + 0.5) / len(rest)) for k in range(len(rest))] == rest
    assert pool.draw(0.0) == 1 and pool.draw(np.nextafter(1.0, 0.0)) == 999


def test_with_a_predicate_that_allows_all_tokens_are_those_of_a_free_text():
    def program(constraint=None):
        lm_sample("z", "ab", max_tokens=6, constraint=constraint)

    options = {"lm": LM, "method": "importance", "num_samples": 20, "seed": 3}
    free = lmppl.infer(program, **options)
    held = lmppl.infer(program, kwargs={"constraint": Begins("")}, **options)
    assert list(map(str, free["z"])) == list(map(str, held["z"]))
    assert held.log_evidence == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("constrain", ["global", "local"])
@pytest.mark.parametrize("constraint", [Regex("ab"), Begins("ab")], ids=["masks", "rejection"])
def test_matches_less_probable_than_a_float_holds(constraint, constrain):
    """At a low temperature the model is almost certain of what the constraint forbids."""

    def program():
        options = {"constrain": constrain, "temperature": 0.01}
        lm_sample("z", "ab", max_tokens=2, constraint=constraint, **options)

    options = {"lm": tiny_lm("ab", seed=3, eos=False), "seed": 0}
    exact = lmppl.infer(program, method="exact", **options)
    assert exact.log_evidence < -110.0 if constrain == "global" else exact.log_evidence == 0.0
    drawn = lmppl.infer(program, method="importance", num_samples=3, **options)
    assert drawn.log_evidence == pytest.approx(exact.log_evidence, rel=1e-5)


def test_an_observed_text_that_a_model_without_eos_cannot_end():
    def log_evidence(*args):
        return lmppl.infer(program, *args, lm=PAIR, method="exact").log_evidence

    def program(regex, most=3, stop=None):
        lm_sample("k", "a", choices=["a", "b"])
        lm_sample("y", "ab", max_tokens=most, regex=regex, stop=stop, obs="ab")

    advice = (
        "say max_tokens=2, which it has, or give a constraint of which nothing longer is a match"
    )
    with pytest.raises(ValueError, match=f"'y'.*'ab' does not close.*max_tokens=3.*{advice}"):
        log_evidence("ab*")
    with pytest.raises(ValueError, match="end as the site would, by a stop string; or say max_tok"):
        log_evidence("ab*", 3, "ba")
    exact = float(PAIR.log_prob("ab", ["ab"]))
    assert log_evidence("ab*", 2) == pytest.approx(exact, abs=1e-5)
    assert log_evidence("ab") == pytest.approx(exact, abs=1e-5)
    with pytest.raises(lmppl.ZeroEvidenceError, match="ends before it matches"):
        log_evidence("abb+")  # no error of the program, as the constraint may depend on latents


def test_few_tokens_are_asked_about_and_nothing_warns():
    lm = tiny_lm([f"{n:02d}" for n in range(100)], seed=0, contrast=1.0)
    asked = []

    class Even(Constraint):
        def allows(self, prefix):
            asked.append(prefix)
            return not prefix or int(prefix[-1]) % 2 == 0

    constraint = Even()

    def program(max_tokens=3):
        lm_sample("z", "00", max_tokens=max_tokens, constraint=constraint)

    for method in ("importance", "smc"):
        asked.clear()
        posterior = lmppl.infer(program, lm=lm, method=method, num_samples=10, seed=0)
        assert posterior.ess > 1 and len(asked) < 10 * 3 * 20  # of 101 tokens each
    with pytest.warns(UserWarning, match="asked about every token"):
        lmppl.infer(program, 1, lm=lm, method="exact")


def test_an_error_of_a_predicate_names_its_site_and_the_text():
    class Broken(Constraint):
        def allows(self, prefix):
            return "b" not in prefix or 1 / 0

    def program():
        lm_sample("first", "ab", max_tokens=2, constraint=Broken())

    with pytest.raises(ZeroDivisionError) as caught:
        lmppl.infer(program, lm=LM, method="importance", num_samples=8, seed=0)
    notes = " ".join(caught.value.__notes__)
    assert "Broken.allows('b')" in notes and "site 'first', whose text so far is ''" in notes


# --- beside others -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["importance", "smc"])
def test_side_by_side_an_input_gives_what_it_gives_alone(method):
    def program(x, regex):
        z = lm_sample("z", x, max_tokens=4, regex=regex, temperature=1.5)
        w = lm_sample("w", [x, z], max_tokens=3, constraint=FewB())
        lm_sample("y", [x, z, w], obs="a")

    inputs = [("ab", "a+b|bb"), ("ba", "(ab)+|b")]
    options = {"lm": LM, "method": method, "num_samples": 12}
    for args, found in zip(
        inputs, lmppl.infer_batch(program, inputs, seed=1, **options), strict=True
    ):
        alone = lmppl.infer(program, *args, seed=found.info["seed"], **options)
        assert found.log_weights.tolist() == pytest.approx(alone.log_weights.tolist(), abs=1e-4)


@pytest.mark.filterwarnings("ignore:.* is asked about every token")
def test_moves_of_particles_take_densities_and_not_estimates():
    """Rejuvenation after draws by rejection: the kernel has the densities of masks."""

    def program():
        z = lm_sample("z", "ab", max_tokens=2, constraint=Words(), temperature=2.0)
        w = lm_sample("w", ["ab", z], max_tokens=1)
        lm_sample("y", ["ab", w], obs="a")

    exact = lmppl.infer(program, lm=LM, method="exact").log_evidence
    found = [
        lmppl.infer(program, lm=LM, method="smc", num_samples=64, rejuvenate=1, seed=seed)
        for seed in range(8)
    ]
    ratios = [math.exp(posterior.log_evidence - exact) for posterior in found]
    error = torch.tensor(ratios).std() / math.sqrt(len(ratios))
    assert abs(sum(ratios) / len(ratios) - 1.0) < 4 * float(error)
