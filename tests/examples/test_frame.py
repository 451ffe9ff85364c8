"""What the five tasks share, on tiny language models."""

from __future__ import annotations

import dataclasses
import math
import sys

import pytest

import lmppl
from benchmarks import report, tasks
from benchmarks.results import TASKS
from lmppl import lm_sample, require
from lmppl.testing import tiny_lm
from paper import inputs
from paper.command import Task, above_0, positive, several, share
from paper.evaluation import held_out, log_z_by_runs
from paper.inputs import BadInput, check_fits, lines_of, numbered_lines, package, split
from paper.rows import Column, Results, Row, groups_of
from paper.training import LOSSES, Trainer, tokens

LM = tiny_lm("ab.", seed=0)


def infill(x, y):
    z = lm_sample("z", x, max_tokens=3, stop=".")
    lm_sample("y", [x, z], obs=y)
    return z


# --- the command ---------------------------------------------------------------------------------


def task(measure, **options):
    columns = {"share": Column("share", ".1%", least=0.5)}
    return Task(
        "a_task", "A task", ("prior", "guide", "ppo"), columns, measure, {"steps": 2}, **options
    )


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(lmppl.LM, "from_pretrained", lambda name, dtype=None: LM)


def call(task, *words):
    return task.main(task.parser("A task."), list(map(str, words)))


def test_rows_have_what_it_takes_to_repeat_them(tmp_path):
    out = tmp_path / "rows.json"
    found = call(
        task(lambda run: {"share": run.seed + 0.25}), "--seeds", 2, "--quick", "--out", out
    )
    assert [(row.method, row.seed) for row in found.rows] == [
        ("prior", 0), ("guide", 0), ("prior", 1), ("guide", 1),
    ]  # fmt: skip
    row = found.rows[-1]
    assert row.settings["steps"] == 2 and row.settings["samples"] == 1024
    assert row.command == "python examples/a_task.py --steps 2" and "thread" in row.machine
    assert Results.load(out) == found
    assert "seeds" not in row.settings and "out" not in row.settings


def test_what_the_command_line_says_wins_over_quick():
    found = call(task(lambda run: {"share": 0.5}), "--quick", "--steps", 7, "--method", "guide")
    assert found.rows[0].settings["steps"] == 7


def test_an_interrupted_run_keeps_its_rows_and_goes_on(tmp_path, capsys):
    out, measured = tmp_path / "rows.json", []

    def measure(run):
        measured.append(run.method)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return {"share": 0.5}

    with pytest.raises(KeyboardInterrupt):
        call(task(measure), "--method", "all", "--out", out)
    assert [row.method for row in Results.load(out).rows] == ["prior"]
    assert list(tmp_path.iterdir()) == [out]
    call(task(measure), "--method", "all", "--out", out)
    assert measured == ["prior", "guide", "guide", "ppo"]
    call(task(measure), "--method", "all", "--out", out)
    assert len(measured) == 4 and "50.0%" in capsys.readouterr().out
    call(task(measure), "--method", "prior", "--samples", 9, "--out", out)
    assert len(measured) == 5, "another setting is another row"


def test_rows_depend_on_the_training_if_there_is_one(tmp_path):
    out, measured = tmp_path / "rows.json", []

    def measure(run):
        measured.append((run.method, run.args.steps))
        return {"share": 0.5}

    for steps in (3, 4):
        call(task(measure), "--steps", steps, "--batch-size", 8 + steps, "--out", out)
    assert measured == [("prior", 3), ("guide", 3), ("guide", 4)]
    rows = Results.load(out).rows
    assert "steps" not in rows[0].settings and "--batch-size" not in rows[0].command
    assert rows[2].settings["batch_size"] == 12
    tables = tasks.tables_of(groups_of(rows))
    assert [[group.rows for group in own] for own in tables] == [
        [[rows[0]], [rows[1]]], [[rows[0]], [rows[2]]],
    ]  # fmt: skip
    assert tasks.tables_of(groups_of(rows[:1]))[0][0].rows == rows[:1]
    assert "--method prior guide" in tasks.section(Results.load(out), None)


