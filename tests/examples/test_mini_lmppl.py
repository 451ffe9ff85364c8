"""The whole idea in one file, compared with the library: the same programs on the same tiny models."""

from __future__ import annotations

import ast
import functools
import math
import string
import sys
from pathlib import Path

import pyro
import pytest
import torch

import lmppl
import mini_lmppl as mini
from lmppl.guides.scoring import score_latents
from lmppl.testing import enumerate_program, naive_log_prob, tiny_lm

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # peft's

SOURCE = Path(mini.__file__)
MODELS = {
    "plain": tiny_lm("ab.", seed=0, contrast=1.0),
    "bos": tiny_lm("ab.", seed=2, contrast=1.0, bos=True),
    "sharp": tiny_lm("ab.", seed=3),
}
MINI = {name: mini.LM(lm.model, lm.tokenizer) for name, lm in MODELS.items()}


# --- programs in the words of both, which are `sample` (a text) and `factor` -----------------------


def gap(sample, factor):
    z = sample("z", "ab", max_tokens=3, stop=".")
    sample("y", ["ab", z], obs="ba")


def chain(sample, factor):
    first = sample("first", "b", max_tokens=2, stop=".")
    sample("middle", ["b", first], obs="ab.")
    second = sample("second", ["b", first, "ab."], max_tokens=2, stop=["b", "."])
    sample("end", ["b", first, "ab.", second], obs="a")
    factor("short", -0.3 * (len(first) + len(second)))


def branch(sample, factor):
    """A run that says b first has one latent more, and pays once more at its end."""
    z = sample("z", "a.", max_tokens=2, stop=".")
    if z.startswith("b"):
        factor("pays first", -1.5 if z == "ba" else -0.3)
        more = sample("more", ["a.", z, "a"], max_tokens=2, stop="ab")
        factor("pays", -1.0 - len(more))
    else:
        factor("pays less", -0.5)


def closes(sample, factor):
    """Observed texts that close by EOS, which is appended, by a stop string, and by their length."""
    z = sample("z", ".", max_tokens=3, stop="ab")
    sample("by EOS", [".", z], max_tokens=4, stop="aa", obs="ab")
    sample("by stop", [".", z, "a"], max_tokens=4, stop="ab", obs="bab")
    sample("by length", [".", z, "b"], max_tokens=2, obs="b.")
    sample("without max_tokens", [".", z, "."], stop=".", obs="b")
    sample("as it was", ["ab"], max_tokens=3, stop="ab", obs=z)


def condition(sample, factor):
    z = sample("z", "b", max_tokens=2, stop=".")
    factor("no b", -math.inf if "b" in z else 0.0)
    sample("more", ["b", z], max_tokens=2)


PROGRAMS = [gap, chain, branch, closes, condition]


def in_lmppl(program):
    def factor(name, log_weight):
        pyro.factor(name, torch.tensor(float(log_weight)))

    return lambda: program(lmppl.lm_sample, factor)


def in_mini(program, model):
    lm_sample = functools.partial(mini.lm_sample, lm=MINI[model])
    return lambda: program(lm_sample, mini.factor)


def log_joint(sites):
    return float(sum(site["log_p"] for site in sites.values()))


def latents(sites):
    """Their tokens, by name."""
    found = {name: site["value"] for name, site in sites.items() if not site["observed"]}
    return {name: text.token_ids for name, text in found.items()}


# --- densities -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_given_latents_have_the_density_of_the_library(program, model):
    lm, ours = MODELS[model], in_mini(program, model)
    with lmppl.use(lm):
        traces = enumerate_program(in_lmppl(program), lm=lm)
        few = [trace for trace in traces if trace.log_joint > -math.inf][::5]
        scores = score_latents(None, in_lmppl(program), (), [trace.data for trace in few])
    assert len(few) > 2
    for trace, log_r, log_p in zip(few, scores.log_joint, scores.log_prior, strict=True):
        known = {name: {"value": MINI[model].text(ids)} for name, ids in trace.values.items()}
        with torch.no_grad():
            sites, barrier = mini.run(ours, (), known=known)
        assert barrier is None and latents(sites) == trace.values
        assert log_joint(sites) == pytest.approx(float(log_r), abs=1e-4)
        log_q = sum(float(site["log_q"]) for site in sites.values())
        assert log_q == pytest.approx(float(log_p), abs=1e-4)


