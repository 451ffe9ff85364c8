"""Posteriors on disk: what is read is what was written, or is refused by name."""

from __future__ import annotations

import functools
import json
import math
from collections import Counter

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from weighted_traces import posterior_of, trace_of

import lmppl
from lmppl import Posterior, Text, ZeroEvidenceError, lm_sample, require
from lmppl.posterior.plain import Unsaved
from lmppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=0)
LM.model.requires_grad_(False)
OTHER = tiny_lm("ab.c", seed=0)


class Opaque:
    def __repr__(self) -> str:
        return "<opaque>"


def program(x, y="b", *, size=2):
    """Every kind of site, with a branch."""
    kind = lm_sample("kind", x, choices=["a", "bb"])
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    k = pyro.sample("k", dist.Poisson(1.0))
    coin = pyro.sample("coin", dist.Bernoulli(0.5))
    if coin > 0.5:
        z = lm_sample("z", [x, kind], max_tokens=size, stop=".")
        seen = lmppl.tool("seen", lambda text: {"length": len(text), "text": text}, z)
        vector = pyro.sample("vector", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.deterministic("norm", vector.norm())
        lm_sample("y", ["a", z], obs=y)
    else:
        seen = None
        lm_sample("y", ["a", kind], obs=y)
        require("small", bool(k < 2))
    with pyro.plate("data", 2), poutine.scale(scale=0.5):
        pyro.sample("data_", dist.Normal(theta, 1.0), obs=torch.tensor([0.5, 1.0]))
    pyro.factor("f", 0.1 * coin)
    return {"kind": kind, "seen": seen, "both": [kind + "!", theta], ("k", 1): float(k)}


@functools.cache
def inferred(method="importance") -> Posterior:
    return lmppl.infer(program, "ab", lm=LM, method=method, num_samples=40, seed=0)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "posterior"


def assert_same(one, other, *, texts=True):
    """All that a posterior says without its program."""
    assert torch.equal(one.log_weights, other.log_weights)
    assert one.sites == other.sites and one.latents == other.latents
    for name in one.sites:
        for a, b in zip(one[name], other[name], strict=True):
            assert torch.equal(a, b) if torch.is_tensor(a) else a == b
            if texts and isinstance(a, Text):
                assert (a.token_ids, a.body, a.parts, a.finish_reason, a.stop) == (
                    b.token_ids, b.body, b.parts, b.finish_reason, b.stop)  # fmt: skip
    assert repr(one) == repr(other)
    assert one.summary(joint=True) == other.summary(joint=True)
    assert repr(one.returns) == repr(other.returns) or not texts
    for a, b in zip(one.traces, other.traces, strict=True):
        for name, node in a.nodes.items():
            if node["type"] != "sample" or name == "data":
                continue
            assert node["is_observed"] == b.nodes[name]["is_observed"]
            for key in ("unscaled_log_prob", "log_prob", "log_prob_sum", "proposal_log_prob"):
                known = node.get(key)
                assert (known is None) == (b.nodes[name].get(key) is None), (name, key)
                if known is not None:
                    assert torch.allclose(known, b.nodes[name][key], atol=1e-6), (name, key)
        assert float(a.log_prob_sum()) == pytest.approx(float(b.log_prob_sum()), abs=1e-5)


@pytest.mark.parametrize("method", ["importance", "smc"])
def test_what_is_read_is_what_was_written(method, folder):
    posterior = inferred(method)
    assert any(weight == 0 for _, weight in posterior) and None in posterior["z"]
    posterior.save(folder)
    bare = Posterior.load(folder)
    assert_same(posterior, bare, texts=False)
    assert not isinstance(bare["kind"][0], Text) and bare.returns[0]["kind"] == posterior["kind"][0]
    with_tokens = Posterior.load(folder, lm=LM)
    assert_same(posterior, with_tokens)
    assert isinstance(with_tokens["kind"][0], Text)
    assert isinstance(with_tokens.returns[0]["both"][0], Text)
    whole = Posterior.load(folder, program, "ab", lm=LM)
    assert_same(posterior, whole)
    for loaded in (bare, with_tokens, whole):
        assert loaded.log_evidence == posterior.log_evidence and loaded.ess == posterior.ess
        assert loaded.log_evidence_stderr == posterior.log_evidence_stderr
        assert loaded.probs("kind") == posterior.probs("kind")
        assert loaded.probs(lambda v: v["k"].item()) == posterior.probs(lambda v: v["k"].item())
        assert torch.equal(loaded.quantile("theta", 0.3), posterior.quantile("theta", 0.3))
        assert torch.equal(loaded.mean("theta"), posterior.mean("theta"))
        one, other = (p.resample(9, seed=1).to_dataframe(returns=True) for p in (loaded, posterior))
        assert repr(one.drop(columns="returned")) == repr(other.drop(columns="returned"))
        assert dict(loaded.info) == {**posterior.info, "killed": dict(posterior.info["killed"])}
        assert loaded.guide is None and loaded.profile is None
    # A posterior that was loaded is saved as it was.
    with_tokens.save(folder.with_name("again"))
    assert_same(posterior, Posterior.load(folder.with_name("again"), lm=LM))


def test_traces_come_back_whole_with_their_program(folder, monkeypatch):
    posterior = inferred()
    posterior.save(folder)
    asked = []
    for name in ("draw", "score"):
        method = getattr(LM, name)
        monkeypatch.setattr(LM, name, lambda *a, m=method, **k: asked.append(a) or m(*a, **k))
    whole = Posterior.load(folder, program, "ab", lm=LM)
    assert not asked, "all is known"
    for (trace, weight), before in zip(whole, posterior.traces, strict=True):
        if weight > 0:
            assert trace.nodes["kind"]["fn"].same_as(before.nodes["kind"]["fn"])
            assert trace.nodes["_RETURN"]["value"]["kind"] == before.nodes["kind"]["fn"].text(
                before.nodes["kind"]["value"]
            )
            with lmppl.use(LM):  # Pyro's own handlers run on them
                run = poutine.trace(poutine.replay(lambda: program("ab"), trace)).get_trace()
            assert float(run.log_prob_sum()) == pytest.approx(float(trace.log_prob_sum()), abs=1e-4)
    with pytest.raises(TypeError, match="site 'theta' was loaded without its program.*load"):
        Posterior.load(folder).traces[0].nodes["theta"]["fn"].log_prob(torch.tensor(0.0))


def small(x, y):
    z = lm_sample("z", x, max_tokens=2, stop=".")
    k = pyro.sample("k", dist.Bernoulli(0.5))
    lm_sample("y", [x, z], temperature=1.0 + float(k), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize("given", [(), (small, "ab", "b")], ids=["values", "traces"])
def test_what_is_loaded_can_be_gone_on_from(given, folder):
    exact = lmppl.infer(small, "ab", "b", lm=LM, method="exact")
    exact.save(folder)
    loaded = Posterior.load(folder, *given, lm=LM)
    options = {"lm": LM, "num_samples": 12, "seed": 0}
    one, other = (
        lmppl.infer(small, "ab", "b", method="mcmc", initial=initial, num_chains=3, **options)
        for initial in (exact, loaded)
    )
    assert [str(z) for z in one["z"]] == [str(z) for z in other["z"]]
    assert torch.equal(one.log_weights, other.log_weights)
    assert_same(one, saved_again(one, folder.with_name("chains")))
    assert one.to_arviz()["posterior"]["z"].shape == (3, 4)
    found = [lmppl.diagnose(small, "ab", "b", posterior=p, **options) for p in (exact, loaded)]
    assert found[0].eubo == found[1].eubo and found[0].kl_posterior_guide[0] > 0
    guides = [lmppl.LMGuide(small, lm=LM) for _ in range(2)]
    for guide, p in zip(guides, (exact, loaded), strict=True):
        guide.fit([("ab", "b")], steps=1, batch_size=4, seed=0, demonstrations=[p], progress=False)
    losses = [guide.history[-1]["loss"] for guide in guides]
    assert losses[0] == losses[1]


def saved_again(posterior, folder):
    posterior.save(folder)
    return Posterior.load(folder, lm=LM)


def test_traces_that_stand_in_several_places_are_one(folder):
    draws = inferred().resample(200, seed=0)
    draws.save(folder)
    loaded = Posterior.load(folder, lm=LM)
    assert_same(draws, loaded)
    assert len(set(map(id, loaded.traces))) == len(set(map(id, draws.traces))) < 40
    whole = Posterior.load(folder, program, "ab", lm=LM)
    assert len(set(map(id, whole.traces))) == len(set(map(id, draws.traces)))


def changed(x, y="b", *, size=2):
    return poutine.condition(program, data={"theta": torch.tensor(0.0)})(x, y, size=size)


def other_data(x):
    return poutine.condition(program, data={"data_": torch.tensor([0.5, 1.1])})(x)


def renamed(x, y="b"):
    lm_sample("kind", x, choices=["a", "bb"])
    lm_sample("w", x, max_tokens=1)


def fewer(x):
    lm_sample("kind", x, choices=["a", "bb"])


@pytest.mark.parametrize(
    ("model", "args", "kwargs", "message"),
    [
        (program, ("ba",), None, "program program, .*another distribution.* at site 'kind'"),
        (program, ("ab", "a"), None, "at site 'y'"),
        (program, ("ab",), {"size": 3}, r"site 'z': a value has shape \(3,\)"),
        (changed, ("ab",), None, "at site 'theta'"),
        (other_data, ("ab",), None, "at site 'data_'"),
        (renamed, ("ab",), None, "comes to site 'w', which the saved trace has not"),
        (fewer, ("ab",), None, "site 'theta', which is in the saved trace but not in its run"),
    ],
)
def test_another_program_or_input_is_refused_by_the_site(model, args, kwargs, message, folder):
    inferred().save(folder)
    with pytest.raises(ValueError, match=message) as found:
        Posterior.load(folder, model, *args, lm=LM, kwargs=kwargs)
    said = str(found.value) + "".join(getattr(found.value, "__notes__", []))
    assert "load the posterior with the program and arguments that it was made with" in said


def test_arguments_by_name(folder):
    inferred().save(folder)
    assert_same(inferred(), Posterior.load(folder, program, {"x": "ab"}, lm=LM))
    assert_same(inferred(), Posterior.load(folder, program, lm=LM, kwargs={"x": "ab", "size": 2}))
    with pytest.raises(TypeError, match="arguments need the program"):
        Posterior.load(folder, kwargs={"x": "ab"})
    with pytest.raises(TypeError, match="was given 2 positional arguments.*'w'"):
        Posterior.load(folder, program, "ab", "b", lm=LM, kwargs={"w": 1})


def test_another_tokenizer_is_refused(folder):
    inferred().save(folder)
    with pytest.raises(ValueError, match=r"another tokenizer \(\w{8}\) than lm=.*\(\w{8}\): give"):
        Posterior.load(folder, lm=OTHER)
    assert_same(inferred(), Posterior.load(folder, lm=[OTHER, LM]))
    with pytest.raises(TypeError, match="Posterior.load: lm takes a lmppl.LM"):
        Posterior.load(folder, lm="ab")
    with pytest.raises(TypeError, match="given int"):
        Posterior.load(folder, lm=[3])


def constrained(regex="a[ab]*", constrain="global"):
    return lm_sample("z", "ab", max_tokens=3, regex=regex, constrain=constrain)


@pytest.mark.parametrize("constrain", ["global", "local"])
def test_constrained_texts(constrain, folder):
    options = {"lm": LM, "kwargs": {"constrain": constrain}}
    posterior = lmppl.infer(constrained, method="importance", num_samples=10, seed=0, **options)
    posterior.save(folder)
    assert_same(posterior, Posterior.load(folder, constrained, **options))
    other = {"constrain": "local" if constrain == "global" else "global"}
    for changed in (other, {"regex": "a[ab]+", "constrain": constrain}):
        with pytest.raises(ValueError, match="another distribution.*at site 'z'"):
            Posterior.load(folder, constrained, lm=LM, kwargs=changed)


def test_texts_of_two_models(folder):
    def two(x):
        z = lm_sample("z", x, max_tokens=2, lm=LM)
        w = lm_sample("w", str(z), max_tokens=2, lm=OTHER)
        return z, w

    posterior = lmppl.infer(two, "ab", method="importance", num_samples=5, seed=0)
    posterior.save(folder)
    assert_same(posterior, Posterior.load(folder, lm=[LM, OTHER]))
    assert_same(posterior, Posterior.load(folder, two, "ab", lm=[LM, OTHER]))
    with pytest.raises(ValueError, match="another tokenizer"):
        Posterior.load(folder, lm=LM)


# --- what is not plain ---


def test_other_values_are_kept_as_they_print(folder):
    def with_objects():
        z = lm_sample("z", "ab", max_tokens=1)
        found = lmppl.tool("found", lambda text: Opaque(), z)
        return [found]

    posterior = lmppl.infer(with_objects, lm=LM, method="importance", num_samples=5, seed=0)
    posterior.info["engine options"] = Opaque()
    posterior.save(folder)
    loaded = Posterior.load(folder, lm=LM)
    assert loaded["found"] == [Unsaved("<opaque>")] * 5 and repr(loaded.returns[0]) == "[<opaque>]"
    assert loaded.probs("found") == {Unsaved("<opaque>"): pytest.approx(1.0)}
    assert "engine options" not in loaded.info
    assert "info had entries that are not saved: engine options" in loaded.info["notes"]
    assert "<opaque>" in repr(loaded) and posterior.info["notes"] == []
    with pytest.raises(ValueError, match="tool 'found' returned what could not be saved"):
        Posterior.load(folder, with_objects, lm=LM)


class Name(str):
    pass


VALUES = [
    None, True, 3, -0.5, math.inf, "\ud800 \x00 \u202e", (1, ("a", [])), [[{}]], {1, 2},
    frozenset("a"), {"$tensor": 1, ("a", 2): [None]}, torch.tensor([True, False]),
    torch.zeros(0, 3), torch.tensor(2, dtype=torch.bfloat16), {"kind": {"text": ["text", "x"]}},
    Opaque(), Name("n"), Counter("aab"), 1j, {"a": Opaque()},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_come_back_as_they_were_or_as_they_print(value, folder):
    Posterior([trace_of(z="a")], torch.zeros(1), [value], info={"value": value}).save(folder)
    loaded = Posterior.load(folder)
    (found,) = loaded.returns
    if isinstance(found, Unsaved):
        assert type(value) in (Opaque, Name, Counter, complex, dict) and repr(found) == repr(value)
        assert type(value) is Counter or "value" not in loaded.info
        return
    assert type(found) is type(value) and repr(found) == repr(value)
    if torch.is_tensor(value):
        assert found.dtype == value.dtype and found.shape == value.shape
    assert repr(loaded.info["value"]) == repr(value)


def test_a_rejected_tool_says_why(folder):
    def fails(text):
        if text.endswith("1"):
            raise ValueError("no 1")
        return text

    def checked():
        z = lm_sample("z", "ab", max_tokens=1)
        coin = pyro.sample("coin", dist.Bernoulli(0.5))
        lmppl.tool("check", fails, f"{z}{int(coin)}", on_error="reject")

    posterior = lmppl.infer(checked, lm=LM, method="importance", num_samples=20, seed=0)
    posterior.save(folder)
    loaded = Posterior.load(folder, checked, lm=LM)
    assert_same(posterior, loaded)
    errors = {
        repr(trace.nodes["check"]["value"].error)
        for trace, weight in loaded
        if weight == 0 and "check" in trace.nodes
    }
    assert errors == {"RuntimeError('ValueError: no 1')"} and loaded.killed == posterior.killed


def test_posteriors_of_chains_of_pyros_traces_and_of_dead_samples(folder):
    info = {"engine": "mcmc", "ess": 3.5, "chain": [(0, 0), (0, 1)], "reasons": {"y": "no"}}
    posterior = posterior_of(["a", "b"], [1.0, 1.0], info=info, claims_evidence=False)
    posterior.save(folder)
    loaded = Posterior.load(folder)
    assert loaded.log_evidence is None and loaded.ess == 3.5 and loaded["z"] == ["a", "b"]
    assert loaded.info == posterior.info and loaded.to_dataframe()["draw"].tolist() == [0, 1]

    def model():
        return pyro.sample("x", dist.Normal(0.0, 1.0)) + pyro.sample("n", dist.Poisson(2.0))

    traces = [poutine.trace(model).get_trace() for _ in range(3)]
    bare = Posterior(traces, torch.zeros(3), [t.nodes["_RETURN"]["value"] for t in traces])
    bare.save(folder, overwrite=True)
    loaded = Posterior.load(folder)
    assert loaded["x"] == bare["x"] and list(loaded.summary()["numeric"]) == ["x"]
    assert Posterior.load(folder, model)["n"] == bare["n"]

    dead = posterior_of(["a", "b"], [0.0, 0.0], info={"killed": {"y": 2}})
    dead.save(folder, overwrite=True)
    with pytest.raises(ZeroEvidenceError, match=r"'y' \(2\)"):
        Posterior.load(folder).probs("z")


# --- files ---


def test_nothing_is_overwritten_unasked(folder):
    one, two = posterior_of(["a"], [1.0]), posterior_of(["b"], [1.0])
    one.save(folder)
    with pytest.raises(FileExistsError, match="overwrite=True replaces it"):
        two.save(str(folder))
    assert Posterior.load(str(folder))["z"] == ["a"]
    two.save(folder, overwrite=True)
    assert Posterior.load(folder)["z"] == ["b"]
    assert [file.name for file in folder.parent.iterdir()] == ["posterior"]
    folder.with_name("other").mkdir()
    with pytest.raises(FileExistsError, match="exists and is no posterior"):
        one.save(folder.with_name("other"), overwrite=True)
    with pytest.raises(TypeError, match="overwrite=1"):
        one.save(folder, overwrite=1)


def test_a_save_that_fails_leaves_what_was_there(folder, monkeypatch):
    posterior_of(["a"], [1.0]).save(folder)

    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("lmppl.states.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        posterior_of(["b"], [1.0]).save(folder, overwrite=True)
    assert Posterior.load(folder)["z"] == ["a"]
    assert [file.name for file in folder.parent.iterdir()] == ["posterior"]


def test_what_is_no_posterior_is_refused_by_name(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no posterior at .*nowhere"):
        Posterior.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is no posterior: it has no posterior.json"):
        Posterior.load(tmp_path)
    posterior_of(["a"], [1.0]).save(folder)
    file = folder / "posterior.json"
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="posterior.json was damaged or edited"):
        Posterior.load(folder)
    file.write_text(json.dumps(json.loads(whole) | {"format": 99}))
    with pytest.raises(
        ValueError, match="has format 99; this version of lmppl reads 1: save it anew"
    ):
        Posterior.load(folder)
    file.write_text(whole)
    tensors = folder / "posterior.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-3])
    with pytest.raises(ValueError, match="posterior.safetensors was damaged or edited"):
        Posterior.load(folder)
    tensors.unlink()
    with pytest.raises(ValueError, match="posterior.safetensors is missing"):
        Posterior.load(folder)
