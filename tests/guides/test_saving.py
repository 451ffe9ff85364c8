"""Guides on disk."""

import json
import os

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_helpers import draw_samples, equal, shaken, weights
from peft import LoraConfig, PeftModel

import lmppl
from lmppl import lm_sample
from lmppl.testing import guide_log_probs, tiny_lm
from lmppl.testing.programs import CASES

CHAIN, BETA = CASES["chain"], CASES["beta and text"]


@pytest.fixture(autouse=True)
def fresh_store():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def log_q(guide, case):
    """Of some traces."""
    traces = list(case.enumerate())[::7]
    return guide_log_probs(guide, case.program, case.args, traces, case.lm)


@pytest.mark.parametrize("case", [CHAIN, BETA], ids=str)
def test_a_loaded_guide_is_the_saved_one(case, tmp_path):
    guide = lmppl.LMGuide(case.program, lm=case.lm, condition_on=_observed(case))
    guide.fit([case.args], steps=2, seed=0, batch_size=8)
    shaken(guide)
    guide.save(tmp_path / "folder" / "guide")
    assert sorted(os.listdir(tmp_path / "folder")) == ["guide"]  # nothing temporary is left
    loaded = lmppl.LMGuide.load(tmp_path / "folder" / "guide", case.program, lm=case.lm)
    assert torch.equal(log_q(loaded, case), log_q(guide, case))
    assert loaded.history == guide.history and len(loaded.history) == 2
    assert set(loaded.condition_on) == set(guide.condition_on)
    draws = [draw_samples(each, case.program, case.args, 4) for each in (guide, loaded)]
    assert [s.key for s in draws[0]] == [s.key for s in draws[1]]


def _observed(case):
    return ["y"] if case is CHAIN else "all"


def test_training_goes_on_after_loading(tmp_path):
    guide = lmppl.LMGuide(CHAIN.program, lm=CHAIN.lm)
    guide.fit([CHAIN.args], steps=2, seed=0, batch_size=8).save(tmp_path / "guide")
    loaded = lmppl.LMGuide.load(tmp_path / "guide", CHAIN.program, lm=CHAIN.lm)
    for each in (guide, loaded):
        each.fit([CHAIN.args], steps=3, seed=1, batch_size=8)
    assert torch.equal(log_q(guide, CHAIN), log_q(loaded, CHAIN))
    assert [figures["step"] for figures in loaded.history] == [0, 1, 2, 3, 4]


def test_a_tempered_target_is_remembered(tmp_path):
    guide = lmppl.LMGuide(CHAIN.program, lm=CHAIN.lm)
    guide.fit([CHAIN.args], steps=1, seed=0, batch_size=8, reward_temperature=(2.0, 1.5))
    guide.save(tmp_path / "guide")
    loaded = lmppl.LMGuide.load(tmp_path / "guide", CHAIN.program, lm=CHAIN.lm)
    assert loaded.tempered_target == 1.5


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21's own
def test_the_adapter_is_a_standard_one(tmp_path):
    guide = shaken(lmppl.LMGuide(CHAIN.program, lm=CHAIN.lm, lora=LoraConfig(r=3, lora_alpha=5)))
    guide.save(tmp_path / "guide")
    base = tiny_lm("ab.", seed=0).model
    assert {file.name for file in (tmp_path / "guide" / "adapter-0").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    adapted = PeftModel.from_pretrained(base, tmp_path / "guide" / "adapter-0").eval()
    assert adapted.peft_config["default"].r == 3
    tokens = torch.tensor([[0, 1, 2, 1]])
    expected = guide.inner.adapter_for("z").model(input_ids=tokens).logits
    torch.testing.assert_close(adapted(input_ids=tokens).logits, expected)
    loaded = lmppl.LMGuide.load(tmp_path / "guide", CHAIN.program, lm=CHAIN.lm)
    assert torch.equal(log_q(loaded, CHAIN), log_q(guide, CHAIN))


def test_saving_replaces_a_guide_and_nothing_else(tmp_path):
    guide = lmppl.LMGuide(CHAIN.program, lm=CHAIN.lm)
    guide.save(tmp_path / "guide")
    shaken(guide)
    guide.save(str(tmp_path / "guide"))
    assert os.listdir(tmp_path) == ["guide"]
    loaded = lmppl.LMGuide.load(tmp_path / "guide", CHAIN.program, lm=CHAIN.lm)
    assert torch.equal(log_q(loaded, CHAIN), log_q(guide, CHAIN))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="thesis exists and is no guide"):
        guide.save(tmp_path / "thesis")
    (tmp_path / "file").write_text("also work")
    with pytest.raises(FileExistsError, match="file exists and is no guide"):
        guide.save(tmp_path / "file")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_an_interrupted_save_leaves_the_old_guide(tmp_path, monkeypatch):
    guide = lmppl.LMGuide(CHAIN.program, lm=CHAIN.lm)
    guide.save(tmp_path / "guide")
    before = log_q(guide, CHAIN)
    shaken(guide)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lmppl.guides.saving.save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        guide.save(tmp_path / "guide")
    with pytest.raises(KeyboardInterrupt):
        guide.save(tmp_path / "new")
    assert os.listdir(tmp_path) == ["guide"]
    loaded = lmppl.LMGuide.load(tmp_path / "guide", CHAIN.program, lm=CHAIN.lm)
    assert torch.equal(log_q(loaded, CHAIN), before)


