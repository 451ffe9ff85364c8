"""The kernel of Markov moves: its whole transition matrix leaves the joint invariant."""

import constrained
import moving
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import small
import torch
from moving import ARGS
from pyro import poutine
from pyro.poutine import Trace
from transitions import Kernel, key_of

import lmppl
from lmppl import RandomWalk, Redraw, Suffix, lm_sample
from lmppl.engines import kernels, moves
from lmppl.engines.moves import MoveProposer, Plan
from lmppl.guides.laws import laws_of

CASES = {
    "one text": ("one_text", {}),
    "one text, last token": ("one_text", {"block": 1, "turn": 3}),
    "one text, last two tokens": ("one_text", {"block": 1, "turn": 1}),
    "two texts": ("chain", {}),
    "two texts, one of them whole": ("chain", {"kernels": {"z": Redraw()}}),
    "two texts, blocks of one": ("chain", {"kernels": {"w": Suffix(1)}}),
    "two texts, hot": ("chain", {"temperature": 2.0}),
    "branch": ("branch", {}),
    "branch, redrawn": ("branch", {"keep": False}),
    "other kinds": ("other_kinds", {}),
    "other kinds, redrawn": ("other_kinds", {"keep": False}),
    "conditions": ("conditioned", {}),
    "conditions, guide": ("conditioned", {"guide": moving.guide}),
    "scale": ("scaled", {}),
    "scale, cold": ("scaled", {"temperature": 1 / 3}),
    "scale, guide": ("scaled", {"guide": moving.guide}),
    "coins": ("coins", {}),
    "coins, guide": ("coins", {"guide": moving.coins_guide}),
    "coins, cold guide": ("coins", {"guide": moving.coins_guide, "temperature": 0.5}),
    "constraint": ("constrained", {}),
    "constraint, hot, redrawn": ("constrained", {"temperature": 2.0, "keep": False}),
    "local constraint": ("constrained_locally", {}),
    "first barrier": ("three_texts", {"barrier": 1}),
    "second barrier": ("three_texts", {"barrier": 2}),
    "second barrier, redrawn": ("three_texts", {"barrier": 2, "keep": False}),
}
# One of each kind is fast.
FAST = {
    "one text", "one text, last token", "branch", "other kinds", "conditions, guide", "scale",
    "coins, guide", "local constraint", "first barrier",
}  # fmt: skip

FAST_CONSTRAINED = {"alternatives, global", "json, local"}


def kernel(monkeypatch, name, dtype=torch.float64):
    program, options = CASES[name]
    return Kernel(
        monkeypatch, getattr(moving, program), ARGS, small.small_lm(), dtype=dtype, **options
    )


@pytest.mark.parametrize(
    "name", [pytest.param(c, marks=[pytest.mark.slow] * (c not in FAST)) for c in CASES]
)
def test_the_kernel_on_a_table_leaves_the_joint_invariant(monkeypatch, name):
    error, moved = kernel(monkeypatch, name).error()
    assert error < 1e-10
    assert moved > 0.02


@pytest.mark.parametrize(
    "name",
    [
        "other kinds",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("one text", "scale, guide")),
    ],
)
def test_with_a_language_model_it_does_up_to_rounding(monkeypatch, name):
    """The model's own float32 log-probabilities."""
    program, options = CASES[name]
    found = Kernel(
        monkeypatch, getattr(moving, program), ARGS, small.small_lm(), table=False, **options
    )
    error, _ = found.error()
    assert error < 1e-6


@pytest.mark.filterwarnings("ignore:.*is asked about every token")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST_CONSTRAINED))
        for name in constrained.CASES
    ],
)
def test_constrained_programs_by_brute_force(monkeypatch, name):
    """The kernel leaves the posterior invariant that is found without asking the constraints."""
    case = constrained.CASES[name]
    exact = case.enumerate().posterior(*case.text_latents)
    found = Kernel(monkeypatch, case.program, case.args, case.lm)
    states = found.states()
    keys = [tuple(value for _, value in key_of(state.particle)) for state in states]
    keys = keys if len(case.text_latents) > 1 else [key[0] for key in keys]
    assert set(keys) == set(exact)
    _, P = found.matrix()
    pi = np.array([exact[key] for key in keys])
    assert np.abs(pi @ P - pi).max() < 1e-6
    assert (np.diag(P) < 1).all()