def test_log_z_is_found_once_for_the_options_that_it_depends_on(tmp_path):
    out, found = tmp_path / "rows.json", []

    def measure(run):
        log_z = run.log_z(lambda: found.append(run.args.samples) or [(-1.5, 0.25)], "samples")
        assert log_z == [(-1.5, 0.25)]
        return {"share": 0.5}

    for seeds, samples in ((1, 9), (2, 9), (1, 8), (2, 8)):
        call(task(measure), "--seeds", seeds, "--samples", samples, "--out", out)
    call(task(measure), "--steps", 4, "--samples", 9, "--out", out)
    assert found == [9, 8]
    call(task(measure), "--samples", 9, "--method", "prior", "guide")
    assert found == [9, 8, 9], "without a file, nothing is kept"


def test_what_the_user_can_put_right_has_no_traceback(tmp_path, capsys):
    def measure(run):
        raise BadInput("the file is empty")

    other = tmp_path / "other.json"
    Results("another_task", "", {}).save(other)
    (tmp_path / "broken.json").write_text('{"rows": 3}')
    for words, message in (
        ([], "a_task.py: the file is empty"),
        (["--out", other], "has rows of another_task"),
        (["--out", tmp_path / "broken.json"], "holds no results of a task"),
        (["--seeds", "0"], "--seeds"),
    ):
        with pytest.raises(SystemExit) as ended:
            call(task(measure), *words)
        assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_wide_table_has_its_costs_apart(capsys):
    names = [f"figure{number}" for number in range(7)]
    wide = task(lambda run: dict.fromkeys(names, 0.5))
    for few in (names[:6], names):
        columns = {name: Column(name) for name in few}
        call(dataclasses.replace(wide, columns=columns), "--method", "prior")
        head = [line for line in capsys.readouterr().out.splitlines() if "method" in line]
        assert len(head) == 1 + (len(few) == 7) and all(len(line) < 80 for line in head)
        assert "…" not in "".join(head)


def test_numbers_of_the_command_line_have_bounds():
    assert (positive("1"), several("2"), above_0("1.5"), share("1")) == (1, 2, 1.5, 1)
    below = ((positive, "0"), (several, "1"), (above_0, "0"), (above_0, "nan"), (above_0, "inf"))
    for kind, text in (*below, (share, "0"), (share, "1.1")):
        with pytest.raises(ValueError):
            kind(text)


