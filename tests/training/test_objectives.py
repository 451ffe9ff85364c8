"""Training losses against slow references, and against what they mean, enumerated."""

import itertools
import math

import pytest
import torch

from lmppl.testing.programs import CASES
from lmppl.training import objectives

DEAD = -math.inf


def some(n, seed=0, dead=()):
    generator = torch.Generator().manual_seed(seed)
    log_r = torch.randn(n, generator=generator, dtype=torch.float64) * 3 - 5
    log_q = torch.randn(n, generator=generator, dtype=torch.float64).requires_grad_()
    log_r[list(dead)] = DEAD
    return log_r, log_q


def gradient(loss, *parameters):
    return torch.autograd.grad(loss, parameters, allow_unused=True)


def four(dead=()):
    """log R and log q of the only four traces there are, and the guide's parameters."""
    logits = torch.tensor([0.3, -0.5, 1.1, 0.2], dtype=torch.float64, requires_grad=True)
    log_r = torch.tensor([-2.0, -4.5, -3.0, -7.0], dtype=torch.float64)
    log_r[list(dead)] = DEAD
    return log_r, torch.log_softmax(logits, 0), logits


def expected_gradient(surrogate, log_b, logits, n):
    """The mean gradient of ``surrogate(rows)`` over every batch of n traces drawn from exp(log_b)."""
    expected = torch.zeros_like(logits)
    for batch in itertools.product(range(len(log_b)), repeat=n):
        rows = list(batch)
        probability = log_b[rows].sum().exp().item()
        expected += probability * gradient_of(surrogate(rows), logits)
    return expected


def gradient_of(loss, logits):
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


# --- vargrad -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 17])
def test_vargrad_is_the_variance(n):
    log_r, log_q = some(n)
    loss, variance = objectives.vargrad(log_r, log_q), torch.var(log_r - log_q)
    assert loss.item() == pytest.approx(variance.item())
    torch.testing.assert_close(gradient(loss, log_q), gradient(variance, log_q))


def test_vargrad_against_all_pairs():
    log_r, log_q = some(6, seed=2)
    u = log_r - log_q
    naive = sum((a - b) ** 2 for a, b in itertools.product(u, repeat=2)) / (2 * 6 * 5)
    loss = objectives.vargrad(log_r, log_q)
    torch.testing.assert_close(loss, naive)
    torch.testing.assert_close(gradient(loss, log_q), gradient(naive, log_q))


@pytest.mark.parametrize("dead", [(0, 1, 2), (0, 2), (2,)])
@pytest.mark.parametrize(
    "loss", [objectives.vargrad, objectives.subtb, objectives.elbo, objectives.alive]
)
def test_dead_traces_that_q_cannot_draw_leave_no_trace(loss, dead):
    """They are in a batch where the program drew them."""
    log_r, log_q = some(3, dead=dead)
    without = torch.tensor([i != 2 for i in range(3)])
    value = loss(log_r, torch.where(without, log_q, DEAD))
    expected = loss(log_r[without], log_q[without])
    assert value.item() == pytest.approx(expected.item())
    torch.testing.assert_close(gradient(value, log_q), gradient(expected, log_q))


@pytest.mark.parametrize("n", [2, 3])
def test_vargrad_is_unbiased_whoever_draws(n):
    log_r, log_q, logits = four()
    log_b = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    u = log_r - log_q
    pairs = (u[:, None] - u[None, :]) ** 2 / 2
    truth = gradient_of(log_b.exp() @ pairs @ log_b.exp(), logits)
    mean = expected_gradient(
        lambda rows: objectives.vargrad(log_r[rows], log_q[rows]), log_b, logits, n
    )
    torch.testing.assert_close(mean, truth)


def test_vargrad_leaves_dead_traces_out():
    log_r, log_q = some(7, dead=(1, 4))
    live = log_r > DEAD
    loss = objectives.vargrad(log_r, log_q)
    assert loss.item() == pytest.approx(torch.var((log_r - log_q)[live]).item())
    (slope,) = gradient(loss, log_q)
    assert slope[~live].tolist() == [0.0, 0.0] and bool((slope[live] != 0).all())


