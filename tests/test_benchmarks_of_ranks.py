"""The benchmark of training in several processes: its arithmetic, and that it runs. No times."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from benchmarks import ranks
from benchmarks.ranks import Measured, OnPaper
from benchmarks.report import update

FACTS = {
    "machine": "A processor, 2 cores",
    "model": "a-model",
    "dtype": "float32",
    "steps": 4,
    "repeats": 2,
    "inputs_per_step": 4,
    "batch_size": 32,
    "max_tokens": 16,
    "versions": {"torch": "2.13.0"},
    "date": "2026-01-02T03:04:05+00:00",
    "revision": "abc",
}
FOUND = Measured(
    facts=FACTS,
    rates=[(10.0, 19.0), (10.0, 17.0)],
    apart=[19.5, 18.0],
    waiting=0.04,
    sending=0.01,
    gradient_bytes=20_000_000,
    told_bytes=5000.0,
    alone=[[2.0, 2.0], [2.0, 3.0], [2.0, 2.0], [2.0, 1.0]],
    messages={"small": 0.01, "gradient": 0.1, "told": 0.05, "taken in": 0.04},
    taken_in=0.001,
)


def test_what_is_found_of_two_and_of_four():
    assert FOUND.ratios == [1.9, 1.7]
    assert FOUND.ratios_apart == [1.95, 1.8]
    assert (FOUND.share, FOUND.slowest) == (2.0, 2.5)
    assert FOUND.of_four == pytest.approx(2.7)
    assert FOUND.spread == pytest.approx((0 + (2 / 3) ** 0.5) / 2 / 2)


def test_whoever_comes_last_does_not_wait():
    def rank(first, second):
        return {
            "seconds": [9.0, 2.0],
            "samples": [1, 8],
            "messages": [[["all_reduce", 9.0, 8]], [["all_reduce", first, 8], ["x", second, 8]]],
        }

    one, two = rank(0.5, 0.1), rank(0.1, 0.3)
    assert ranks.shares([one, two]) == pytest.approx((0.3 / 2, 0.2 / 2))
    assert ranks.rate(one) == 4.0


@pytest.mark.parametrize("gpus", [2, 8, 1000])
def test_what_travels_on_paper(gpus):
    row = OnPaper.of(FOUND, gpus)
    link = ranks.NVLINK if gpus <= 8 else ranks.NETWORK
    ring = 2 * (gpus - 1) / gpus * 20e6 / link
    assert row.gradient == pytest.approx(ring + 2 * (gpus - 1) * ranks.HOP_NCCL)
    assert row.told_bytes == gpus * 2 * 5000
    assert row.taken_in == pytest.approx(gpus * 2 * 0.001)
    assert row.seconds == pytest.approx(row.gradient + row.told + row.taken_in + row.small)
    nothing = replace(FOUND, told_bytes=0.0, taken_in=0.0)
    assert OnPaper.of(nothing, gpus).told == pytest.approx(2 * (gpus - 1) * ranks.HOP_TCP)


@pytest.mark.parametrize("seconds", [0.1, 1.0])
def test_where_it_ends(seconds):
    most = ranks.most_gpus(FOUND, seconds)
    assert OnPaper.of(FOUND, most).seconds <= seconds < OnPaper.of(FOUND, most + 1).seconds


def test_the_page_shows_it():
    text = ranks.report(FOUND)
    assert "| 2 | 18.00 | 1.80 (1.70 to 1.90) |" in text
    assert "20.0 MB of gradient" in text and "5.0 KB for each\ninput" in text
    assert "| 2 that do not talk | 18.75 | 1.88 (1.80 to 1.95) |" in text
    assert "a step of four takes 2.70 s, in which each does 74%" in text
    assert "| 1,000 | " in text and " | 10.00 MB | " in text
    page = ranks.PAGE.read_text()
    assert text in update(page, text, ranks.PART)
    if ranks.FILE.exists():
        assert update(page, ranks.report(ranks.load()), ranks.PART) == page


def test_what_was_found_is_read_again(tmp_path):
    (tmp_path / "file.json").write_text(json.dumps(asdict(FOUND)))
    assert ranks.report(ranks.load(tmp_path / "file.json")) == ranks.report(FOUND)


def test_two_processes_need_an_even_number_of_inputs(capsys):
    with pytest.raises(SystemExit):
        ranks.main(["--inputs-per-step", "3"])
    assert "must be even" in capsys.readouterr().err


@pytest.mark.long
def test_it_runs(capsys):
    ranks.main(["--quick"])
    printed = capsys.readouterr().out
    assert "| 1,000 | " in printed and "written" not in printed
