"""Every benchmark runs on a tiny model, and its results are kept and reported. No times."""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys

import pytest
import torch

import lmppl
from benchmarks import __main__ as command
from benchmarks import measuring, overhead, plots, report, scoring, smc, smc_guide, suite
from benchmarks.bench import Bench
from benchmarks.infilling_task import Task
from benchmarks.measuring import Local, Timed, in_turns, ratios
from benchmarks.outside import Clock
from benchmarks.overhead import Case, Import, Side
from benchmarks.peers import gfn_lm_tuning
from benchmarks.peers.process import PeerContender, PeerProcess
from benchmarks.products import Products
from benchmarks.results import LOCAL, Goal, Result, Row, Skipped, load_all
from lmppl.lm.batches.requests import Score
from lmppl.testing import tiny_lm

CPU = torch.device("cpu")
FACTS = {
    "mode": "full",
    "repeats": 5,
    "model": "a model",
    "dtype": "float32",
    "machine": "A processor, 2 cores",
    "threads": 2,
    "load": 0.5,
    "memory": "the kernel's record",
    "python": "3.11.9",
    "versions": {"torch": "2.13.0"},
    "date": "2025-06-01T12:00:00+00:00",
    "revision": "abcdef123456",
    "engine_bytes": 5 << 20,
}
PEER = """
import json, sys
print(json.dumps({"name": "1.0"}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["number"] == 3:
        sys.exit("it is over")
    answer = {"seconds": 0.5, "tokens": 10 * request["number"]}
    print(json.dumps({**answer, "peak_bytes": 7 if request["peak"] else None}), flush=True)
"""


