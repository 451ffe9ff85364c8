"""What a training run reports: its table, columns and plots."""

import json
import math
import random
import re

import pytest

from lmppl.report.history import History

NAN, INF = math.nan, math.inf


def run(steps=30, every=10, seed=0):
    """A run with held-out figures at steps 9, 19, ..."""
    noise = random.Random(seed)
    history = History()
    for step in range(steps):
        figures = {
            "step": step, "loss": 5 / (1 + step) + noise.random(), "log_z": -20 - noise.random(),
            "elbo": -22 - noise.random(), "ess": 0.5, "alive": 0.875, "length": 12.0, "inputs": 2,
            "samples": 8, "truncations": 5, "seconds_sampling": 2.0, "seconds_truncations": 1.0,
            "seconds_gradient": 1.0, "learning_rate": 1e-3, "grad_norm": 0.7,
        }  # fmt: skip
        if step % every == every - 1:
            figures |= {"eval_ess": 0.25, "eval_elbo": -23.0, "eval_log_z": -21.5}
            figures["seconds_evaluation"] = 4.0
        history.append(figures)
    return history


def cells(table):
    """The rows of a table, between its rule and its last line."""
    lines = table.splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith("─"))
    return [line.split() for line in lines[rule + 1 : -1]]


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


# --- a list --------------------------------------------------------------------------------------


def test_a_history_is_a_list_of_dicts():
    history = run(3)
    plain = [dict(figures) for figures in history]
    assert history == plain and json.loads(json.dumps(history)) == plain
    assert History(plain) == history and history[0] == plain[0]
    assert isinstance(history[1:], History) and history[1:] == plain[1:]


# --- figures -------------------------------------------------------------------------------------


def test_columns():
    history = run()
    assert history.column("loss") == [figures["loss"] for figures in history]
    held_out = history.column("eval_ess")
    assert [i for i, value in enumerate(held_out) if value == 0.25] == [9, 19, 29]
    assert sum(math.isnan(value) for value in held_out) == 27
    # 8 samples in 4 seconds; the 4 seconds of an evaluation train on nothing.
    assert history.column("samples_per_second") == [2.0] * 30
    assert History().column("loss") == []
    with pytest.raises(ValueError, match=r"no step has the figure 'los', allowed: alive, .*loss"):
        history.column("los")


@pytest.mark.parametrize("window", [1, 2, 5, 100])
def test_smoothed_is_the_mean_of_the_steps_around(window):
    history = run(12)
    loss = history.column("loss")
    back = (window - 1) // 2
    for i, mean in enumerate(history.smoothed("loss", window)):
        near = [loss[j] for j in range(i - back, i - back + window) if 0 <= j < 12]
        assert mean == pytest.approx(sum(near) / len(near))
    with pytest.raises(ValueError, match="window=0"):
        history.smoothed("loss", 0)


def test_smoothed_leaves_out_what_is_not_finite():
    history = History({"log_z": value} for value in (1.0, -INF, 3.0, NAN, NAN, NAN))
    smooth = history.smoothed("log_z", 3)
    assert smooth[:4] == [1.0, 2.0, 3.0, 3.0] and math.isnan(smooth[4]) and math.isnan(smooth[5])


def test_where_the_time_goes():
    history = run(10)  # 20 + 10 + 10 seconds, and one evaluation of 4
    split = history.time_split()
    assert sum(split.values()) == pytest.approx(1.0)
    assert split == pytest.approx(
        {"sampling": 20 / 44, "truncations": 10 / 44, "gradient": 10 / 44, "evaluation": 4 / 44}
    )
    assert History().time_split() == {} and History([{"step": 0}]).time_split() == {}
    assert History([{"seconds_a": 1.0}, {"seconds_a": NAN}]).time_split() == {"a": 1.0}


# --- table ---------------------------------------------------------------------------------------