@pytest.mark.slow
def test_an_automatic_guide_as_proposal(monkeypatch):
    lm = small.small_lm()
    guide = lmppl.LMGuide(moving.scaled, lm=lm)
    torch.manual_seed(0)
    guide.prepare(ARGS)
    for parameter in guide.parameters():
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn_like(parameter))
    found = Kernel(monkeypatch, moving.scaled, ARGS, lm, guide=guide)
    error, moved = found.error()
    assert error < 1e-10
    assert moved > 0.02
    assert found.laws.has_proposed


# --- mistakes -------------------------------------------------------------------------------------


def forget_the_length(patch):
    patch.setattr(Plan, "log_choice", lambda self, latents: -np.log(len(latents)))


def forget_the_number_of_sites(patch):
    log_choice = Plan.log_choice

    def mutant(self, latents):
        return log_choice(self, latents) + np.log(len(latents))

    patch.setattr(Plan, "log_choice", mutant)


def forget_the_window(patch):
    """A cut that the reverse move cannot choose."""
    patch.setattr(
        Suffix, "cuts", lambda self, node, turn, cuts=Suffix.cuts: _Endless(cuts(self, node, turn))
    )


class _Endless:
    """A range that holds every cut."""

    def __init__(self, cuts):
        self._cuts = cuts

    def __contains__(self, cut):
        return True

    def __len__(self):
        return len(self._cuts)

    def __getitem__(self, k):
        return self._cuts[k]


def forget_what_vanished(patch):
    def end(self):
        self.has_ended = True

    patch.setattr(MoveProposer, "_end", end)


def forget_that_the_reverse_keeps(patch):
    patch.setattr(MoveProposer, "_give_up", lambda self, name: None)


def scale_the_proposal(patch):
    """q is scaled as R is."""
    move = MoveProposer._move

    def mutant(self, site):
        before = self.log_q, self.log_q_old
        given = move(self, site)
        scale = float(site["scale"])
        self.log_q, self.log_q_old = (
            b + scale * (a - b) for a, b in zip((self.log_q, self.log_q_old), before, strict=True)
        )
        return given

    patch.setattr(MoveProposer, "_move", mutant)


@pytest.mark.parametrize(
    "mutate, name",
    [
        (forget_the_length, "one text"),
        (forget_the_number_of_sites, "branch"),
        (forget_the_window, "one text, last token"),
        (forget_what_vanished, "branch"),
        (forget_what_vanished, "second barrier"),
        (forget_that_the_reverse_keeps, "other kinds"),
        (scale_the_proposal, "scale"),
    ],
)
def test_mistakes_are_found(monkeypatch, mutate, name):
    mutate(monkeypatch)
    error, _ = kernel(monkeypatch, name).error()
    assert error > 1e-4


# --- numbers --------------------------------------------------------------------------------------


def chains_of(program):
    return lmppl.infer(
        program, *ARGS, lm=small.small_lm(), method="mcmc", num_chains=100, num_samples=300,
        warmup=15, thin=3, seed=0,
    )  # fmt: skip


def test_a_value_is_not_kept_where_it_has_another_measure():
    """The branches have odds of 0.3 to 0.7, whatever the number is."""
    found = chains_of(moving.two_measures)
    assert abs(float(found.mean("which")) - 0.3) < 0.1
    numbers = [float(v) for v, w in zip(found["number"], found["which"], strict=True) if not w]
    assert not {0.0, 1.0} & set(numbers)


def test_a_point_mass_moves_with_what_it_is_of():
    found = chains_of(moving.copied)
    assert found.info["chains"]["acceptance"]["k"] > 0.3
    assert abs(float(found.mean("k")) - 0.3) < 0.1


