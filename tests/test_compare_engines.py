"""The comparison of engines, on a tiny model with a truth that is known."""

from __future__ import annotations

import json
import math
from collections import namedtuple
from dataclasses import replace

import pytest

import lmppl
import random_number
from benchmarks import compare_engines
from benchmarks.compare_engines import Point, Truth
from benchmarks.results import FOLDER
from lmppl.testing import tiny_lm

LM = tiny_lm("0123456789.", seed=3, contrast=1.0)
OPTIONS = ["--sizes", "16", "--seeds", "3", "--steps", "4"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(lmppl.LM, "from_pretrained", lambda name: LM)
    monkeypatch.setattr(random_number, "PROMPT", "0.{most}.")
    ten = replace(
        compare_engines.of_random_number(),
        training=[(9,)],
        held_out=[(9,)],
        number=lambda values: int(str(values["z"])[:-1]),
        truth=Truth(math.log(10), 4.5),
        fit={"batch_size": 8},
    )
    monkeypatch.setitem(compare_engines.COMPARISONS, "random_number", lambda: ten)


def test_every_engine_has_a_point_and_a_run_goes_on(tmp_path, monkeypatch, capsys):
    out, picture = tmp_path / "points.json", tmp_path / "engines.svg"
    compare_engines.main([*OPTIONS, "--out", str(out), "--plot", str(picture)])
    points = [Point(**row) for row in json.loads(out.read_text())]
    found = {point.engine: point for point in points}
    assert list(found) == ["importance", "SMC", "MCMC", "guide", "SMC with guide"]
    assert found["MCMC"].log_z_error is None and found["importance"].log_z_error < 2.0
    assert found["guide"].training_tokens > 100 and found["importance"].training_tokens == 0
    assert all(point.tokens > 0 and point.runs == 3 for point in points)
    assert found["MCMC"].z_spread is None and 0 < found["importance"].z_spread < 2
    assert "trained for 100" in picture.read_text()

    assert capsys.readouterr().out.count("| MCMC | 16 |") == 1
    before = out.read_text()
    monkeypatch.setattr(lmppl, "infer", None)
    compare_engines.main([*OPTIONS, "--out", str(out)])
    assert out.read_text() == before


def test_the_results_of_the_docs_are_read():
    rows = json.loads((FOLDER / "engines.json").read_text())
    assert "| guide |" in compare_engines.table([Point(**row) for row in rows])


def test_an_exact_engine_has_no_error(monkeypatch):
    comparison = compare_engines.COMPARISONS["random_number"]()
    exact = {"exact": {"method": "exact"}}
    monkeypatch.setattr(compare_engines, "engines", lambda comparison, num_samples: exact)
    figures = compare_engines.measure(
        comparison, [Truth(math.log(10), 4.5)], LM, "exact", 2, seeds=1, guide=None
    )
    assert figures["log_z_error"] == pytest.approx(0.0, abs=1e-4)
    assert figures["expectation_error"] == pytest.approx(0.0, abs=1e-4)


def test_a_truth_that_is_not_known_is_that_of_a_long_run(tmp_path, monkeypatch):
    comparison = replace(compare_engines.COMPARISONS["random_number"](), truth=None)
    guide = lmppl.LMGuide(comparison.program, lm=LM)
    (truth,) = compare_engines.truths_of(comparison, LM, guide, tmp_path)
    assert truth.log_z == pytest.approx(math.log(10), abs=0.1)
    assert truth.expectation == pytest.approx(4.5, abs=0.4)

    more = replace(comparison, held_out=[*comparison.held_out, (9,)])
    both = compare_engines.truths_of(more, LM, guide, tmp_path)
    assert both == [truth, truth]

    monkeypatch.setattr(lmppl, "infer", None)
    assert compare_engines.truths_of(comparison, LM, guide, tmp_path) == [truth]
    assert compare_engines.truths_of(more, LM, guide, tmp_path) == both


def test_so_many_held_out_inputs_are_answered(tmp_path, monkeypatch):
    ten = compare_engines.COMPARISONS["random_number"]()
    many = replace(ten, held_out=[(9,)] * 5)
    monkeypatch.setitem(compare_engines.COMPARISONS, "random_number", lambda: many)
    out = tmp_path / "points.json"
    for given, inputs in (([], 3), (["--inputs", "2"], 2), (["--inputs", "9"], 5)):
        compare_engines.main([*OPTIONS, "--engines", "importance", "--out", str(out), *given])
        point = json.loads(out.read_text())[-1]
        assert (point["settings"]["inputs"], point["runs"]) == (inputs, 3 * inputs)
    assert len(json.loads(out.read_text())) == 3


def test_a_guide_that_is_kept_is_not_trained_again(tmp_path, monkeypatch):
    out, guides = tmp_path / "points.json", tmp_path / "guides"
    options = [*OPTIONS, "--guides", str(guides), "--out", str(out), "--engines"]
    compare_engines.main([*options, "guide"])
    (first,) = json.loads(out.read_text())
    out.unlink()
    monkeypatch.setattr(lmppl.LMGuide, "fit", None)
    compare_engines.main([*options, "guide", "SMC with guide"])
    again, other = json.loads(out.read_text())
    assert again == first and other["engine"] == "SMC with guide"
    assert other["training_tokens"] == first["training_tokens"] > 100


@pytest.mark.parametrize("task", ["infilling", "arithmetic", "subjectivity"])
def test_the_held_out_inputs_of_a_task_are_not_trained_on(task):
    comparison = compare_engines.COMPARISONS[task]()
    assert len(comparison.held_out) >= 3 and len(comparison.training) > 40
    assert not set(comparison.held_out) & set(comparison.training)


def test_the_number_of_a_task_is_read_from_its_traces():
    found = {task: of().number for task, of in compare_engines.COMPARISONS.items()}
    assert found["infilling"]({"z": " a lamp"}) == 0.7
    assert found["subjectivity"]({"reason": " tells it,", "label": " the story"}) == 1.0
    steps = {"step_1": " 1 + 1 =", "result_1": 2, "more_1": ";", "step_2": " 2 + 1 ="}
    assert found["arithmetic"](steps) == 2


def test_the_spread_of_the_evidence_is_that_over_the_seeds_of_an_input(monkeypatch):
    found = iter([1.0, 3.0, 10.0, 10.0])  # of two inputs, two seeds each
    answer = namedtuple("Answer", "log_evidence mean")
    monkeypatch.setattr(
        lmppl, "infer", lambda *args, **options: answer(math.log(next(found)), lambda number: 0.0)
    )
    comparison = replace(compare_engines.COMPARISONS["random_number"](), held_out=[(9,), (8,)])
    figures = compare_engines.measure(
        comparison, [Truth(0.5, 0.0), Truth(2.0, 0.0)], LM, "importance", 4, seeds=2, guide=None
    )
    assert figures["z_spread"] == pytest.approx((math.sqrt(2) / 2 + 0) / 2)


def test_a_run_without_a_live_sample_is_infinitely_wrong():
    comparison = replace(
        compare_engines.COMPARISONS["random_number"](),
        program=lambda most: lmppl.require("no", False),
    )
    figures = compare_engines.measure(
        comparison, [Truth(0.0, 0.0)], LM, "importance", 4, seeds=2, guide=None
    )
    assert figures["log_z_error"] == figures["expectation_error"] == math.inf
    assert figures["z_spread"] == math.inf