def test_what_cannot_be_loaded(tmp_path):
    guide = lmppl.LMGuide(CHAIN.program, lm=CHAIN.lm)
    path = tmp_path / "guide"
    guide.save(path)
    with pytest.raises(FileNotFoundError, match="nowhere is no guide"):
        lmppl.LMGuide.load(tmp_path / "nowhere", CHAIN.program, lm=CHAIN.lm)
    with pytest.raises(
        ValueError, match="trained on the base model 'tiny-ab.-0', given 'tiny-ab.-1"
    ):
        lmppl.LMGuide.load(path, CHAIN.program, lm=tiny_lm("ab.", seed=1))
    with pytest.raises(ValueError, match="whose weights or tokens are others"):
        lmppl.LMGuide.load(path, CHAIN.program, lm=tiny_lm("ba.", seed=0))
    with pytest.raises(ValueError, match="kind 'automatic': leave out program="):
        lmppl.LMGuide.load(path, CHAIN.program, lm=CHAIN.lm, program=CHAIN.program)
    lmppl.LMGuide.load(path, CHAIN.program, lm=tiny_lm("ab.", seed=0))  # an equal base is that base
    description = json.loads((path / "guide.json").read_text())
    (path / "guide.json").write_text(json.dumps(description | {"format": 99}))
    with pytest.raises(ValueError, match="has format 99; this version of lmppl reads 5"):
        lmppl.LMGuide.load(path, CHAIN.program, lm=CHAIN.lm)


# --- guide programs ------------------------------------------------------------------------------


def model(x, y):
    k = pyro.sample("k", dist.Bernoulli(0.4))
    z = lm_sample("z", x if k else "b", max_tokens=2)
    lm_sample("y", [x, z], obs=y)


def guide_program(q):
    def program(x, y):
        p = pyro.param("p", torch.tensor(0.3), constraint=dist.constraints.unit_interval)
        pyro.sample("k", dist.Bernoulli(p))
        lm_sample("z", [y, x], max_tokens=2, lm=q)

    return program


def test_a_loaded_guide_program_is_the_saved_one(tmp_path):
    lm, args = CHAIN.lm, ("ab", "ba")
    guide = lmppl.LMGuide(model, lm=lm, program=guide_program(lm.adapter()))
    guide.fit([args], steps=3, seed=0, batch_size=8, learning_rate=0.05)
    p = pyro.param("p").item()
    expected = [
        {name: float(s[0]) for name, s in score.items()}
        for score in guide.score(
            [sample.proposer for sample in draw_samples(guide, model, args, 6)], grad=False
        )
    ]
    guide.save(tmp_path / "guide")
    pyro.clear_param_store()  # another process
    loaded = lmppl.LMGuide.load(
        tmp_path / "guide", model, lm=lm, program=guide_program(lm.adapter())
    )
    samples = draw_samples(loaded, model, args, 6)
    found = [
        {name: float(s[0]) for name, s in score.items()}
        for score in loaded.score([sample.proposer for sample in samples], grad=False)
    ]
    assert found == expected
    assert pyro.param("p").item() == pytest.approx(p) and p != pytest.approx(0.3, abs=1e-3)
    with pytest.raises(ValueError, match="holds a guide of kind 'program': give program="):
        lmppl.LMGuide.load(tmp_path / "guide", model, lm=lm)


def test_a_loaded_guide_program_can_be_saved_again_before_it_is_run(tmp_path):
    lm, args = CHAIN.lm, ("ab", "ba")
    guide = lmppl.LMGuide(model, lm=lm, program=guide_program(lm.adapter()))
    guide.fit([args], steps=1, seed=0, batch_size=8).save(tmp_path / "one")
    expected = weights(guide)
    loaded = lmppl.LMGuide.load(tmp_path / "one", model, lm=lm, program=guide_program(lm.adapter()))
    loaded.save(tmp_path / "two")
    pyro.clear_param_store()
    again = lmppl.LMGuide.load(tmp_path / "two", model, lm=lm, program=guide_program(lm.adapter()))
    draw_samples(again, model, args, 1)
    assert equal(weights(again), expected)
    new = lmppl.LMGuide(model, lm=lm, program=guide_program(lm.adapter()))
    with pytest.raises(ValueError, match="has not been run"):
        new.save(tmp_path / "three")


def test_another_guide_program(tmp_path):
    lm, args = CHAIN.lm, ("ab", "ba")
    guide = lmppl.LMGuide(model, lm=lm, program=guide_program(lm.adapter()))
    guide.fit([args], steps=1, seed=0, batch_size=8).save(tmp_path / "guide")
    q = lm.adapter()

    def other(x, y):
        lm_sample("z", [y, x], max_tokens=2, lm=q)

    loaded = lmppl.LMGuide.load(tmp_path / "guide", model, lm=lm, program=other)
    for _ in range(2):  # it is not forgotten that it could not be restored
        with pytest.raises(
            ValueError, match=r"had 1 adapters and the parameters \['p'\], this one has"
        ):
            draw_samples(loaded, model, args, 1)


def test_a_guide_with_an_adapter_each_is_saved_before_it_is_used(tmp_path):
    case = CASES["chain"]
    lmppl.LMGuide(case.program, lm=case.lm, adapter_per_site=True).save(tmp_path / "guide")
    loaded = lmppl.LMGuide.load(tmp_path / "guide", case.program, lm=case.lm)
    assert loaded.inner.adapter_per_site and loaded.adapters() == []