def test_the_density_of_a_text_is_that_of_its_tokens():
    lm = MINI["bos"]
    site = mini.LMText(lm, lm.encode(["ab", lm.text((1, 2, 3))]), 4, ())
    tokens = (0, 1, 3)  # with EOS, which a prefix loses
    expected = naive_log_prob(MODELS["bos"], (*lm.bos, 0, 1, 1, 2), tokens).sum()
    assert lm.bos == (4,) and site.prefix == (0, 1, 1, 2)
    with torch.no_grad():
        assert float(site.log_prob(lm.text(tokens))) == pytest.approx(float(expected), abs=1e-5)
        probs = [site.log_prob(value).exp() for value in site.enumerate_support()]
    assert float(sum(probs)) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_exact_finds_every_trace_of_the_library(program, model):
    found = mini.exact(in_mini(program, model), ())
    expected = enumerate_program(in_lmppl(program), lm=MODELS[model])
    theirs = {tuple(sorted(t.values.items())): t.log_joint for t in expected}
    theirs = {key: value for key, value in theirs.items() if value > -math.inf}
    joints = {tuple(sorted(latents(sites).items())): log_joint(sites) for sites in found.traces}
    ours = {key: value for key, value in joints.items() if value > -math.inf}
    assert ours == pytest.approx(theirs, abs=1e-4)
    of_engine = lmppl.infer(in_lmppl(program), lm=MODELS[model], method="exact")
    assert found.log_evidence == pytest.approx(of_engine.log_evidence, abs=1e-4)
    name = next(iter(latents(found.traces[0])))
    for text, prob in of_engine.probs(name).items():
        assert found.probs(name)[text] == pytest.approx(prob, abs=1e-4)


def test_torch_distributions_are_sites_too():
    def program():
        share = mini.sample("share", torch.distributions.Beta(2.0, 1.0))
        mini.sample("heads", torch.distributions.Bernoulli(share), obs=torch.tensor(1.0))

    torch.manual_seed(0)
    found = mini.importance(program, (), 2000)
    assert found.log_evidence == pytest.approx(math.log(2 / 3), abs=0.03)


# --- engines ---------------------------------------------------------------------------------------


def unlike(program, model):
    """A proposal that is not the program: the base LM, told something else."""
    guide = mini.Guide.__new__(mini.Guide)
    guide.lm, guide.tell = MINI[model], lambda: "ba."
    return guide


ENGINES = {
    "importance": lambda program, guide: mini.importance(program, (), 8, guide),
    "smc": lambda program, guide: mini.smc(program, (), 8, guide),
    "smc, always resampled": lambda program, guide: mini.smc(program, (), 8, guide, 1.0),
}


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_evidence_is_unbiased_and_so_is_each_trace(program, engine, guided):
    """The mean over runs of Z-hat, and of Z-hat times the weight of traces whose first text is the
    likeliest, against the library's exact ones, in standard errors of that mean."""
    ours, guide = in_mini(program, "plain"), unlike(program, "plain") if guided else None
    exact = lmppl.infer(in_lmppl(program), lm=MODELS["plain"], method="exact")
    name = "first" if program is chain else "z"
    text, prob = next(iter(exact.probs(name).items()))
    torch.manual_seed(0)
    found = []
    for _ in range(150):
        posterior = ENGINES[engine](ours, guide)
        z = math.exp(posterior.log_evidence - exact.log_evidence)
        found.append((z, z * posterior.probs(name).get(text, 0.0) if z else 0.0))
    estimates = torch.tensor(found, dtype=torch.float64)  # (runs, 2)
    stderr = estimates.std(0) / len(estimates) ** 0.5
    assert (stderr < 0.15).all(), "else the next line says nothing"
    error = (estimates.mean(0) - torch.tensor([1.0, prob], dtype=torch.float64)).abs()
    assert (error < 3.5 * stderr + 1e-6).all(), (error / stderr).tolist()


