"""The task ``arithmetic``, on tiny language models."""

from __future__ import annotations

import argparse

import pytest
from pyro import poutine

import arithmetic
import calculator
import lmppl
from lmppl.testing import tiny_lm
from paper.calculator import calculate, calculate_in_words
from paper.command import Run
from paper.rows import Results

TOKENS = [*"0123456789+-= ;.", "\n", "Question: What is ", "?\nSteps:", "\nAnswer:", " error"]
LM = tiny_lm(TOKENS, seed=2, contrast=1.0, context_length=1024)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(lmppl.LM, "from_pretrained", lambda name, dtype=None: LM)


def test_the_calculator_computes_sums():
    for expression, result in (
        ("3 + 4 - 2", 5), (" 12 - 30 =", -18), ("-5 + 2", -3), ("7", 7), ("1-2-3", -4), ("007 + 1", 8),
        ("1\n+ 2", 3), ("999999 + 1 =", 1_000_000),
    ):  # fmt: skip
        assert calculate(expression) == result
        assert calculate_in_words(expression) == str(result)


@pytest.mark.parametrize(
    "expression",
    [
        "", "=", "3 +", "+ 3", "3 * 4", "3 + -4", "2 ** 9", "__import__('os')", "1.5 + 1", "3 4",
        "1000000 + 1", "1 + " + "9" * 5000, "1" + " + 1" * 100_000, "\u0663 + 1", "3 + 4 = 7", "x",
    ],
)  # fmt: skip
def test_the_calculator_refuses_what_is_no_sum_or_too_large(expression):
    with pytest.raises(ValueError):
        calculate(expression)
    assert calculate_in_words(expression) == "error"


def test_the_calculator_of_the_other_example_reads_what_its_regex_allows_and_no_more():
    assert calculator.result_of(" 12 - 50 =") == -38
    for step in ("12 + 5 =", " 12+5 =", " 1 + 2 + 3 =", " 12 + 5", " 1234567 + 1 ="):
        with pytest.raises(ValueError):
            calculator.result_of(step)


def test_steps_of_a_problem():
    assert arithmetic.steps_of("9 - 4 + 5") == [(" 9 - 4 =", 5), (" 5 + 5 =", 10)]
    assert arithmetic.worked("9 - 4 + 5") == (
        "Question: What is 9 - 4 + 5?\nSteps: 9 - 4 = 5; 5 + 5 = 10.\nAnswer: 10\n"
    )
    assert arithmetic.demonstration("9 - 4 + 5") == {
        "step_1": " 9 - 4 =", "step_2": " 5 + 5 =", "more_1": ";", "more_2": "."
    }  # fmt: skip


def test_a_demonstration_is_a_trace_of_the_program():
    """And its text is that of a worked example."""
    problem = "7 + 2 - 8 + 3"
    data = arithmetic.demonstration(problem)
    with lmppl.use(LM):
        conditioned = poutine.condition(arithmetic.arithmetic, data=data)
        trace = poutine.trace(conditioned).get_trace(*arithmetic.observed(problem))
    assert trace.log_prob_sum().isfinite()
    answer = trace.nodes["answer"]["fn"]
    written = LM.vocabulary.decode(answer.prefix_ids) + str(
        answer.text(trace.nodes["answer"]["value"])
    )
    assert written.endswith(arithmetic.worked(problem)) and written.count("Question") == 5
    assert written.count(arithmetic.QUESTION.format(problem=problem)) == 1


def test_the_splits_are_disjoint_and_the_same_each_time():
    train, test = arithmetic.split(100, 30)
    assert arithmetic.split(100, 30) == (train, test)
    tested = [problem for found in test.values() for problem in found]
    everything = [*train, *tested, *arithmetic.WORKED]
    assert len(set(everything)) == len(everything) == 200 + 90 + 4
    assert {len(problem.split()) for problem in train} == {5, 7}, "3 and 4 operands"
    for operands, found in test.items():
        assert all(len(problem.split()) == 2 * operands - 1 for problem in found)
    for problem in everything:
        assert all(result >= 0 for _, result in arithmetic.steps_of(problem))
    assert arithmetic.split(50, 30)[1] == test, "whatever is trained on"


def test_more_problems_than_there_are_are_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        arithmetic.main(["--problems", "5000"])
    assert ended.value.code == 2
    assert "problems of 3 operands, and --problems 5000 with" in capsys.readouterr().err


def test_what_the_calculator_refuses_has_probability_zero_or_is_read_on(monkeypatch):
    """Numbers of 7 digits are too large for it: no exception leaves the engine."""
    monkeypatch.setattr(arithmetic, "STEP", r" (1|9999999) [+-] 1 =")
    options = {"lm": LM, "method": "importance", "num_samples": 40, "seed": 0, "progress": False}
    found = lmppl.infer(arithmetic.arithmetic, "3 + 4 - 2", **options)
    killed = sum(number for name, number in found.killed.items() if name.startswith("result_"))
    assert 0 < killed == sum(weight == 0 for weight in found.weights.tolist())
    read_on = lmppl.infer(arithmetic.arithmetic, "3 + 4 - 2", kwargs={"errors": "text"}, **options)
    assert not read_on.killed and "error" in read_on["result_1"]


def test_the_guide_does_not_see_the_answer():
    args = argparse.Namespace(batch_size=4, demonstrations=2, steps=1)
    run = Run(LM, args, "guide", 0, {})
    train, _ = arithmetic.split(5, 1)
    guide = arithmetic.trainer(run, arithmetic.arithmetic, train).new_guide()
    assert guide.observations(arithmetic.observed(train[0])) == {}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*never came to another trace")
def test_every_method(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(arithmetic, "STEP", r" [0-9]{1,2} [+-] [0-9]{1,2} =")
    monkeypatch.setattr(arithmetic, "MOST_STEPS", 3)
    out = tmp_path / "rows.json"
    words = "--quick --steps 2 --batch-size 4 --problems 3 --held-out 1 --samples 4 --moves 1"
    arithmetic.main([*words.split(), "--method", "all", "--seeds", "1", "--out", str(out)])
    rows = {row.method: row for row in Results.load(out).rows}
    assert list(rows) == list(arithmetic.TASK.methods)
    for method, row in rows.items():
        assert {"accuracy_3", "accuracy_4", "accuracy_5", "share_3"} <= set(row.figures)
        assert ("ess" in row.figures) == (method not in ("zero_shot", "mcmc"))
        assert bool(row.steps) == (method in ("guide", "sft", "ppo"))
    printed = capsys.readouterr().out
    assert "guide:" in printed and "mcmc" in printed