# --- guides ---------------------------------------------------------------------------------------


def test_a_guide_that_leaves_a_site_on_one_branch_draws_it_on_the_other():
    def program():
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("m", dist.Bernoulli(0.5))
        pyro.sample("j", dist.Bernoulli(0.5))
        return k

    def guide():
        if pyro.sample("k", dist.Bernoulli(0.5)):
            pyro.sample("m", dist.Bernoulli(0.1))
        pyro.sample("j", dist.Bernoulli(0.5))

    laws = laws_of(guide, ())
    found = {}
    for value in (1.0, 0.0, 1.0):
        trace = poutine.trace(poutine.condition(program, {"k": torch.tensor(value)})).get_trace()
        trace.nodes["k"]["is_observed"] = False
        before = Trace()
        before.nodes["k"] = trace.nodes["k"]
        found.setdefault(value, []).append(float(laws.law(trace.nodes["m"], before).probs))
    assert found == {1.0: [pytest.approx(0.1)] * 2, 0.0: [0.5]}


# --- random walks ----------------------------------------------------------------------------------


def number_and_text(x, y):
    rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0).double(), torch.tensor(1.5).double()))
    z = lm_sample("z", x, max_tokens=1)
    pyro.factor("fit", -((rate - (1.0 if "a" in z else 2.5)) ** 2))


def walk_error(monkeypatch):
    """The invariance of a walk over the log of a number, on a grid: steps are multiples of its spacing,
    and those that leave the grid are rejected. (So it is a walk over finitely many points, with the
    density of the log as its target.)"""
    spacing, size, reach = 0.4, 16, 3
    grid = torch.arange(size).double() * spacing - 4.0
    steps = torch.arange(-reach, reach + 1)
    shares = torch.exp(-((steps * spacing) ** 2) / 2).double()
    shares = shares / shares.sum()
    walk = RandomWalk(spacing)
    found = Kernel(monkeypatch, number_and_text, ARGS[:2], small.small_lm(), kernels={"rate": walk})
    noise = {}
    monkeypatch.setattr(kernels.torch, "randn_like", lambda x: torch.full_like(x, noise["step"]))
    states = [found.state_of({"rate": x.exp(), "z": "a"}) for x in grid]
    # log of the density of x = log(rate): that of the rate times d rate / dx.
    log_pi = np.array([s.log_joint for s in states]) + grid.numpy()
    pi = np.exp(log_pi - log_pi.max())
    P = np.zeros((size, size))
    for i, state in enumerate(states):
        for step, share in zip(steps.tolist(), shares.tolist(), strict=True):
            j, noise["step"] = i + step, float(step)
            if not 0 <= j < size:
                P[i, i] += share
                continue
            (proposed,) = moves.propose([state], [Plan("rate", walk, 0, 0)], [0])
            value = proposed.state.latents["rate"]["value"]
            assert abs(float(value.log()) - float(grid[j])) < 1e-9
            accept = min(1.0, np.exp(proposed.log_ratio))
            P[i, j] += share * accept
            P[i, i] += share * (1 - accept)
    pi /= pi.sum()
    return np.abs(pi @ P - pi).max()


def test_a_random_walk_leaves_the_joint_invariant(monkeypatch):
    assert walk_error(monkeypatch) < 1e-10


def test_a_random_walk_without_its_jacobian_is_found(monkeypatch):
    class Flat:
        def __init__(self, transform):
            self.inv, self._transform = transform.inv, transform

        def __call__(self, x):
            return self._transform(x)

        def log_abs_det_jacobian(self, x, y):
            return torch.zeros_like(x)

    biject_to = kernels.biject_to
    monkeypatch.setattr(kernels, "biject_to", lambda support: Flat(biject_to(support)))
    assert walk_error(monkeypatch) > 1e-3


def test_key_of_tells_traces_apart(monkeypatch):
    found = kernel(monkeypatch, "branch")
    states = found.states()
    assert len({key_of(state.particle) for state in states}) == len(states) > 20