def test_the_table():
    history = run()
    lines = repr(history).splitlines()
    assert lines[0] == "History: 30 steps, 240 samples, 132.0 s"
    assert lines[1].split() == ["eval", "eval", "eval"]
    headings = "step loss log Z ELBO ESS alive length samples/s ESS ELBO log Z"
    assert lines[2].split() == headings.split()
    last = cells(repr(history))[-1]
    assert last[0] == "29" and last[1] == f"{history[29]['loss']:.4g}"
    assert last[2] == f"{history[29]['log_z']:.2f}" and last[3] == f"{history[29]['elbo']:.2f}"
    assert last[4:] == ["50.0%", "87.5%", "12.0", "2.0", "25.0%", "-23.00", "-21.50"]
    assert cells(repr(history))[0][-3:] == ["-", "-", "-"]
    assert lines[-1] == ("time: sampling 45.5%, truncations 22.7%, gradient 22.7%, evaluation 9.1%")
    assert max(map(len, lines)) <= 80 and "…" not in repr(history)


def test_draws_and_scores_that_differ():
    history = run()
    for figures, nats, share in zip(history, [0.02, 0.04], [0.98, 0.96], strict=False):
        figures |= {"mismatch": nats, "mismatch_ess": share}
    for figures in history[2:]:
        figures |= {"mismatch": NAN, "mismatch_ess": NAN}  # steps without a draw of the guide
    told = "log q as drawn and as scored: 0.03 nats a token apart (ESS 97.0%)"
    assert repr(history).splitlines()[-1] == told
    assert max(map(len, repr(history).splitlines())) <= 80
    for figures in history:
        figures["mismatch"] = 1e-5  # rounding of float32
    assert "as drawn" not in repr(history)


def test_rows_are_spaced_evenly_and_meet_the_evaluations():
    plain = History({"step": i, "loss": 1.0, "seconds_a": 1.0} for i in range(101))
    assert [int(row[0]) for row in cells(plain.table(5))] == [0, 25, 50, 75, 100]
    assert [int(row[0]) for row in cells(plain.table(1))] == [100]
    assert [int(row[0]) for row in cells(plain[:4].table(10))] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="rows=0"):
        plain.table(0)
    assert [int(row[0]) for row in cells(run(31).table(4))] == [0, 9, 19, 30]
    # One evaluation moves the row beside it, and no other.
    plain[40]["eval_ess"] = 0.5
    assert [int(row[0]) for row in cells(plain.table(5))] == [0, 25, 40, 75, 100]


def test_empty():
    assert repr(History()) == History().table() == "History: no steps yet"
    assert History()._repr_html_() == "<div><div>History: no steps yet</div></div>"
    assert repr(History([{}])).startswith("History: 1 step, 0 samples")


def test_no_number_breaks_the_table():
    history = run(4)
    history[1] |= {"loss": NAN, "log_z": -INF, "elbo": NAN, "ess": INF, "alive": NAN}
    history[2] |= {"log_z": 1e300, "length": -INF, "samples": NAN, "seconds_sampling": INF}
    rows = cells(repr(history))
    assert rows[1][1:6] == ["nan", "-inf", "nan", "inf", "nan"]
    assert rows[2][2] == "1e+300" and rows[2][6:] == ["-inf", "-"]


def test_what_a_file_says_is_shown_and_never_interpreted():
    history = run(1)
    history[0] |= {"eval_<b>\x1b[2J": "[red]\x1b[31m<i>", "loss": "\x07", "seconds_\x1b": 1.0}
    for text in (repr(history), history._repr_html_()):
        assert "\x1b" not in text and "\x07" not in text
    assert "[red]" in repr(history)
    assert "<b>" not in history._repr_html_() and "<i>" not in history._repr_html_()


def test_html_has_the_same_cells():
    history = run()
    html = history._repr_html_()
    found = re.findall(r"<td>(.*?)</td>", html)
    assert found == [cell for row in cells(repr(history)) for cell in row]
    assert "<th>eval ESS</th>" in html and "<div>time: sampling 45.5%" in html


# --- plots ---------------------------------------------------------------------------------------


def titles(figure):
    return [axis.get_title() for axis in figure.axes]


def lines(axis):
    return {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}