@pytest.mark.parametrize("dead", [(0, 1, 2), (0, 2)], ids=["none alive", "one alive"])
@pytest.mark.parametrize("loss", [objectives.vargrad, objectives.subtb, objectives.elbo])
def test_too_few_live_traces_are_no_loss_and_no_gradient(loss, dead):
    log_r, log_q = some(3, dead=dead)
    value = loss(log_r, log_q)
    assert value.item() == 0.0
    assert gradient(value, log_q)[0].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("huber", [0.5, 1.0, 3.0])
def test_huber_against_its_definition(huber):
    log_r, log_q = some(9, seed=1)
    log_r[3] += 40.0  # an outlier
    u = (log_r - log_q).detach()

    def cost(centre):
        total = 0.0
        for each in u.tolist():
            d = abs(each - centre)
            total += d**2 if d <= huber else 2 * huber * d - huber**2
        return total / (len(u) - 1)

    low, high = float(u.min()), float(u.max())
    for _ in range(200):  # ternary search: the cost is convex in the centre
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if cost(a) < cost(b) else (a, high)
    loss = objectives.vargrad(log_r, log_q, huber=huber)
    assert loss.item() == pytest.approx(cost(low), rel=1e-3)
    (slope,) = gradient(loss, log_q)
    naive = -2 * (u - low).clamp(-huber, huber) / (len(u) - 1)
    torch.testing.assert_close(slope, naive, atol=0.05 * huber, rtol=0.0)


def test_huber_far_out_is_the_variance():
    log_r, log_q = some(6)
    wide = objectives.vargrad(log_r, log_q, huber=1e6)
    torch.testing.assert_close(wide, objectives.vargrad(log_r, log_q))


# --- tb ------------------------------------------------------------------------------------------


def test_tb_against_a_loop():
    log_r, log_q = some(6, dead=(2,))
    log_z = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    terms = [
        (log_z.item() + q - r) ** 2
        for r, q in zip(log_r.tolist(), log_q.tolist(), strict=True)
        if r > DEAD
    ]
    loss = objectives.tb(log_r, log_q, log_z)
    assert loss.item() == pytest.approx(sum(terms) / len(terms))
    slope = gradient(loss, log_q)[0]
    assert slope[2] == 0.0


def test_tb_uses_a_learned_log_z_that_is_zero():
    """``log_z or estimate`` would replace it when it is 0, and it would never be learned."""
    log_r, log_q = some(5)
    log_z = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = objectives.tb(log_r, log_q, log_z)
    assert loss.item() == pytest.approx(((log_q - log_r) ** 2).mean().item())
    (slope,) = gradient(loss, log_z)
    assert slope.item() == pytest.approx(2 * (log_q - log_r).mean().item())


def test_tb_of_dead_traces_only():
    log_r, log_q = some(2, dead=(0, 1))
    log_z = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    loss = objectives.tb(log_r, log_q, log_z)
    assert loss.item() == 0.0
    assert gradient(loss, log_z)[0] == 0.0


# --- subtb ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.3, 0.9, 1.0, 1.5])
@pytest.mark.parametrize("dead", [(), (0,), (2, 3)], ids=["alive", "first dead", "inner dead"])
def test_subtb_against_all_pairs(lam, dead):
    log_r, log_q = some(7, seed=3, dead=dead)
    u = log_r - log_q
    total, weights = 0.0, 0.0
    for i, j in itertools.combinations([k for k in range(7) if k not in dead], 2):
        total = total + lam ** (j - i) * (u[j] - u[i]) ** 2
        weights += lam ** (j - i)
    loss, naive = objectives.subtb(log_r, log_q, lam), total / weights
    torch.testing.assert_close(loss, naive)
    torch.testing.assert_close(gradient(loss, log_q), gradient(naive, log_q))