def test_a_plot_without_matplotlib_is_refused_before_the_work(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        call(task(lambda run: 1 / 0, plot=lambda rows: None), "--plot", "picture.png")
    assert "--plot needs matplotlib: pip install 'lmppl-pyro[plot]'" in capsys.readouterr().err


# --- inputs --------------------------------------------------------------------------------------


def test_files_of_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("ab\n\n  ba. \n")
    assert lines_of(path) == ["ab", "ba."]
    assert numbered_lines(path) == [(1, "ab"), (3, "ba.")]
    path.write_text(" \n\n")
    with pytest.raises(BadInput, match="has no line of text"):
        lines_of(path)
    path.write_bytes(b"ab\xff")
    with pytest.raises(BadInput, match="no text in UTF-8, see byte 2"):
        lines_of(path)
    with pytest.raises(BadInput, match="cannot be read: No such file"):
        lines_of(tmp_path / "nothing")


def test_the_last_inputs_are_held_out():
    assert split([1, 2, 3, 4], 1, "a file") == ([1, 2, 3], [4])
    with pytest.raises(BadInput, match="a file has 2 inputs, and the last 2 are held out"):
        split([1, 2], 2, "a file")


def test_prompts_have_to_fit_the_context():
    short = tiny_lm("ab.", context_length=8)
    check_fits(short, ["ab", "abab"], 4)
    with pytest.raises(BadInput, match=r"prompt 2 of 2 \('ababab'...\) has 6 tokens: with 4 more"):
        check_fits(short, ["ab", "ababab"], 4)
    with pytest.raises(BadInput, match="prompt 1 of 1 is empty"):
        check_fits(short, [" "], 4)


def test_a_missing_package_is_named_with_its_command():
    assert package("paper.inputs", "nothing", "this") is inputs
    with pytest.raises(BadInput, match=r"scoring needs no_such_module: pip install 'gt-x\[y\]'"):
        package("no_such_module", "gt-x[y]", "scoring")


# --- training and evaluation ---------------------------------------------------------------------


@pytest.mark.slow
def test_all_methods_train_at_equal_tokens():
    few = {"batch_size": 8}
    options = dict.fromkeys(("guide", "ppo", "elbo", "wake"), few)
    options["sft"] = {**few, "demonstrations": [{"z": "ab."}]}
    trainer = Trainer(lambda: lmppl.LMGuide(infill, lm=LM), [("ab.", "ab")], options, 16)
    costs = {}
    for method in LOSSES:
        guide, costs[method] = trainer.train(method, seed=0, progress=False)
        assert len(guide.history) == costs[method]["steps"]
    for method in ("elbo", "wake"):
        assert costs[method]["tokens"] == pytest.approx(costs["guide"]["tokens"], rel=0.3)
    # Draws that have become all alike cost less, as the model is asked once.
    assert 0.3 < costs["ppo"]["tokens"] / costs["guide"]["tokens"] < 1.3
    assert costs["guide"]["steps"] == 16 and costs["sft"]["steps"] == 64, (
        "or it reads one text for ever"
    )
    assert costs["sft"]["tokens"] < costs["guide"]["tokens"]
    before = tokens(LM)
    trainer.train("guide", seed=1, progress=False)
    assert tokens(LM) - before == pytest.approx(costs["guide"]["tokens"], rel=0.1), "counted once"


@pytest.mark.slow
def test_what_a_guide_begins_with_counts_as_its_training():
    seeds = []

    def prepare(seed):
        seeds.append(seed)
        lmppl.infer(infill, "ab.", "ab", lm=LM, method="importance", num_samples=200, seed=seed)
        return {"demonstrations": [{"z": "ab."}]}

    new_guide = lambda: lmppl.LMGuide(infill, lm=LM)  # noqa: E731
    options = dict.fromkeys(("guide", "elbo"), {"batch_size": 8})
    plain = Trainer(new_guide, [("ab.", "ab")], options, 4)
    prepared = Trainer(new_guide, [("ab.", "ab")], options, 4, prepare)
    for method in ("guide", "elbo"):
        _, alone = plain.train(method, seed=5, progress=False)
        _, cost = prepared.train(method, seed=5, progress=False)
        assert cost["tokens"] > 1.5 * alone["tokens"]
    assert seeds == [5, 0] and cost["steps"] > alone["steps"]


def test_log_z_by_independent_runs():
    exact = lmppl.infer(infill, "ab.", "ab", lm=LM, method="exact").log_evidence
    for method in ("importance", "smc"):
        log_z, stderr = log_z_by_runs(
            infill, ("ab.", "ab"), lm=LM, method=method, num_samples=64, runs=8
        )
        assert 0 < stderr < 0.3 and abs(log_z - exact) < 4 * stderr

    def impossible(x):
        require("never", lm_sample("z", x, max_tokens=2) == "?")

    found = log_z_by_runs(impossible, ("ab.",), lm=LM, num_samples=4, runs=2)
    assert found == (-math.inf, math.inf)


def test_the_ess_counts_only_where_log_z_agrees():
    """Of a proposal that misses most of the posterior, too: its ESS is the larger."""

    def program(x):
        z = lm_sample("z", x, choices=["a", "b.", "bb"])
        require("not a", z != "a")

    def blind(x):
        lm_sample("z", x, choices=["a", "b."])

    exact = lmppl.infer(program, "ab.", lm=LM, method="exact")
    log_z = [(exact.log_evidence, 0.0)]
    options = {"lm": LM, "num_samples": 200, "seed": 0}
    prior = held_out(program, [("ab.",)], log_z, guide=None, **options)
    assert prior["agrees"] == 1 and prior["counted"] == prior["ess"]
    found = held_out(program, [("ab.",)], log_z, guide=blind, **options)
    assert found["agrees"] == found["counted"] == 0 < found["ess"]
    assert 0 < found["alive"] < 1 and found["kl_low"] < found["kl_high"]


# --- the page ------------------------------------------------------------------------------------


def results(*rows, columns=None):
    columns = columns or {"share": Column("share", ".1%", least=0.5)}
    return Results("random_number", "A task", columns, list(rows))


def row(method, seed, share, **options):
    settings, figures = {"steps": 3}, {} if share is None else {"share": share}
    given = {"command": "python examples/random_number.py", "machine": "A machine", **options}
    return Row(method, seed, settings, figures, **given)


def test_the_table_has_means_deviations_and_goals():
    found = results(
        row("low_temperature", 0, None), row("guide", 0, 0.4, steps=10, tokens=1000, minutes=2.0),
        row("guide", 1, 0.8, steps=10, tokens=2000, minutes=3.0),
    )  # fmt: skip
    text = tasks.section(found, None)
    assert "| method | share | steps | tokens | minutes | seeds |" in text
    assert "| low_temperature |  |  |  | 0.0 | 1 |" in text
    assert "| guide | 60.0% ± 28.3% | 10 | 1,500 | 2.5 | 2 |" in text
    assert "goal" not in text
    assert tasks.goals(found) == ["random_number, its usual settings: share at least 50.0%: met"]
    assert "--method low_temperature guide --seeds 2 --out benchmarks/results/tasks/" in text
    assert "With `" not in text
    other = row("guide", 0, 0.4, command="python examples/random_number.py --most 9")
    assert "With `--most 9`:" in tasks.section(results(other), None)
    assert tasks.goals(results(row("guide", 0, 0.4)))[0].endswith("MISSED")
    assert Column("", ".1f", most=2.0).met_by(2.0) and not Column("", ".1f", most=2.0).met_by(2.1)
    assert len(groups_of(found.rows)) == 2


def test_the_gain_of_the_guide_is_compared_with_its_goal():
    def found(prior, guide):
        rows = row("prior", 0, None), row("guide", 0, None)
        for of_method, counted in zip(rows, (prior, guide), strict=True):
            of_method.figures["counted"] = counted
        return tasks.gain(groups_of(rows)), tasks.goals(results(*rows))

    said, (goal,) = found(0.02, 0.3)
    assert said == ["ESS of the guide, where log Z agrees: 30.0%, 15.0 times the prior's 2.0%."]
    assert goal.endswith("ESS where log Z agrees 30.0%, 10 times the prior's 2.0%, or 50%: met")
    assert found(0.05, 0.15)[1][0].endswith("MISSED") and found(0.2, 0.51)[1][0].endswith(": met")
    assert "the prior's is 0" in found(0.0, 0.51)[0][0]
    assert tasks.gain(groups_of([row("prior", 0, 0.1), row("guide", 0, 0.2)])) == []


def test_the_page_gets_the_tables_of_all_files(tmp_path):
    page = "before\n<!-- random_number:begin -->\nold\n<!-- random_number:end -->\nafter\n"
    assert tasks.updated(page, tmp_path / TASKS, None) == page
    found = results(row("guide", 0, 0.4))
    found.save(tmp_path / TASKS / "random_number.json")
    updated = tasks.updated(page, tmp_path / TASKS, None)
    assert "| guide | 40.0% |" in updated and "old" not in updated
    assert updated.startswith("before\n") and updated.endswith("after\n")
    assert tasks.updated(updated, tmp_path / TASKS, None) == updated
    assert report.machines(tmp_path) == [], "their folder is no machine"
    found.task = "another"
    found.save(tmp_path / TASKS / "another.json")
    with pytest.raises(ValueError, match="another:begin"):
        tasks.updated(page, tmp_path / TASKS, None)


def test_the_page_of_the_docs_has_a_part_for_each_task():
    page = tasks.PAGE.read_text()
    for script in sorted(tasks.EXAMPLES.glob("*.py")):
        if "paper.command" in script.read_text():
            assert report.update(page, "text", script.stem)