@pytest.fixture(scope="module", autouse=True)
def _garbage_of_this_module_only():
    """Benchmarks collect garbage before they measure. What other tests have left, which takes a second
    to look at, need not be looked at each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def bench(tmp_path):
    return Bench(
        tiny_lm("ab.@", seed=1),
        mode="smoke",
        passage="abba.bab.aab.bba.",
        genlm_python=tmp_path / "python",
        gfn_lm_tuning=tmp_path / "gfn-lm-tuning",
    )


def sampling_row(**options):
    ours = Timed("lmppl", [1.0, 2.0, 1.0], [64] * 3, 5 << 20)
    other = Timed("generate", [3.0, 8.0, 5.0], [64] * 3)
    return Row.of("64 tokens", [ours, other], ratios(other, ours), unit="x", **options)


def sampling_result(**options):
    rows = [sampling_row(goal=Goal(3.0), note="a note")]
    return Result("sampling", "Sampling", "times faster", FACTS, rows, **options)


@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name == "ray_actors" else name  # starts Ray
        for name in suite.BENCHMARKS
    ],
)
def test_each_benchmark_runs_or_says_why_not(bench, name):
    result = suite.run(name, bench)
    if name in ("smc", "gflownet"):
        assert "make bench-peers" in result.skipped and not result.rows
    else:
        assert result.rows and result.skipped is None
    for row in result.rows:
        assert all(seconds > 0 for side in row.sides for seconds in side.seconds)
        assert row.value is None or math.isfinite(row.value)
    assert result.title in report.machine_report([result], [])


@pytest.mark.slow
def test_both_sides_do_the_same_work(bench):
    for name in ("sampling", "scoring", "decode"):
        for row in suite.run(name, bench).rows:
            assert len({tuple(side.tokens) for side in row.sides}) == 1, row
            assert row.sides[0].tokens[0] > 0


def test_the_alternatives_score_the_same_at_each_batch_size(bench):
    x, z, y = bench.tokens(6), bench.random_tokens(4, 2, 1), bench.random_tokens(4, 3, 2)
    ids = torch.tensor([(*x, *a, *b) for a, b in zip(z, y, strict=True)])
    requests = [Score(x, (*a, *b)) for a, b in zip(z, y, strict=True)]
    expected = torch.stack([scored.log_probs for scored in bench.lm.score(requests)])
    with torch.no_grad():
        for log_probs in (scoring._plain(bench), scoring._careful(bench)):
            torch.testing.assert_close(log_probs(ids, 6), expected, atol=1e-4, rtol=0)
    rows = scoring.compare(bench, 4, 6, 2, 3, [1, 2])
    assert all(row.sides[1].label[-1] in "12" for row in rows)


def test_a_skipped_benchmark_is_reported():
    result = Result(
        "smc",
        "SMC",
        "times",
        FACTS,
        skipped="genlm-control is not installed: `make bench-peers` does it",
    )
    text = report.machine_report([sampling_result(), result], [])
    assert "float32: skipped. genlm-control is not installed: `make bench-peers` does it." in text


def test_a_result_is_what_was_saved(tmp_path):
    result = sampling_result()
    path = result.save(tmp_path / "new" / "folder")
    assert path.name == "sampling.float32.json"
    assert load_all(path.parent) == [result] and Result.load(path) == result
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert json.loads(path.read_text())["circumstances"]["revision"] == "abcdef123456"


def test_ratios_are_those_of_neighbouring_repetitions():
    row = sampling_row()
    assert row.value == 4.0 and row.spread == (3.0, 5.0)
    ours, other = Timed("a", [1.0], [10]), Timed("b", [1.0], [5])
    assert ratios(other, ours) == [2.0]  # by token


def test_the_table_shows_values_and_goals():
    text = report.table([sampling_result()])
    assert "| 4.0 (3.0 to 5.0) | at least 3: met |" in text
    assert "1 s (64 tokens/s) | 5 MB | generate: 5 s (13 tokens/s) | not measured" in text
    assert "- 64 tokens, float32: a note." in text
    assert "full run of 2025-06-01, 3 repetitions, revision abcdef123456, load 0.5" in text
    missed = Row("x", [Timed("lmppl", [1.0], [0])], 0.2, None, "%", Goal(0.1, at_least=False))
    text = report.table([Result("outside", "Outside", "share", FACTS, [missed])])
    assert "| 20% | at most 10%: **missed** |" in text
    unknown = Row("x", [Timed("lmppl", [1.0], [0])], None, None, "bytes", Goal(8 << 30, False))
    text = report.table([Result("resampling", "Memory", "memory", FACTS, [unknown])])
    assert "| not measured | at most 8.0 GB |" in text


def test_the_page_gets_published_results_only(tmp_path):
    page = "before\n<!-- results:begin -->\nold\n<!-- results:end -->\nafter\n"
    images = tmp_path / "images"
    sampling_result().save(tmp_path / LOCAL)
    content = report.published(tmp_path, images)
    assert "No machine's results" in content
    sampling_result().save(tmp_path / "a-machine")
    content = report.published(tmp_path, images)
    updated = report.update(page, content)
    assert "### a-machine" in updated and "A processor, 2 cores" in updated and "old" not in updated
    assert updated.startswith("before\n") and updated.endswith("after\n")
    assert report.update(updated, content) == updated
    with pytest.raises(ValueError, match="results:begin"):
        report.update("a page", content)
    with pytest.raises(FileNotFoundError):
        report.results_of(tmp_path / "nothing")


def test_goals_are_not_published(tmp_path):
    sampling_result().save(tmp_path / "a-machine")
    assert "| goal |" in report.table(report.results_of(tmp_path / "a-machine"))
    assert "goal" not in report.published(tmp_path, tmp_path / "images")
    assert "goal" not in (tmp_path / "images/a-machine-ratios.svg").read_text()


def test_the_page_of_the_docs_has_the_markers():
    assert report.update(report.PAGE.read_text(), "text")


@pytest.mark.slow
def test_plots(bench, tmp_path):
    pytest.importorskip("matplotlib")
    results = [sampling_result(), suite.run("decode", bench), suite.run("scaling", bench)]
    drawn = plots.draw(results, tmp_path, "a-machine")
    names = [name for name, _ in drawn]
    assert names == ["a-machine-ratios.svg", "a-machine-decode.svg", "a-machine-scaling.svg"]
    first = [(tmp_path / name).read_bytes() for name in names]
    plots.draw(results, tmp_path, "a-machine")
    assert [(tmp_path / name).read_bytes() for name in names] == first
    assert plots.draw([], tmp_path, "nothing") == []


def test_contenders_take_turns():
    calls = []

    def work(label):
        def do(number):
            calls.append((label, number))
            return 3

        return Local(do, CPU)

    timed = in_turns({"a": work("a"), "b": work("b")}, 2)
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert [side.label for side in timed] == ["a", "b"]
    assert [side.tokens for side in timed] == [[3, 3], [3, 3]]


@pytest.mark.parametrize("recorded", [True, False])
def test_peak_memory_is_that_of_what_runs(recorded, monkeypatch):
    if not recorded:
        monkeypatch.setattr(measuring, "_reset_resident_peak", lambda: False)
    elif not measuring._reset_resident_peak():
        pytest.skip("the kernel does not let go of the recorded peak")

    def use():
        used = torch.ones(64 << 20, dtype=torch.uint8)
        return float(used[::4096].sum())

    measuring.with_peak(use, CPU)
    result, peak = measuring.with_peak(use, CPU)
    assert result == (64 << 20) / 4096
    if peak is not None:
        assert peak > (48 << 20 if recorded else 0)
        assert peak < 128 << 20
    held = []
    grown = measuring.kept(lambda: held.append(torch.ones(64 << 20, dtype=torch.uint8)), CPU)
    assert grown is None or 48 << 20 < grown < 128 << 20
    assert measuring.memory_method(CPU)


def test_products_are_those_of_the_linear_layers(bench):
    products = Products(bench.lm.model)
    linear = [m for m in bench.lm.model.modules() if isinstance(m, torch.nn.Linear)]
    assert products.size == sum(m.weight.numel() for m in linear)
    assert products.flops(3) == 6 * products.size
    products.run(products.inputs(3))
    with pytest.raises(ValueError, match="no linear layers"):
        Products(torch.nn.ReLU())


def test_prompts_have_the_length_that_was_asked_for(bench):
    for number in range(5):
        assert len(bench.tokens(7, number)) == 7
        assert len(bench.lm.encode(bench.text(7, number))) == 7
    assert bench.tokens(40, 1)[:13] != bench.tokens(40, 0)[:13]
    assert len(set(bench.random_tokens(20, 12))) == 20


def test_the_clock_counts_once_and_restores():
    class Owner:
        def outer(self):
            return self.inner()

        def inner(self):
            return 5

    plain = Owner.outer
    clock = Clock(CPU)
    with clock.wrapping(Owner, "outer", "inner"):
        assert Owner.outer is not plain
        assert Owner().outer() == 5
    assert Owner.outer is plain and clock.seconds > 0


def test_costs_are_compared_by_trace():
    class Fixed:
        def __init__(self, *seconds):
            self.seconds = seconds

        def warm_up(self):
            return None

        def repeat(self, number):
            return self.seconds[number - 1], 0

    sides = Side("ours", Fixed(6.0, 2.0, 8.0), 4), Side("other", Fixed(1.0, 1.0, 1.0), 2)
    row = Case("three sites", *sides, 2.5).measure(3)
    assert (row.value, row.spread) == (3.0, (1.0, 4.0)) and not row.goal.met_by(row.value)
    assert row.note == "a trace, 1.5e+03 ms against 500 ms"


def test_imports_are_timed_in_a_process_of_their_own():
    seconds, _ = Import("json").repeat(1)
    assert 0 < seconds < 60
    with pytest.raises(subprocess.CalledProcessError):
        Import("no_such_module").repeat(1)


def test_many_particles_of_the_chain_are_replaced(monkeypatch):
    replaced = []
    settle = lmppl.engines.smc.settle_in_place

    def counting(ancestors, *args):
        replaced.append(len(ancestors) - len(set(map(int, ancestors))))
        return settle(ancestors, *args)

    monkeypatch.setattr("lmppl.engines.smc.settle_in_place", counting)
    options = {
        "method": "smc",
        "ess_threshold": 1.0,
        "num_samples": 16,
        "seed": 0,
        "progress": False,
    }
    lmppl.infer(overhead.chain, 12, lm=overhead.frozen_lm(), **options)
    assert len(replaced) == 11 and 5 < sum(replaced) / len(replaced) < 11  # of 16


def test_a_peer_answers_line_by_line():
    with PeerProcess([sys.executable, "-c", PEER]) as peer:
        assert peer.hello == {"name": "1.0"}
        contender = PeerContender(peer, lambda number: {"number": number})
        assert contender.warm_up() == 7
        assert contender.repeat(2) == (0.5, 20)
        with pytest.raises(RuntimeError, match="it is over"):
            contender.repeat(3)
    with pytest.raises(RuntimeError, match="has ended"):
        PeerProcess([sys.executable, "-c", "raise SystemExit('no')"])


def test_a_checkout_is_imported_without_what_it_does_not_need(tmp_path):
    with pytest.raises(FileNotFoundError):
        gfn_lm_tuning.load_utils(tmp_path)
    path = tmp_path / "next_sentence" / "utils.py"
    path.parent.mkdir()
    path.write_text("import editdistance\nfrom sentence_transformers.util import cos_sim\nX = 1\n")
    assert gfn_lm_tuning.load_utils(tmp_path).X == 1
    assert "editdistance" not in sys.modules and "sentence_transformers" not in sys.modules


class Utils:
    """Stands in for gfn-lm-tuning: its functions' signatures, and just enough of what they do."""

    class FrozenModelSentenceGivenPrompt:
        def __init__(self, sentence_token_id, min_len):
            assert min_len == 1

        def score(self, batch, prompt_length, model, tokenizer):
            reward = torch.zeros(len(batch), batch.shape[1] - prompt_length + 1)
            return reward, reward

    @staticmethod
    def generate_and_return_termination_logprob(
        model, encoded_prompt, termination_token_id, reward_fn, max_len, min_len
    ):
        other = termination_token_id - 1
        row = torch.tensor([[other] * max_len + [termination_token_id]])
        text = torch.cat([encoded_prompt, row.expand(len(encoded_prompt), -1)], 1)
        log_p = model(input_ids=text).logits.log_softmax(-1)[:, -max_len - 1 :]
        log_r, unpenalized = reward_fn(text[:, :-1])
        return text, log_p[..., other], log_p[..., termination_token_id], log_r, unpenalized

    @staticmethod
    def modified_subtb_loss(
        log_pf, log_r, log_pterm, generated_text, termination_token_id, prompt_len
    ):
        assert log_pf.shape == log_r.shape == log_pterm.shape
        return (log_pf + log_pterm - log_r).square().mean()