def balance(log_r, tokens, closing, lam):
    """Hu et al. (2024), equation 3, as it is written, over its total weight.

    ``log_r[t]`` and ``closing[t]`` are log R(z_<=t c) and log q(c | z_<=t), and ``tokens[k]`` is
    log q(z_k+1 | z_<=k).
    """
    total, weights = 0.0, 0.0
    for i, j in itertools.combinations(range(len(log_r)), 2):
        left = log_r[i] + sum(tokens[k] for k in range(i, j)) + closing[j]
        total = total + lam ** (j - i) * (left - log_r[j] - closing[i]) ** 2
        weights += lam ** (j - i)
    return total / weights


def text(n, seed=5):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(3, n + 1, generator=generator, dtype=torch.float64).log()
    tokens, closing = draw[0, :n].requires_grad_(), draw[1].clone().requires_grad_()
    return 4 * draw[2].detach(), tokens, closing


def of_truncations(tokens, closing):
    return torch.cat([tokens.new_zeros(1), tokens.cumsum(0)]) + closing


@pytest.mark.parametrize("lam", [0.4, 1.0])
@pytest.mark.parametrize("n", [1, 6])
def test_subtb_is_that_of_hu_et_al(lam, n):
    log_r, tokens, closing = text(n)
    naive = balance(log_r, tokens, closing, lam)
    loss = objectives.subtb(log_r, of_truncations(tokens, closing), lam)
    torch.testing.assert_close(loss, naive)
    slopes = gradient(naive, tokens, closing)
    torch.testing.assert_close(gradient(loss, tokens, closing), slopes)


def test_the_closing_factor_belongs_to_the_density():
    """With the other sign, or without it, the sum is another one."""
    log_r, tokens, closing = text(6)
    naive = balance(log_r, tokens, closing, 0.9).item()
    for sign in (-1.0, 0.0):
        wrong = objectives.subtb(log_r, of_truncations(tokens, sign * closing), 0.9)
        assert abs(wrong.item() - naive) > 0.1 * naive
    # And at R = q of the truncations, up to a constant, only the right one is zero.
    exact = of_truncations(tokens, closing).detach() - 2.0
    for sign, zero in ((1.0, True), (-1.0, False), (0.0, False)):
        loss = objectives.subtb(exact, of_truncations(tokens, sign * closing), 0.9)
        assert (loss.item() < 1e-20) == zero


@pytest.mark.parametrize("dead", [(), (1,)], ids=["alive", "one dead"])
def test_subtb_of_some_truncations_is_apart_in_tokens(dead):
    log_r, log_q = some(4, seed=4, dead=dead)
    at = [2, 7, 3, 12]
    u = log_r - log_q
    total, weights = 0.0, 0.0
    for i, j in itertools.combinations([k for k in range(4) if k not in dead], 2):
        total = total + 0.8 ** abs(at[j] - at[i]) * (u[j] - u[i]) ** 2
        weights += 0.8 ** abs(at[j] - at[i])
    loss, naive = objectives.subtb(log_r, log_q, 0.8, torch.tensor(at)), total / weights
    torch.testing.assert_close(loss, naive)
    torch.testing.assert_close(gradient(loss, log_q), gradient(naive, log_q))


def test_subtb_of_truncations_that_are_far_apart():
    """In float32 ``0.1 ** 60`` is zero, and so would be the total weight."""
    log_r, log_q = (x.detach().float() for x in some(3))
    loss = objectives.subtb(log_r, log_q, 0.1, torch.tensor([0, 60, 200]))
    u = log_r - log_q
    assert loss.item() == pytest.approx(float((u[1] - u[0]) ** 2))


@pytest.mark.parametrize("lam", [0.0, -1.0, math.nan])
def test_subtb_refuses_weights_that_are_none(lam):
    with pytest.raises(ValueError, match="must be positive"):
        objectives.subtb(*some(3), lam)