def test_the_panels():
    history = run()
    figure = history.plot()
    assert titles(figure) == [
        "loss", "log Z and ELBO (nats)", "ESS", "length (tokens)", "samples/s",
    ]  # fmt: skip
    loss, evidence, ess, _, rate = figure.axes
    assert loss.get_yscale() == "log" and evidence.get_yscale() == "linear"
    assert set(lines(evidence)) == {"log Z", "ELBO", "eval log Z", "eval ELBO"}
    assert list(lines(ess)["eval ESS"].get_xdata()) == [9, 19, 29]
    assert list(lines(ess)["eval ESS"].get_ydata()) == [0.25] * 3
    points = loss.lines[0]
    assert list(points.get_ydata()) == history.column("loss")
    assert points.get_zorder() < loss.lines[1].get_zorder()
    assert list(rate.lines[0].get_ydata()) == [2.0] * 30


def test_lines_are_running_means():
    history = run(100)
    (_, line) = history.plot(columns=["loss"]).axes[0].lines
    assert list(line.get_ydata()) == history.smoothed("loss", 10)


def test_a_loss_that_is_not_positive_has_a_linear_scale():
    history = run()
    history[3]["loss"] = -0.1
    assert history.plot().axes[0].get_yscale() == "linear"


def test_chosen_columns():
    history = run()
    assert titles(history.plot(columns=["grad_norm", "eval_ess"])) == ["grad norm", "eval ESS"]
    assert titles(history.plot(columns="learning_rate")) == ["learning rate"]
    with pytest.raises(ValueError, match="no step has the figure 'grad'"):
        history.plot(columns=["loss", "grad"])


def test_no_number_breaks_the_plot(tmp_path):
    history = run()
    history[3] |= {"loss": NAN, "log_z": -INF, "elbo": NAN, "length": INF}
    history[5]["step"] = NAN
    for figures in history:
        figures["ess"] = NAN
        figures.pop("eval_ess", None)
    figure = history.plot(tmp_path / "run.png")
    assert "ESS" not in titles(figure)
    assert list(figure.axes[0].lines[0].get_xdata()) == [i for i in range(30) if i != 3]
    for nothing in (History(), History([{"loss": NAN}])):
        with pytest.raises(ValueError, match="nothing to plot"):
            nothing.plot()


def test_files_are_whole_or_not_there(tmp_path):
    history = run()
    history.plot(tmp_path / "new" / "run.svg")
    assert (tmp_path / "new" / "run.svg").read_text().startswith("<?xml")
    target = tmp_path / "run.png"
    history.plot(str(target))
    assert target.read_bytes().startswith(b"\x89PNG")
    history.plot(tmp_path / "bare")
    assert (tmp_path / "bare").read_bytes().startswith(b"\x89PNG")
    before = target.read_bytes()
    with pytest.raises(ValueError, match="not supported"):
        history.plot(tmp_path / "run.nope")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "new", "run.png"]
    assert target.read_bytes() == before


def test_a_file_that_was_there_stays_when_writing_fails(tmp_path, monkeypatch):
    target = tmp_path / "run.png"
    target.write_bytes(b"before")

    def half(self, name, **_):
        name.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half)
    with pytest.raises(OSError, match="no space"):
        run().plot(target)
    assert target.read_bytes() == b"before" and list(tmp_path.iterdir()) == [target]


def test_notebooks_show_the_figure():
    assert run().plot()._repr_png_().startswith(b"\x89PNG")


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install lmppl-pyro\[plot\]"):
        run().plot()


def test_learning_shows_what_it_is_about():
    """Of a guide that imitates and draws nothing, the figures of its draws are left out."""
    history = History(
        {
            "step": i, "log_evidence": -9.0 + i, "model_loss": 8.0, "model_ess": 0.25, "loss": 1.0,
            "log_z": NAN, "elbo": NAN, "ess": NAN, "alive": NAN, "length": 2.0,
        }
        for i in range(3)
    )  # fmt: skip
    lines = history.table().splitlines()
    assert " ".join(lines[1].split()) == "step log evidence model ESS loss length"
    assert lines[3].split() == ["0", "-9.00", "25.0%", "1", "2.0"]
    assert titles(history.plot())[:2] == ["log evidence (nats)", "model ESS"]
