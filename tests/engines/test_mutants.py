"""The checks detect what they are for: each known mistake is made on purpose, and must be found."""

import pytest
import small
import torch
from choices import every_way
from estimates import check_unbiased
from test_resampling import check_expected_copies
from test_smc import check_lookaheads_draw_apart

from lmppl import distributions
from lmppl.engines import resampling, smc, twists
from lmppl.runtime import particle, waits

pytestmark = pytest.mark.usefixtures("remembered")

IMPORTANCE = {"method": "importance"}
SMC = {"method": "smc", "ess_threshold": 1.0, "resampling": "multinomial"}
TWISTED = {**SMC, "twist": lambda text: 0.8 * text.count("b") - 0.5}


def check(monkeypatch, program, **options):
    num = 2 if options["method"] == "smc" else 1  # more are as many alike
    check_unbiased(
        every_way(monkeypatch), program, small.ARGS, small.small_lm(), num_samples=num, **options
    )


def assert_found(monkeypatch, mutate, program, **options):
    """Found as a wrong expectation, or wrong cells of a scheme. (That the same checks pass without
    the mistake is in test_importance and test_smc.)"""
    with monkeypatch.context() as patch:
        mutate(patch)
        with pytest.raises(AssertionError, match=" not |no cell"):
            check(monkeypatch, program, **options)


# --- mistakes in the weights, found with every engine --------------------------------------------


def drop_the_end_factor(patch):
    """An observed text that must end there is scored as if it could go on."""
    score_texts = distributions.score_texts

    def mutant(fns, values, names=None, **options):
        results = []
        for fn, (log_prob, scored) in zip(
            fns, score_texts(fns, values, names, **options), strict=True
        ):
            if scored is not None and fn.stopping.max_tokens is not None:
                log_prob = log_prob - scored.log_probs[-1]
            results.append((log_prob, scored))
        return results

    patch.setattr(waits, "score_texts", mutant)


def count_observations_twice(patch):
    weight = particle.site_log_weight
    patch.setattr(
        particle, "site_log_weight", lambda node: weight(node) * (2 if node["is_observed"] else 1)
    )


def cancel_the_scale(patch):
    """As Pyro's own importance sampling does: log q is scaled as log p is."""

    def mutant(node):
        log_prob = float(node["log_prob_sum"])
        q = node.get("proposal_log_prob")
        return log_prob - (0.0 if q is None else float(q) * float(node["scale"]))

    patch.setattr(particle, "site_log_weight", mutant)


def forget_the_proposal(patch):
    patch.setattr(particle, "site_log_weight", lambda node: float(node["log_prob_sum"]))


def weigh_by_likelihood_alone(patch):
    """Right for the prior as proposal, wrong for a guide."""
    weight = particle.site_log_weight
    patch.setattr(
        particle, "site_log_weight", lambda node: weight(node) if node["is_observed"] else 0.0
    )


@pytest.mark.parametrize("engine", [IMPORTANCE, SMC], ids=["importance", "smc"])
@pytest.mark.parametrize(
    "mutate, program, guide",
    [
        (drop_the_end_factor, small.ended_twice, None),
        (count_observations_twice, small.two_sites, None),
        (cancel_the_scale, small.scaled, None),
        (cancel_the_scale, small.scaled, small.two_sites_half),
        (forget_the_proposal, small.two_sites, None),
        (weigh_by_likelihood_alone, small.two_sites, small.two_sites_half),
    ],
)
def test_wrong_weights_are_found(monkeypatch, engine, mutate, program, guide):
    assert_found(monkeypatch, mutate, program, guide=guide, **engine)


# --- mistakes in resampling ----------------------------------------------------------------------


def resample_with_unnormalised_weights(patch):
    def mutant(weights, uniforms):
        index = torch.searchsorted(weights.double().cumsum(0), uniforms, right=True)
        return index.clamp_max(int(torch.nonzero(weights > 0)[-1]))

    patch.setattr(resampling, "inverse_cdf", mutant)