# --- alive ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 4])
def test_alive_is_unbiased_for_the_first_terms_of_minus_log_alive(n):
    log_r, log_q, logits = four(dead=(1, 2))
    expected = expected_gradient(
        lambda rows: objectives.alive(log_r[rows], log_q[rows]), log_q, logits, n
    )
    mass = log_q.exp()[log_r > DEAD].sum()
    series = sum((1 - mass) ** k / k for k in range(1, n))
    torch.testing.assert_close(expected, gradient_of(series, logits))
    limit = gradient_of(-mass.log(), logits)
    assert float(torch.cosine_similarity(expected, limit, dim=0)) == pytest.approx(1.0)


def test_alive_is_nothing_where_all_are_alive_or_dead():
    for dead in [(), (0, 1, 2)]:
        log_r, log_q = some(3, dead=dead)
        loss = objectives.alive(log_r, log_q)
        assert gradient(loss, log_q)[0].tolist() == [0.0, 0.0, 0.0]


def test_alive_of_samples_of_q_has_weights_of_one():
    log_r, log_q = some(5, dead=(1, 3))
    plain = gradient(objectives.alive(log_r, log_q), log_q)
    weighted = gradient(objectives.alive(log_r, log_q, log_q.detach().clone()), log_q)
    torch.testing.assert_close(weighted, plain)


def test_alive_leaves_out_what_q_cannot_draw():
    log_r = torch.tensor([0.0, DEAD, DEAD])
    log_q = torch.tensor([-0.5, -1.0, -math.inf], requires_grad=True)
    drawn = torch.tensor([-0.7, -1.1, -2.0])
    loss = objectives.alive(log_r, log_q, drawn)
    expected = objectives.alive(log_r[:2], log_q[:2], drawn[:2])
    assert math.isfinite(loss.item())
    torch.testing.assert_close(gradient(loss, log_q), gradient(expected, log_q))


def test_alive_of_a_mixture_is_unbiased_in_the_limit_and_less_noisy():
    """q has nearly forgotten the dead traces 1 and 2, and p has not."""
    log_r = torch.tensor([0.0, DEAD, DEAD, -1.0])
    logits = torch.tensor([2.0, -4.0, -5.0, 1.0], requires_grad=True)
    log_q, log_p = torch.log_softmax(logits, 0), torch.full((4,), 0.25).log()
    drawn = torch.logaddexp(log_q.detach() + math.log(0.75), log_p + math.log(0.25))

    def estimates(rows_of, log_drawn):
        found = []
        for rows in rows_of:
            given = None if log_drawn is None else log_drawn[rows]
            found.append(gradient_of(objectives.alive(log_r[rows], log_q[rows], given), logits))
        return torch.stack(found)

    generator = torch.Generator().manual_seed(0)

    def draw(log_prob, num, size):
        p = log_prob.detach().exp().expand(num, 4)
        return torch.multinomial(p, size, replacement=True, generator=generator)

    exact = gradient_of(-log_q.exp()[log_r > DEAD].sum().log(), logits)
    (large,) = estimates(draw(drawn, 1, 200_000), drawn)
    torch.testing.assert_close(large, exact, atol=2e-4, rtol=0.02)
    mixed, own = estimates(draw(drawn, 400, 16), drawn), estimates(draw(log_q, 400, 16), None)
    assert mixed.var(0).sum() < 0.2 * own.var(0).sum()


# --- elbo ----------------------------------------------------------------------------------------


def check_elbo(loss, n, dead=()):
    """Its expected gradient is that of the exact -ELBO, if at least two samples are alive."""
    log_r, log_q, logits = four(dead)
    live = log_r > DEAD
    expected = expected_gradient(lambda rows: loss(log_r[rows], log_q[rows]), log_q, logits, n)
    mass = log_q.exp()[live].sum()
    ranked = log_q[live] - mass.log()  # q, renormalised to live traces
    exact = gradient_of((ranked.exp() * (ranked - log_r[live])).sum(), logits)
    alive = mass.item()
    enough = 1.0 - (1 - alive) ** n - n * alive * (1 - alive) ** (n - 1)
    torch.testing.assert_close(expected, enough * exact)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("dead", [(), (2,), (0, 3)], ids=str)