def test_gflownet_steps(bench, monkeypatch):
    monkeypatch.setattr(gfn_lm_tuning, "load_utils", lambda checkout: Utils)
    rows = suite.run("gflownet", bench).rows
    assert [row.case.rsplit(", ")[-1] for row in rows] == ["on policy", "defaults"]
    for row in rows:
        assert row.sides[1].tokens == [4 * 4]  # nothing ends early
        assert 0 < row.sides[0].tokens[0] <= 9 * 4 * 4
        assert "truncations" in row.note and "optimizer" in row.note


def test_smc_of_lmppl(bench):
    for steered in (False, True):
        assert 3 <= smc.ours(bench, 3, 6, 4, steered=steered)(0) <= 12
    bench.genlm_python.touch()
    with pytest.raises(Skipped, match="in memory"):
        smc.run(bench)
    assert smc.eos_strings(bench) == ["<eos>"]


@pytest.mark.slow
def test_smc_with_a_guide(monkeypatch, tmp_path, capsys):
    lm = tiny_lm("ab.", seed=37, contrast=1.5)  # the ending says much of the text
    monkeypatch.setattr(lmppl.LM, "from_pretrained", lambda name, dtype: lm)
    lines = [f"{number:06b}".replace("0", "a").replace("1", "b") for number in range(6)]
    (tmp_path / "openings").write_text("\n".join(f"{line} ." for line in lines))
    out = tmp_path / "rows.json"
    options = {"pairs": 4, "held-out": 2, "inputs": 1, "seeds": 2, "tokens": 400, "steps": 2}
    options |= {"openings": tmp_path / "openings", "out": out}
    task = {"words": 1, "middle": 8, "ending": 24, "temperature": 1.0}
    options |= task
    argv = [f"--{name}={value}" for name, value in options.items()]
    monkeypatch.setattr(sys, "argv", ["smc_guide", *argv])
    smc_guide.main()
    rows = {row["method"]: row for row in json.loads(out.read_text())}
    assert list(rows) == list(smc_guide.METHODS)
    row = rows["prior"]
    exact = lmppl.infer(Task(**task).program, *row["texts"], lm=lm, method="exact").log_evidence
    for row in rows.values():
        assert row["tokens_a_run"] == pytest.approx(400, rel=0.5)
        assert row["log_mean_z"] == pytest.approx(exact, abs=0.4)
        assert row["mean_log_z"] <= row["log_mean_z"] and 0 < row["sd_log_z"] < 1
        assert 0 < row["ess"] <= 1 and len(row["log_z"]) == 2
    plain = rows["guide, importance"]
    assert rows["guide"]["log_z"] == pytest.approx(plain["log_z"], abs=1e-9)
    assert rows["prior"]["particles"] > rows["guide, flow every 4"]["particles"]
    before = out.read_text()
    capsys.readouterr()
    smc_guide.main()
    assert out.read_text() == before
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(rows) and all(line.startswith("|") for line in lines)


def test_the_command_line(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "make", lambda model, dtype, **options: bench)
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--smoke", "--only", "outside", "smc"])
    assert command.main() == 0
    printed = capsys.readouterr().out
    assert "three sites" in printed and "make bench-peers" in printed
    assert len(load_all(tmp_path / LOCAL)) == 2
    broken = suite.Benchmark("", "", lambda bench: 1 / 0)
    monkeypatch.setitem(suite.BENCHMARKS, "outside", broken)
    assert command.main() == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
