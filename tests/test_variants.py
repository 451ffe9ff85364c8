"""The benchmark of trainings with other options, on a tiny model."""

from __future__ import annotations

import argparse
import json

import pytest

import arithmetic
import continuation
import infilling
import lmppl
from benchmarks import variants
from lmppl import lm_sample
from lmppl.testing import tiny_lm
from paper.inputs import lines_of

LM = tiny_lm("ab.", seed=0)
QUICK = ["continuation", "--samples", "16", "--validate", "1"]


def infill(x, y):
    z = lm_sample("z", x, max_tokens=2, stop=".")
    lm_sample("y", [x, z], obs=y)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    case = variants.Case(infill, [("ab.", "a"), ("ab.", "bb"), ("ba", "b.")])
    monkeypatch.setitem(variants.CASES, "continuation", lambda: case)
    monkeypatch.setattr(lmppl.LM, "from_pretrained", lambda name: LM)


@pytest.fixture
def trained(monkeypatch):
    """Of each training, its guide, its inputs and options."""
    seen = []
    fit = lmppl.LMGuide.fit
    monkeypatch.setattr(
        lmppl.LMGuide,
        "fit",
        lambda guide, data, steps, **options: (
            seen.append((guide, data, {"steps": steps, **options}))
            or fit(guide, data, steps, **options)
        ),
    )
    return seen


def test_rows_are_added_and_the_last_inputs_are_not_trained_on(tmp_path, trained, capsys):
    out = tmp_path / "rows.json"
    for _ in range(2):  # the same again takes the place of what was there
        variants.main([*QUICK, "--steps", "0", "--out", str(out)])
    variants.main([*QUICK, "--steps", "2", "--set", "forward=3", "loss=vargrad", "--out", str(out)])
    rows = [variants.Variant(**row) for row in json.loads(out.read_text())]
    assert [row.label for row in rows] == ["prior", "untrained guide", "forward=3, loss=vargrad"]
    ((_, data, options),) = trained
    assert data == [("ab.", "a"), ("ab.", "bb")] and options["forward"] == 3
    assert rows[0].tokens == 0 < rows[2].tokens
    assert all(0 < row.least_ess <= row.ess <= 1 for row in rows)
    assert rows[0].mean_u != rows[2].mean_u  # the trained guide is what was judged
    assert "| continuation | forward=3, loss=vargrad | 2 |" in capsys.readouterr().out


def test_an_adapter_has_other_options(trained, capsys):
    variants.main([*QUICK, "--steps", "1", "--lora", "r=2", 'target_modules=["q_proj"]'])
    ((guide, *_),) = trained
    lora = guide.state_dict()["guide"]["lora"]
    assert (lora["r"], lora["target_modules"]) == (2, ["q_proj"])
    assert "| lora(r=2, target_modules=['q_proj']) | 1 |" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["importance", "smc", "mcmc"])
def test_a_training_begins_from_posteriors_whose_tokens_count(method, trained, tmp_path):
    out = tmp_path / "rows.json"
    variants.main([*QUICK, "--steps", "1", "--out", str(out)])
    given = ["--demonstrations", method, "--demonstrated", "8"]
    variants.main([*QUICK, "--steps", "1", *given, "--out", str(out)])
    plain, begun = (variants.Variant(**row) for row in json.loads(out.read_text()))
    assert begun.label == f"demonstrations={method}(8)" and begun.tokens > plain.tokens
    _, data, options = trained[1]
    posteriors = options["demonstrations"]
    assert len(posteriors) == len(data) == 2
    assert [p.info["engine"] for p in posteriors] == [method] * 2


def test_it_may_end_by_maximum_likelihood_on_what_the_guide_found(trained, capsys):
    variants.main([*QUICK, "--steps", "2", "--distil", "3", "--demonstrated", "8"])
    (guide, _, first), (same, _, last) = trained
    assert guide is same and "loss" not in first
    assert (last["steps"], last["loss"]) == (3, "sft")
    assert all(p.info["engine"] == "gflownet" for p in last["demonstrations"])
    assert "| then 3 of sft |" in capsys.readouterr().out


def test_an_option_has_a_value():
    assert variants.option("forward=3") == ("forward", 3)
    assert variants.option("loss=wake") == ("loss", "wake")
    with pytest.raises(argparse.ArgumentTypeError, match="'forward': give an option and its value"):
        variants.option("forward")


def test_held_out_inputs_are_left_alone():
    """Those on which the tasks report their results."""
    prompts = lines_of(continuation.OPENINGS)
    assert [prompt for prompt, *_ in variants.of_continuation().inputs] == prompts[:-12]
    stories = infilling.stories_of(infilling.STORIES)
    assert [args[0] for args in variants.of_infilling().inputs] == [
        story.beginning for story in stories[:-12]
    ]
    mentions = infilling.stories_of(infilling.STORIES.with_name("mentions.tsv"))
    assert [args[:2] for args in variants.of_mentions().inputs] == [
        (story.beginning, story.ending) for story in mentions[:-12]
    ]
    _, test = arithmetic.split(100, 20)
    held_out = {problem for problems in test.values() for problem in problems}
    assert held_out.isdisjoint(problem for problem, _ in variants.of_arithmetic().inputs)