def test_elbo_is_unbiased(n, dead):
    check_elbo(objectives.elbo, n, dead)


def test_a_baseline_of_all_samples_is_biased():
    """With the sample's own u in its baseline, the mean shrinks by (n - 1) / n."""

    def own_sample_too(log_r, log_q):
        u = (log_r - log_q).detach()
        return -((u - u.mean()) * log_q).mean()

    with pytest.raises(AssertionError):
        check_elbo(own_sample_too, 2)


def test_elbo_is_half_of_vargrad():
    log_r, log_q = some(8, dead=(5,))
    half = gradient(objectives.vargrad(log_r, log_q) / 2, log_q)
    torch.testing.assert_close(gradient(objectives.elbo(log_r, log_q), log_q), half)


# --- wake ----------------------------------------------------------------------------------------


def without_control_variate(log_r, log_q, log_drawn=None):
    log_drawn = log_q if log_drawn is None else log_drawn
    return -(torch.softmax((log_r - log_drawn).detach(), 0) * log_q).sum()


def mixture(log_q):
    """The log-density of a half of the draws from the guide and a half from another law."""
    other = torch.softmax(torch.linspace(1.0, -1.0, len(log_q), dtype=torch.float64), 0)
    return (0.5 * log_q.detach().exp() + 0.5 * other).log()


def slope_at_the_optimum(loss, law=None):
    """The largest gradient over all batches of three traces, where q is the posterior; ``law``: of the
    mixture that drew them."""
    log_r, _, _ = four()
    logits = log_r.clone().requires_grad_()
    log_q = torch.log_softmax(logits, 0)
    batches = (list(batch) for batch in itertools.product(range(4), repeat=3))
    drawn = law and law(log_q)
    surrogates = (
        loss(log_r[rows], log_q[rows], *([] if drawn is None else [drawn[rows]]))
        for rows in batches
    )
    return float(torch.stack([gradient_of(s, logits) for s in surrogates]).abs().max())


@pytest.mark.parametrize("law", [None, mixture], ids=["guide", "mixture"])
def test_wake_has_no_gradient_at_the_optimum_thanks_to_its_control_variate(law):
    assert slope_at_the_optimum(objectives.wake, law) < 1e-15
    assert slope_at_the_optimum(without_control_variate, law) > 0.3


def test_wake_against_a_loop():
    log_r, log_q = some(6, dead=(1, 3))
    weights = (log_r - log_q).exp().tolist()
    slope = [1 / 6 - w / sum(weights) for w in weights]
    assert gradient(objectives.wake(log_r, log_q), log_q)[0].tolist() == pytest.approx(slope)
    drawn = some(6, seed=1)[1].detach()
    weights, of_q = (log_r - drawn).exp().tolist(), (log_q - drawn).exp().tolist()
    slope = [v / sum(of_q) - w / sum(weights) for v, w in zip(of_q, weights, strict=True)]
    assert gradient(objectives.wake(log_r, log_q, drawn), log_q)[0].tolist() == pytest.approx(slope)


