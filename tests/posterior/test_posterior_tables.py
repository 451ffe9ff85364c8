"""Posterior: its table, and what it says of figures that cannot be trusted."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine import Trace
from rich.cells import cell_len
from weighted_traces import CHAINS, Words, posterior_of, trace_of

import lmppl
from lmppl import Posterior
from lmppl.distributions import ToolResult
from lmppl.report.posteriors import posterior_blocks
from lmppl.report.tables import MAX_ROWS, as_text, bar
from lmppl.testing import tiny_lm

LM = tiny_lm("ab.", seed=0)

# --- tables --------------------------------------------------------------------------------------


def report() -> dict[str, Any]:
    return {
        "engine": "importance",
        "iid": True,
        "tokens_sampled": 1234,
        "tokens_scored": 567,
        "seconds": 3.21,
        "killed": Counter({"y": 2}),
        "notes": ["self-normalised"],
    }


def rows_of(table: object) -> list[list[str]]:
    return [line.split() for line in repr(table).splitlines()]


def two_sites() -> Posterior:
    traces = [trace_of(a="x", b=" one"), trace_of(a="x", b=" two"), trace_of(a="y", b=" two")]
    return Posterior(traces, torch.tensor([0.2, 0.4, 0.4]).log(), [0] * 3, info=report())


def test_the_table_has_a_marginal_a_site():
    lines = repr(two_sites()).splitlines()
    assert lines[0] == "Posterior by importance: 3 samples, ESS 2.8 (93%)"
    assert lines[1].startswith("log evidence -1.099 nats (standard error 0.2")
    assert lines[2] == "don't trust these figures: ESS 2.8 is below 10"
    assert lines[3].startswith("what may help: more samples (num_samples=), ")
    assert lines[4] == "1,234 tokens drawn, 567 tokens scored, 3.2 s"
    assert [line.split() for line in lines if line and "─" not in line][5:-2] == [
        ["weight", "a"], ["60.0%", "█" * 10, "'x'"], ["40.0%", "██████▋", "'y'"],
        ["weight", "b"], ["80.0%", "█" * 10, "'", "two'"], ["20.0%", "██▌", "'", "one'"],
        ["weight", "returned"], ["100.0%", "█" * 10, "0"],
    ]  # fmt: skip
    assert lines[-2] == "samples with probability zero, by the site that ended them: y (2)"
    assert lines[-1] == "note: self-normalised"


def test_joint_rows_on_request():
    posterior = two_sites()
    assert "rows" not in posterior.summary()
    rows = posterior.summary(joint=True)["rows"]
    assert [row["values"] for row in rows][-1] == {"a": "x", "b": " one"}
    table = posterior.table(joint=True)
    assert ["weight", "a", "b"] in rows_of(table)
    assert ["20.0%", "█████", "'x'", "'", "one'"] in rows_of(table)
    assert ["weight", "b"] in rows_of(posterior.table("b", joint=True, rows=1))
    assert "and 1 more, together 20.0%" in repr(posterior.table("b", joint=True, rows=1))
    assert table._repr_html_().count("<table>") == 1 and str(table) == repr(table)
    one = posterior.table("b", rows=1)
    assert ["weight", "a"] not in rows_of(one) and "'x'" not in repr(one)
    assert "and 1 more, together 20.0%" in repr(one)
    with pytest.raises(KeyError, match="no trace has a site 'c'"):
        posterior.table("c")
    with pytest.raises(ValueError, match="rows=0"):
        posterior.table(rows=0)


def test_tools_and_returned_values_are_in_the_table():
    traces = [trace_of(z="a", n=ToolResult.wrap({"hits": i % 2}), s=ToolResult.wrap(0.5 * i),
                       y=(Words(["w"]), torch.tensor([0, -1]), True)) for i in range(4)]  # fmt: skip
    posterior = Posterior(traces, torch.zeros(4), [("a", i % 2) for i in range(4)])
    summary = posterior.summary()
    assert summary["marginals"]["n"] == [
        {"weight": 0.5, "value": {"hits": 0}}, {"weight": 0.5, "value": {"hits": 1}},
    ]  # fmt: skip
    assert summary["numeric"]["s"]["mean"] == 0.75 and summary["tools"] == ["n", "s"]
    assert [row["value"] for row in summary["returned"]["rows"]] == [("a", 0), ("a", 1)]
    assert "y" not in summary["marginals"], "what is observed is known"
    table = repr(posterior)
    assert "n (tool)" in table and "{'hits': 1}" in table and "['a', 1]" in table
    assert "s (tool)   0.75" in table
    assert "'w'" in repr(posterior.table("y")), "unless it is asked for"
    floats = Posterior(traces, torch.zeros(4), [0.5, 1.5, 2.5, 3.5])
    assert floats.summary()["returned"]["numeric"]["mean"] == 2.0
    assert any(row[:3] == ["returned", "2", "1.118"] for row in rows_of(floats))


@pytest.mark.parametrize("returns", [[None] * 3, ["a", "b", "a"], [" one"] * 3])
def test_what_a_program_returns_is_shown_if_it_says_something(returns):
    traces = [trace_of(z=z, w="w") for z in ("a", "b", "a")]
    shown = Posterior(traces, torch.zeros(3), returns).summary()["returned"]
    assert (shown is not None) == (returns[0] == " one")


def test_deterministic_values_are_shown():
    def model():
        p = pyro.sample("p", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * p)
        pyro.deterministic("big", torch.tensor(3))

    traces = [poutine.trace(model).get_trace() for _ in range(3)]
    summary = Posterior(traces, torch.zeros(3), [None] * 3).summary()
    assert summary["numeric"]["twice"]["mean"] == pytest.approx(2 * summary["numeric"]["p"]["mean"])
    assert summary["marginals"]["big"] == [{"weight": pytest.approx(1.0), "value": 3}]


def test_a_program_of_many_sites_has_a_short_table():
    traces = [trace_of(**{f"z{k}": f"{i * k % 7}" for k in range(20)}) for i in range(50)]
    posterior = Posterior(traces, torch.zeros(50), [None] * 50)
    lines = repr(posterior).splitlines()
    assert len(lines) < 45 and max(map(len, lines)) < 120
    assert sum("weight" in line for line in lines) == 6
    assert any(
        line.startswith("and 14 more, shown by posterior.table(name): z6, z7") for line in lines
    )
    assert repr(posterior.table("z6", rows=7)).count("%") == 1 + 7
    vector = Posterior([trace_of(v=torch.arange(30.0))], torch.zeros(1), [None])
    assert "v[11]" in repr(vector) and "v[12]" not in repr(vector) and "and 18 more" in repr(vector)


# --- trust ---


def heavy(k: float, count: int = 400) -> Posterior:
    """Weights whose tail has shape k: quantiles of a Pareto distribution."""
    log_weights = -k * torch.log1p(-(torch.arange(count) + 0.5).double() / count)
    info = {"iid": True, "engine": "importance"}
    return Posterior(
        [trace_of(z=str(i)) for i in range(count)], log_weights, [0] * count, info=info
    )


def test_a_table_says_when_its_figures_cannot_be_trusted():
    few = posterior_of(list("abcdefghijkl"), [50.0, *[1.0] * 11], info={"iid": True})
    assert few.ess < 10 and few.log_evidence_stderr < 1
    line = f"don't trust these figures: ESS {few.ess:.1f} is below 10"
    assert repr(few).splitlines()[2] == line and line.replace("'", "&#x27;") in few._repr_html_()
    enough = posterior_of(list("abcdefghijkl"), [1.0] * 12, info={"iid": True})
    assert "trust" not in repr(enough) and "help" not in repr(enough)
    assert enough.summary()["doubts"] == enough.summary()["remedies"] == []
    tail = heavy(0.85)
    assert tail.ess > 10 and tail.summary()["pareto_k"] > 0.7
    assert tail.summary()["doubts"] == [f"Pareto k {tail.summary()['pareto_k']:.2f} is above 0.7"]
    assert heavy(0.3).summary()["doubts"] == [] and heavy(0.3).summary()["pareto_k"] < 0.7


def heard(x, y):
    lmppl.lm_sample("y", [x, lmppl.lm_sample("z", x, max_tokens=2)], obs=y)


def heard_guide(x, y):
    lmppl.lm_sample("z", x, max_tokens=2)


@pytest.mark.parametrize(
    ("engine", "options", "remedies"),
    [
        ("importance", {}, 'more samples (num_samples=), method="smc", a guide (guide=)'),
        ("smc", {}, 'more samples (num_samples=), a twist (twist="lookahead"), a guide (guide=)'),
        (
            "mcmc",
            {"num_chains": 1, "warmup": 20},
            "more moves (num_samples=, thin=), better starts (initial=), a guide (guide=)",
        ),
        (
            "gflownet",
            {"steps": 1, "fit": {"batch_size": 4}},
            "more samples (num_samples=), more training of the guide (guide.fit)",
        ),
        (lmppl.Importance(), {}, 'more samples (num_samples=), method="smc", a guide (guide=)'),
    ],
)
def test_beside_a_doubt_stands_what_may_help_by_the_engine(engine, options, remedies, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # so that no line is broken
    common = {"num_samples": 4, "seed": 0, "lm": LM}
    posterior = lmppl.infer(heard, "ab.", "a", method=engine, **common, **options)
    lines = repr(posterior).splitlines()
    assert lines[2].startswith("don't trust these figures: ESS ")
    assert lines[3] == f"what may help: {remedies}"
    assert ", ".join(posterior.summary()["remedies"]) == remedies


def test_a_guide_that_was_there_could_be_better():
    common = {"num_samples": 4, "seed": 0, "lm": LM}
    posterior = lmppl.infer(heard, "ab.", "a", guide=heard_guide, **common)
    assert posterior.summary()["remedies"][-1] == "a better guide"
    mine = posterior_of(["a"], [1.0], info={"engine": "an engine of mine"})
    assert mine.summary()["remedies"] == ["more samples (num_samples=)"]


def test_nothing_is_doubted_where_nothing_is_estimated():
    exact = posterior_of(["a", "b"], [9.0, 1.0], info={"engine": "exact", "exact": True})
    dead = posterior_of(["a", "b"], [0.0, 0.0])
    assert exact.summary()["doubts"] == dead.summary()["doubts"] == []
    drawn = exact.resample(3, seed=0).summary()
    assert drawn["doubts"] and drawn["remedies"] == ["more draws (resample)"], "three are few"


def test_chains_that_disagree_are_doubted(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # so that no line is broken
    posterior = posterior_of(list("abab"), [1.0] * 4, info=CHAINS, claims_evidence=False)
    doubt = "R-hat of 'length of z' is 1.20, above 1.01: the chains disagree"
    assert posterior.summary()["doubts"] == [doubt] and doubt in repr(posterior)


def test_the_table_shows_the_first_ten():
    texts = [chr(ord("a") + i) for i in range(14)]
    table = repr(posterior_of(texts, [float(20 - i) for i in range(14)]))
    assert MAX_ROWS == 10 and "'j'" in table and "'k'" not in table
    assert f"and 4 more, together {100 * (10 + 9 + 8 + 7) / 189:.1f}%" in table


@pytest.mark.parametrize("width", [40, 60, 200])
def test_the_table_is_no_wider_than_the_terminal(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    long = posterior_of(["word " * 50, "漢字" * 60], [0.6, 0.4], info=report())
    lines = repr(long).splitlines()
    assert max(cell_len(line) for line in lines) <= width
    assert any(line.startswith(" 60.0%") for line in lines), "the weights are never cut"
    assert sum("word word" in line for line in lines) == 1, "one row a value, cut, not wrapped"
    assert "…" in repr(long)


HOSTILE = "[bold]x[/bold][/nope] \x1b[31mred\nnew\r\tline <script>alert(1)</script> :smile: \u202e"


def test_what_a_model_wrote_is_shown_never_interpreted():
    posterior = posterior_of([HOSTILE], [1.0], info={"notes": [HOSTILE], "killed": {HOSTILE: 1}})
    table = as_text(posterior_blocks(posterior.summary()), width=400)
    row = next(line for line in table.splitlines() if "100.0%" in line)
    assert (
        repr(HOSTILE) in row
    )  # as Python shows a string: markup, escapes, emoji codes as they are
    assert not set(table) & {"\x1b", "\r", "\t", "\u202e"}
    page = posterior._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert not set(page) & {"\x1b", "\r", "\t", "\n", "\u202e"}


def test_hostile_names_of_sites():
    name = "<b>[red]\n"
    posterior = Posterior([trace_of(**{name: "a"})], torch.zeros(1), [0])
    assert "<b>[red]\\n" in repr(posterior)
    assert "&lt;b&gt;[red]\\n" in posterior._repr_html_()


def test_continuous_sites_are_summarised():
    values = [0.0, 1.0, 2.0]
    traces = [trace_of(z="a", p=v, v=torch.tensor([v, 2 * v])) for v in values]
    posterior = Posterior(traces, torch.tensor([0.25, 0.5, 0.25]).log(), [0] * 3)
    summary = posterior.summary()
    assert list(summary["marginals"]) == ["z"]
    sd = math.sqrt(0.5)
    levels = {"5%": 0.0, "50%": 1.0, "95%": 2.0}
    assert summary["numeric"]["p"] == pytest.approx({"mean": 1.0, "sd": sd, "weight": 1, **levels})
    assert summary["numeric"]["v"]["mean"] == pytest.approx([1.0, 2.0])
    assert summary["numeric"]["v"]["95%"] == pytest.approx([2.0, 4.0])
    table = rows_of(posterior)
    assert ["number", "mean", "sd", "5%", "50%", "95%"] in table
    assert ["p", "1", "0.7071", "0", "1", "2"] in table
    assert ["v[1]", "2", "1.414", "0", "2", "4"] in table
    only = Posterior([trace_of(p=v) for v in values], torch.zeros(3), [None] * 3)
    assert "weight" not in repr(only) and ["p", "1", "0.8165", "0", "1", "2"] in rows_of(only)
    assert only._repr_html_().count("<table>") == 1


def test_a_continuous_site_in_one_branch_is_averaged_where_it_is():
    traces = [trace_of(p=0.5), trace_of(z="a"), trace_of(p=1.5)]
    posterior = Posterior(traces, torch.tensor([0.2, 0.6, 0.2]).log(), [0] * 3)
    assert posterior.summary()["numeric"]["p"] == pytest.approx(
        {"mean": 1.0, "sd": 0.5, "weight": 0.4, "5%": 0.5, "50%": 0.5, "95%": 1.5}
    )
    assert "p (in 40.0%)      1   0.5   0.5   0.5   1.5" in repr(posterior)


def test_bars_are_in_eighths():
    assert bar(1.0) == "█" * 10
    assert bar(0.0) == ""
    assert bar(1 / 80) == "▏"
    lengths = [len(bar(i / 80)) for i in range(81)]
    assert all(a <= b for a, b in itertools.pairwise(lengths))


def test_a_dead_or_bare_posterior_has_a_table():
    bare = Posterior([Trace()], torch.zeros(1), [None])
    assert repr(bare).splitlines()[0] == "Posterior: 1 sample, ESS 1.0 (100%)"
    assert bare.summary()["marginals"] == {} and bare.summary(joint=True)["rows"] == []