def revive_the_dead(patch):
    """A small number is added to every weight, against division by zero."""
    original = resampling.inverse_cdf
    patch.setattr(resampling, "inverse_cdf", lambda weights, u: original(weights + 1e-2, u))


def keep_the_old_weights(patch):
    """The evidence so far is forgotten when weights are reset."""
    patch.setattr(smc, "log_mean_exp", lambda log_weights: 0.0)


def take_the_maximum(patch):
    patch.setattr(smc, "log_mean_exp", lambda log_weights: float(log_weights.max()))


def resample_the_best(patch):
    def mutant(self, log_weights, generator):
        return torch.full((len(log_weights),), int(log_weights.argmax()))

    patch.setattr(smc.SMC, "_ancestors", mutant)


@pytest.mark.parametrize(
    "mutate, program, engine",
    [
        (resample_with_unnormalised_weights, small.two_sites, SMC),
        (revive_the_dead, small.constraint, SMC),
        (keep_the_old_weights, small.two_sites, SMC),
        (take_the_maximum, small.two_sites, SMC),
        (resample_the_best, small.two_sites, SMC),
        (resample_the_best, small.longer, TWISTED),
    ],
)
def test_wrong_resampling_is_found(monkeypatch, mutate, program, engine):
    assert_found(monkeypatch, mutate, program, **engine)


WEIGHTS = torch.tensor([0.55, 0.0, 0.35, 0.6], dtype=torch.float64)


@pytest.mark.parametrize("mutate", [resample_with_unnormalised_weights, revive_the_dead])
@pytest.mark.parametrize("name", sorted(resampling.SCHEMES))
def test_wrong_copies_are_found_in_every_scheme(monkeypatch, mutate, name):
    check_expected_copies(name, WEIGHTS)
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check_expected_copies(name, WEIGHTS)


# --- mistakes in twists --------------------------------------------------------------------------


def forget_whose_share_was_paid_for(patch):
    """A copy is divided by the share of the slot that it comes to."""
    patch.setattr(
        twists,
        "log_weights_of_copies",
        lambda log_weights, a, ancestors: log_weights[ancestors] - (len(a) * a).log(),
    )


def forget_to_divide_by_the_share(patch):
    patch.setattr(
        twists, "log_weights_of_copies", lambda log_weights, a, ancestors: log_weights[ancestors]
    )


def forget_the_defence(patch):
    """Drawn by the twist alone, and divided by the shares of both."""
    ancestors = smc.SMC._ancestors
    shares, twisted = twists.shares, []

    def mutant_shares(log_weights, log_psi, defense):
        twisted[:] = [shares(log_weights, log_psi, 0.0)]
        return shares(log_weights, log_psi, defense)

    patch.setattr(twists, "shares", mutant_shares)
    patch.setattr(
        smc.SMC, "_ancestors", lambda self, a, generator: ancestors(self, twisted[0], generator)
    )


@pytest.mark.parametrize(
    "mutate", [forget_whose_share_was_paid_for, forget_to_divide_by_the_share, forget_the_defence]
)
def test_wrong_shares_are_found(monkeypatch, mutate):
    assert_found(monkeypatch, mutate, small.longer, **TWISTED)


def lend_lookaheads_the_particles_own_streams(patch):
    def mutant(self, particles, decoding, slots):
        pairs = zip(particles, slots, strict=True)
        return [lookahead(twists.Lookahead(p), [p], decoding, [slot])[0] for p, slot in pairs]

    lookahead = twists.Lookahead.__call__
    patch.setattr(twists.Lookahead, "__call__", mutant)


def test_a_lookahead_that_uses_up_numbers_to_come_is_found(monkeypatch):
    lend_lookaheads_the_particles_own_streams(monkeypatch)
    with pytest.raises(AssertionError, match="drawn in a lookahead"):
        check_lookaheads_draw_apart()