@pytest.mark.parametrize("program", [gap, chain])
def test_the_spread_of_importance_sampling_is_what_it_must_be(program):
    """The variance of Z-hat / Z is (E[w^2] / Z^2 - 1) / N, known by enumeration."""
    exact, num = mini.exact(in_mini(program, "plain"), ()), 32
    with torch.no_grad():
        scored = [mini.run(in_mini(program, "plain"), (), known=known(t))[0] for t in exact.traces]
    log_w = torch.tensor([float(mini.log_weight(sites)) for sites in scored])
    log_r = torch.tensor([log_joint(sites) for sites in scored])
    expected = (
        log_r + log_w - 2 * exact.log_evidence
    ).exp().sum() - 1  # sum of q w^2 / Z^2, less 1
    torch.manual_seed(1)
    runs = [mini.importance(in_mini(program, "plain"), (), num) for _ in range(100)]
    ratios = torch.tensor([math.exp(run.log_evidence - exact.log_evidence) for run in runs])
    assert 0.6 < float(ratios.var() * num / expected) < 1.6
    ess = sum(run.ess for run in runs) / len(runs)
    assert ess == pytest.approx(num / (1 + float(expected)), rel=0.25)


def test_smc_is_closer_where_much_is_known_early():
    """Each of six texts is judged before the next is drawn."""

    def program():
        for k in range(6):
            z = mini.lm_sample(f"z{k}", "a", lm=MINI["plain"], max_tokens=1)
            mini.factor(f"f{k}", -2.0 if z == "b" else 0.0)

    with torch.no_grad():
        p = float(MINI["plain"].next_log_probs((0,))[0, 1].exp())  # that b follows a
    exact = 6 * math.log(1 - p + p * math.exp(-2.0))
    errors = {}
    for name, engine in (("importance", mini.importance), ("smc", mini.smc)):
        torch.manual_seed(0)
        z = torch.tensor([engine(program, (), 64).log_evidence - exact for _ in range(20)]).exp()
        errors[name] = float((z - 1).square().mean().sqrt())
    assert errors["smc"] < errors["importance"] / 2


def test_a_particle_draws_one_text_between_barriers_and_pays_for_what_follows(monkeypatch):
    calls, run = [], mini.run

    def watched(program, args, guide=None, known=None, max_draws=math.inf):
        sites, barrier = run(program, args, guide, known, max_draws)
        calls.append((list(known), list(sites), barrier and barrier[0]))
        return sites, barrier

    monkeypatch.setattr(mini, "run", watched)
    mini.smc(in_mini(chain, "plain"), (), 2)
    begun = ["first", "middle"]
    ended = [*begun, "second", "end", "short"]
    assert calls == [([], begun, "second")] * 2 + [(begun, ended, None)] * 2


def test_a_run_that_has_ended_is_not_compared_with_those_that_go_on():
    """It has paid for all that it met, and they have not."""

    def program():
        z = mini.lm_sample("z", "a", lm=MINI["plain"], max_tokens=1)
        if z == "b":
            mini.factor("pays at once", -8.0)
        else:
            mini.lm_sample("more", "a", lm=MINI["plain"], max_tokens=1)
            mini.factor("pays later", -8.0)

    torch.manual_seed(0)
    found = mini.smc(program, (), 100, ess_threshold=1.0)
    share = sum("more" not in sites for sites in found.traces) / 100
    with torch.no_grad():
        p = float(MINI["plain"].next_log_probs((0,))[0, 1].exp())
    assert share == pytest.approx(p, abs=0.15) and found.log_evidence == pytest.approx(-8.0)


def test_all_dead_is_an_evidence_of_zero():
    def program():
        mini.factor("never", -math.inf)
        mini.lm_sample("z", "a", lm=MINI["plain"], max_tokens=2)

    for engine in (mini.importance, mini.smc):
        assert engine(program, (), 4).log_evidence == -math.inf


# --- the guide -------------------------------------------------------------------------------------


def known(sites, *keys):
    return {name: {key: site[key] for key in ("value", *keys)} for name, site in sites.items()}


def law(exact, program, guide):
    """log q and u of every trace, (N,) each."""
    with torch.no_grad():
        runs = [mini.run(program, (), guide, known(t, "log_p"))[0] for t in exact.traces]
    log_q = torch.stack([sum(site["log_q"] for site in sites.values()) for sites in runs])
    return log_q, torch.stack([mini.log_weight(sites) for sites in runs])