@pytest.mark.parametrize("law", [None, mixture], ids=["guide", "mixture"])
@pytest.mark.parametrize("loss", [objectives.wake, without_control_variate])
@pytest.mark.parametrize("dead", [(), (3,)], ids=["all alive", "one dead"])
def test_wake_tends_to_the_forward_kl(loss, dead, law):
    """Every batch by its counts: four times the samples, a quarter of the bias."""
    log_r, log_q, logits = four(dead)
    log_q = log_q[1:] - log_q[1:].logsumexp(0)  # three traces, of which there are fewer batches
    log_r = log_r[1:]
    drawn = log_q if law is None else law(log_q)
    exact = gradient_of(-(torch.softmax(log_r, 0) * log_q).sum(), logits)
    gaps = []
    for n in (8, 32):
        expected = torch.zeros_like(logits)
        for i, j in itertools.combinations(range(n + 2), 2):
            counts = [i, j - i - 1, n + 1 - j]
            ways = math.factorial(n) // math.prod(math.factorial(k) for k in counts)
            rows = [trace for trace, count in enumerate(counts) for _ in range(count)]
            probability = ways * drawn[rows].sum().exp().item()
            of_mixture = [] if law is None else [drawn[rows]]
            surrogate = loss(log_r[rows], log_q[rows], *of_mixture)
            if bool((log_r[rows] > DEAD).any()):
                expected += probability * gradient_of(surrogate, logits)
        gaps.append(float((expected - exact).norm() / exact.norm()))
    assert gaps[1] < 0.1 and gaps[0] / gaps[1] == pytest.approx(4.0, rel=0.25)


def test_wake_unlearns_dead_traces():
    log_r, log_q = some(4, dead=(1, 2))
    (slope,) = gradient(objectives.wake(log_r, log_q), log_q)
    assert slope[1:3].tolist() == [0.25, 0.25]  # descent lowers log q of both
    log_r, log_q = some(3, dead=(0, 1, 2))
    value = objectives.wake(log_r, log_q)
    assert value.item() == 0.0 and gradient(value, log_q)[0].tolist() == [0.0, 0.0, 0.0]


# --- sft -----------------------------------------------------------------------------------------


def test_sft_on_the_posterior_is_the_forward_kl():
    log_r, log_q, logits = four(dead=(1,))
    posterior = torch.log_softmax(log_r, 0)
    expected = expected_gradient(lambda rows: objectives.sft(log_q[rows]), posterior, logits, 2)
    torch.testing.assert_close(expected, log_q.exp() - posterior.exp())
    assert objectives.sft(log_q).item() == pytest.approx(-log_q.mean().item())


# --- ppo -----------------------------------------------------------------------------------------


def advantages(log_r, old, ref, kl):
    """One by one; the dead get the worst live reward less 1."""
    trios = zip(log_r.tolist(), old.tolist(), ref.tolist(), strict=True)
    reward = [r - kl * (o - f) for r, o, f in trios]
    worst = min(r for r in reward if r > DEAD)
    reward = [r if r > DEAD else worst - 1.0 for r in reward]
    mean = sum(reward) / len(reward)
    spread = math.sqrt(sum((r - mean) ** 2 for r in reward) / (len(reward) - 1))
    return [(r - mean) / (spread + 1e-4) for r in reward]


@pytest.mark.parametrize("dead", [(), (0, 4)], ids=["all alive", "two dead"])
@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_the_first_step_of_ppo_is_the_policy_gradient(dead, kl):
    log_r, log_q = some(7, seed=6, dead=dead)
    old, ref = log_q.detach(), some(7, seed=7)[1].detach()
    advantage = advantages(log_r, old, ref, kl)
    (slope,) = gradient(objectives.ppo(log_r, log_q, old, ref, kl=kl), log_q)
    assert slope.tolist() == pytest.approx([-a / 7 for a in advantage])
    assert all(
        advantage[k] < min(a for i, a in enumerate(advantage) if i not in dead) for k in dead
    )


