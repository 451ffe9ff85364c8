"""The task ``random_number``, on tiny language models."""

from __future__ import annotations

import math

import pytest

import lmppl
import random_number
from benchmarks import tasks
from lmppl.testing import naive_log_prob, tiny_lm
from paper.inputs import BadInput
from paper.rows import Results

LM = tiny_lm("0123456789.", seed=3, contrast=1.0)
PROMPT = "0.{most}."


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(lmppl.LM, "from_pretrained", lambda name, dtype=None: LM)
    monkeypatch.setattr(random_number, "PROMPT", PROMPT)


def test_the_posterior_is_uniform_and_the_evidence_the_number_of_numbers():
    exact = lmppl.infer(random_number.random_number, 19, lm=LM, method="exact")
    assert exact.log_evidence == pytest.approx(math.log(20), abs=1e-4)
    expected = {f"{number}.": 1 / 20 for number in range(20)}
    assert exact.probs("z") == pytest.approx(expected, rel=1e-4)


def test_the_law_of_the_prior_is_the_models():
    texts = random_number.numbers(19)
    found = random_number.law(None, (19,), LM, texts)
    prefix = LM.encode(PROMPT.format(most=19))
    expected = [math.exp(naive_log_prob(LM, prefix, LM.encode(text)).sum()) for text in texts]
    assert found["probabilities"] == pytest.approx(expected, rel=1e-3)
    assert found["valid"] == pytest.approx(sum(expected), rel=1e-4)
    shares = [p / sum(expected) for p in expected]
    kl = sum(p * math.log(20 * p) for p in shares)
    assert found["kl"] == pytest.approx(kl, rel=1e-3) and kl > 0.05
    assert found["exact_log_z"] == pytest.approx(math.log(20), abs=1e-4)


def test_each_number_has_one_token_sequence():
    random_number.check_unique(LM, random_number.numbers(100))
    with pytest.raises(BadInput, match=r"can write '10\.' by 2 token sequences"):
        random_number.check_unique(tiny_lm([*"0123456789.", "10"]), ["9.", "10."])
    with pytest.raises(BadInput, match=r"can write '1\.' by 0 token sequences"):
        random_number.check_unique(tiny_lm("0."), ["0.", "1."])


@pytest.mark.slow
def test_every_method(tmp_path, capsys):
    out = tmp_path / "rows.json"
    words = "--quick --most 9 --steps 32 --batch-size 32 --samples 64 --first 64 --method all --out"
    random_number.main([*words.split(), str(out)])
    rows = {row.method: row.figures for row in Results.load(out).rows}
    assert list(rows) == list(random_number.TASK.methods)
    assert rows["guide"]["valid"] > 3 * rows["prior"]["valid"]
    assert rows["guide"]["kl"] < rows["prior"]["kl"] / 2
    assert rows["guide"]["agrees"] == 1.0
    printed = capsys.readouterr().out
    assert "exact: log 10 = 2.303" in printed and "█" in printed
    pytest.importorskip("matplotlib")
    random_number.main([*words.split(), str(out), "--plot", str(tmp_path / "picture.png")])
    assert (tmp_path / "picture.png").stat().st_size > 1000
    assert "random_number-0.svg" in tasks.section(Results.load(out), tmp_path)


def test_a_prompt_that_does_not_fit_is_named(monkeypatch, capsys):
    short = tiny_lm("0123456789.", context_length=6)
    monkeypatch.setattr(lmppl.LM, "from_pretrained", lambda name, dtype=None: short)
    for words, message in (
        (["--most", "9999"], "with 5 more it does not fit the context"),
        (["--most", "0"], "argument --most"),
    ):
        with pytest.raises(SystemExit) as ended:
            random_number.main(words)
        assert ended.value.code == 2 and message in capsys.readouterr().err