def test_a_fresh_guide_is_the_base_and_training_leaves_the_base_as_it_is():
    lm, program = MINI["plain"], in_mini(gap, "plain")
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    guide, exact = mini.Guide(lm), mini.exact(program, ())
    assert torch.allclose(law(exact, program, guide)[0], law(exact, program, None)[0], atol=1e-5)
    ours = {p.data_ptr() for p in guide.lm.model.parameters() if not p.requires_grad}
    assert ours == {p.data_ptr() for p in lm.model.parameters()}
    torch.manual_seed(0)
    guide.fit(program, [()], 2, batch_size=4)
    assert all(torch.equal(p, before[name]) for name, p in lm.model.named_parameters())
    log_q, _ = law(exact, program, guide)
    assert not torch.allclose(log_q, law(exact, program, None)[0], atol=1e-2)
    assert float(log_q.exp().sum()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.slow
def test_a_trained_guide_is_near_the_posterior_and_a_better_proposal():
    program = in_mini(gap, "sharp")
    exact = mini.exact(program, ())
    log_z = lmppl.infer(in_lmppl(gap), lm=MODELS["sharp"], method="exact").log_evidence
    guide = mini.Guide(MINI["sharp"])

    def measure():
        log_q, u = law(exact, program, guide)
        distance = 0.5 * float((log_q.exp() - exact.weights).abs().sum())
        return (
            distance,
            log_z - float((log_q.exp() * u).sum()),
            1 / float((exact.weights**2 / log_q.exp()).sum()),
        )

    tv, gap_, ess = measure()
    assert tv > 0.3 and gap_ > 0.2 and ess < 0.5
    torch.manual_seed(0)
    guide.fit(program, [()], 60)
    tv_after, gap_after, ess_after = measure()
    assert tv_after < tv / 4 and 0 < gap_after < gap_ / 10 and ess_after > 0.8
    torch.manual_seed(0)
    found, prior = (mini.importance(program, (), 200, proposal) for proposal in (guide, None))
    assert abs(found.log_evidence - log_z) < 0.15 and found.ess > 1.5 * prior.ess
    assert mini.smc(program, (), 200, guide).log_evidence == pytest.approx(log_z, abs=0.15)


# --- the file --------------------------------------------------------------------------------------


def test_it_stands_alone_and_is_short():
    text = SOURCE.read_text()
    assert len(text.splitlines()) <= 350
    nodes = list(ast.walk(ast.parse(text)))
    imported = [
        alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
    ]
    imported += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    rooms = {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert rooms == {"torch", "transformers", "peft", "tokenizers"}  # the last is of transformers
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    keywords = {node.arg for node in nodes if isinstance(node, ast.keyword)}
    assert not names & {"eval", "exec", "pickle", "__import__"} and "pickle" not in imported
    assert "trust_remote_code" not in keywords


def test_mistakes_are_errors():
    lm = MINI["plain"]
    with pytest.raises(ValueError, match="'z' is latent: say max_tokens"):
        mini.lm_sample("z", "a", lm=lm, stop=".")
    with pytest.raises(ValueError, match="closes before its end, at token 2"):
        mini.lm_sample("y", "a", lm=lm, max_tokens=4, stop=".", obs="a.b")

    def twice():
        for _ in range(2):
            mini.factor("once", 0.0)

    with pytest.raises(ValueError, match="two sites are named 'once'"):
        mini.run(twice, ())
    assert mini.STACK == []


@pytest.mark.slow
def test_the_demo_and_a_model_in_a_folder(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["mini_lmppl.py"])
    mini.main()
    lines = capsys.readouterr().out.splitlines()
    figures = [float(line.split(" nats")[0].split()[-1]) for line in lines]
    assert len(lines) == 5 and figures == pytest.approx([figures[0]] * 5, abs=0.8)
    lm = tiny_lm(string.ascii_letters + " .", seed=0)
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mini_lmppl.py", "--model", str(tmp_path)])
    mini.main()
    assert len(capsys.readouterr().out.splitlines()) == 4
