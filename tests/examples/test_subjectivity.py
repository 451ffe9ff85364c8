"""The task ``subjectivity``, on tiny language models."""

from __future__ import annotations

import argparse
import json
import string
from collections import Counter
from pathlib import Path

import pytest

import lmppl
import subjectivity
from lmppl.testing import tiny_lm
from paper.command import Run
from paper.inputs import BadInput
from paper.rows import Results

TOKENS = [*string.ascii_letters, *string.digits, *" .,'-\n:;()!?", " the story", " an opinion"]
LM = tiny_lm(TOKENS, seed=1, contrast=1.0, context_length=1024)
GOOD = {"text": "A cook opens a bar .", "label": 0, "label_text": "objective"}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(lmppl.LM, "from_pretrained", lambda name, dtype=None: LM)


def write(path: Path, *rows: object) -> Path:
    path.write_text(
        "\n".join(
            row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows
        )
    )
    return path


def test_the_sentences_that_ship_with_the_example():
    train, test = subjectivity.load(subjectivity.SENTENCES, 50, 100)
    assert len(train) == 50 and len(test) == 30
    assert not {text for text, _ in train} & {text for text, _ in test}
    for labelled in (train, train[:10], train[:20], test):
        assert set(Counter(label for _, label in labelled).values()) == {len(labelled) // 2}
    shown = {text for text, _, _ in subjectivity.WORKED}
    assert not shown & {text for text, _ in (*train, *test)}
    few, same = subjectivity.load(subjectivity.SENTENCES, 10, 100)
    assert few == train[:10] and same == test


def test_sentences_of_ones_own(tmp_path):
    rows = [{"text": f"Sentence {k} .", "label": k % 2} for k in range(12)]
    write(tmp_path / "train.jsonl", *rows)
    write(tmp_path / "train.4.jsonl", *rows[2:6])
    train, test = subjectivity.load(tmp_path, 4, 100)
    assert train == [(f"Sentence {k} .", subjectivity.LABELS[k % 2]) for k in range(2, 6)]
    assert {text for text, _ in test} == {f"Sentence {k} ." for k in (0, 1, *range(6, 12))}
    train, test = subjectivity.load(tmp_path, 2, 3)
    assert [text for text, _ in train] == ["Sentence 0 .", "Sentence 1 ."] and len(test) == 3
    assert not {text for text, _ in test} & {f"Sentence {k} ." for k in range(6)}
    write(tmp_path / "test.jsonl", {"text": "New .", "label": 1}, rows[3])
    assert subjectivity.load(tmp_path, 4, 100)[1] == [("New .", "subjective")]
    for labels, message in ((20, "has 12 labels, --labels 20 needs more"), (12, "held out")):
        (tmp_path / "test.jsonl").unlink(missing_ok=True)
        with pytest.raises(BadInput, match=message):
            subjectivity.load(tmp_path, labels, 3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 3: "),
        ("[1]", 'line 3: it should be {"text"'),
        ({"text": "No label ."}, 'line 3: it should be {"text"'),
        ({"label": 1}, 'line 3: it should be {"text"'),
        (GOOD | {"text": " "}, "line 3: \"text\" is ' '"),
        (GOOD | {"text": 3}, 'line 3: "text" is 3'),
        (GOOD | {"label": 2}, 'line 3: "label" is 2: it should be 0'),
        (GOOD | {"label": True}, 'line 3: "label" is True'),
        (GOOD | {"label": "objective"}, "line 3: \"label\" is 'objective'"),
        (GOOD | {"label": 0.0}, 'line 3: "label" is 0.0'),
        (GOOD | {"label": [0]}, 'line 3: "label" is [0]'),
        (GOOD | {"label": 1}, "line 3: \"label_text\" is 'objective', but label 1 is subjective"),
    ],
)
def test_a_bad_line_is_named(tmp_path, capsys, row, message):
    path = write(tmp_path / "train.jsonl", GOOD | {"text": "One\u2028line ."}, "", row)
    with pytest.raises(SystemExit) as ended:
        subjectivity.main(["--data", str(tmp_path), "--labels", "1"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and f"{path}, {message}" in error and "Traceback" not in error


def test_a_folder_without_sentences_is_named(tmp_path, capsys):
    for prepare, message in (
        (lambda path: None, "train.jsonl cannot be read"),
        (lambda path: path.write_text("\n\n"), "has no line of text"),
        (
            lambda path: write(path, GOOD | {"text": "long " * 500}, GOOD),
            "does not fit the context",
        ),
    ):
        prepare(tmp_path / "train.jsonl")
        with pytest.raises(SystemExit) as ended:
            subjectivity.main(["--data", str(tmp_path), "--labels", "1"])
        assert ended.value.code == 2 and message in capsys.readouterr().err


def test_the_guide_does_not_see_the_label():
    guide = subjectivity.reasons_guide(Run(LM, argparse.Namespace(), "guide", 0, {}))
    assert guide.observations(subjectivity.observed(("A cook opens a bar.", "objective"))) == {}


@pytest.mark.slow
def test_every_method(tmp_path, capsys):
    out = tmp_path / "rows.json"
    words = "--quick --steps 2 --batch-size 8 --labels 4 --held-out 2 --inputs 1 --samples 16"
    subjectivity.main([*words.split(), "--method", "all", "--out", str(out)])
    rows = {row.method: row for row in Results.load(out).rows}
    assert list(rows) == list(subjectivity.TASK.methods)
    for method, row in rows.items():
        assert 0 <= row.figures["share"] <= 1 and row.figures["accuracy"] in (0, 0.5, 1)
        assert ("ess" in row.figures) == (method in ("prior", "guide"))
        assert bool(row.tokens) == (method in ("guide", "em", "sft"))
    assert rows["prior"].figures["agrees"] == 1
    assert "guide: " in capsys.readouterr().out