def test_ppo_is_clipped_on_the_side_to_which_it_is_pushed():
    log_r, old = some(40, seed=8, dead=(3,))
    old = old.detach()
    change = torch.linspace(-0.6, 0.6, 40, dtype=torch.float64)
    log_q = (old + change[torch.randperm(40, generator=torch.Generator().manual_seed(0))]).detach()
    log_q.requires_grad_()
    loss = objectives.ppo(log_r, log_q, old, torch.zeros_like(old), clip=0.3, kl=0.1)
    total, slopes, sides = 0.0, [], set()
    for now, before, a in zip(
        log_q.tolist(), old.tolist(), advantages(log_r, old, 0 * old, 0.1), strict=True
    ):
        ratio = math.exp(now - before)
        clipped = min(max(ratio, 0.7), 1.3)
        total -= min(ratio * a, clipped * a) / 40
        stopped = (a > 0 and ratio > 1.3) or (a < 0 and ratio < 0.7)
        sides.add((a > 0, ratio > 1.3, ratio < 0.7, stopped))
        slopes.append(0.0 if stopped else -a * ratio / 40)
    assert len(sides) == 6  # each sign of the advantage, with the ratio below, within and above
    assert loss.item() == pytest.approx(total)
    assert gradient(loss, log_q)[0].tolist() == pytest.approx(slopes)


def test_the_optimum_of_ppo_is_not_the_posterior():
    log_r, log_ref, _ = four()
    log_ref, kl = log_ref.detach(), 0.25
    old = torch.log_softmax(log_ref + log_r / kl, 0)
    log_q = old.clone().requires_grad_()
    (slope,) = gradient(objectives.ppo(log_r, log_q, old, log_ref, kl=kl), log_q)
    assert float(slope.abs().max()) < 1e-9
    assert 0.5 * float((old.exp() - torch.softmax(log_r, 0)).abs().sum()) > 0.1
    exact = torch.log_softmax(log_r, 0).requires_grad_()
    loss = objectives.ppo(log_r, exact, exact.detach(), log_ref, kl=kl)
    assert float(gradient(loss, exact)[0].abs().max()) > 0.1


def test_ppo_of_a_ratio_that_overflows():
    """The term that does not count has no gradient, rather than zero times infinity."""
    log_r, log_q = torch.tensor([0.0, -9.0]), torch.tensor([0.0, 0.0], requires_grad=True)
    old = torch.tensor([-500.0, 500.0])
    loss = objectives.ppo(log_r, log_q, old, old, kl=0.0)
    assert math.isfinite(loss.item())
    assert gradient(loss, log_q)[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("n", "dead"), [(3, (0, 1, 2)), (1, ())], ids=["all dead", "one sample"])
def test_ppo_of_nothing_to_compare(n, dead):
    log_r, log_q = some(n, dead=dead)
    loss = objectives.ppo(log_r, log_q, log_q.detach(), log_q.detach())
    assert loss.item() == 0.0 and gradient(loss, log_q)[0].tolist() == [0.0] * n


@pytest.mark.parametrize("clip", [0.0, 1.0, math.inf])
def test_ppo_refuses_a_clip_without_meaning(clip):
    log_r, log_q = some(3)
    with pytest.raises(ValueError, match="between 0 and 1"):
        objectives.ppo(log_r, log_q, log_q, log_q, clip=clip)


# --- the optimum ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_the_exact_posterior_has_no_loss_and_no_gradient(case):
    exact = case.enumerate()
    log_r = torch.tensor([t.log_joint for t in exact], dtype=torch.float64)
    log_r = log_r[log_r > DEAD]
    log_q = (log_r - exact.log_evidence).requires_grad_()
    log_z = torch.tensor(exact.log_evidence, dtype=torch.float64, requires_grad=True)
    for loss in (
        objectives.vargrad(log_r, log_q),
        objectives.vargrad(log_r, log_q, huber=3.0),
        objectives.tb(log_r, log_q, log_z),
        objectives.subtb(log_r, log_q),
        objectives.subtb(log_r, log_q, 0.8),
        objectives.alive(log_r, log_q),
        objectives.elbo(log_r, log_q),
        objectives.wake(log_r, log_q),
        objectives.wake(log_r, log_q, mixture(log_q)),
    ):
        assert loss.item() == pytest.approx(0.0, abs=1e-12)
        (slope,) = gradient(loss, log_q)
        assert float(slope.abs().max()) < 1e-9
