"""The slow reference, checked by hand."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmppl.testing import enumerate_site, naive_log_prob, tiny_byte_lm, tiny_lm

LM = tiny_lm("ab.", seed=1)
BYTES = tiny_byte_lm(seed=1)
A, B, DOT, EOS = range(4)


def by_hand(lm, prefix, tokens, temperature=1.0):
    """Each token by its own forward."""
    total, ids = 0.0, list(prefix)
    for token in tokens:
        with torch.no_grad():
            logits = lm.model(torch.tensor([ids])).logits[0, -1].double()
        total += float((logits / temperature).log_softmax(-1)[token])
        ids.append(token)
    return total


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_log_prob_equals_a_forward_per_token(temperature):
    tokens = (B, B, DOT, EOS, A)
    log_probs = naive_log_prob(LM, (A, B), tokens, temperature)
    assert log_probs.shape == (5,)
    expected = by_hand(LM, (A, B), tokens, temperature)
    assert float(log_probs.sum()) == pytest.approx(expected, abs=1e-5)
    assert naive_log_prob(LM, (A,), ()).shape == (0,)


def test_an_empty_prefix_is_refused():
    with pytest.raises(ValueError, match="empty prefix"):
        naive_log_prob(LM, (), (A,))


def test_a_bfloat16_model_is_scored_in_float32():
    lm = tiny_lm("ab.", seed=1)
    lm.model.to(torch.bfloat16)
    rounded = tiny_lm("ab.", seed=1)
    rounded.model.to(torch.bfloat16).to(torch.float32)
    tokens = (A, B, DOT)
    torch.testing.assert_close(
        naive_log_prob(lm, (B,), tokens), naive_log_prob(rounded, (B,), tokens)
    )
    assert lm.model.dtype == torch.bfloat16


def test_dropout_is_off_and_the_mode_is_restored():
    lm = tiny_lm("ab.", seed=1)
    lm.model.train()
    lm.model.model.layers[0].eval()
    naive_log_prob(lm, (A,), (B,))
    assert lm.model.training
    assert not lm.model.model.layers[0].training
    assert lm.model.model.layers[1].training


def test_a_site_is_enumerated_with_its_end():
    site = enumerate_site(LM, (A,), 2, ".")
    ends = {(DOT,), (EOS,)} | set(itertools.product((A, B), range(4)))
    assert set(site) == ends
    for tokens, log_prob in site.items():
        assert log_prob == pytest.approx(by_hand(LM, (A,), tokens), abs=1e-5)


def test_a_stop_string_may_span_tokens():
    site = enumerate_site(LM, (A,), 3, ["ba", ".."])
    assert (B, A) in site
    assert (A, B, A) in site
    assert not any(len(tokens) == 3 and tokens[:2] in {(B, A), (DOT, DOT)} for tokens in site)
    assert (DOT,) not in site


def test_a_stop_string_may_be_a_split_character():
    site = enumerate_site(BYTES, (0,), 3, "é")
    assert (2, 3) in site  # the two bytes of é
    assert (5, 3) in site  # one token brings "." and the first of them
    assert (3,) not in site  # the second half alone is no é
    assert (2, 4, 0) in site  # è goes on


def test_the_end_of_a_character_begun_in_the_prefix_is_no_stop():
    site = enumerate_site(BYTES, (0, 2), 2, "é")
    assert not any(tokens[0] == 3 and len(tokens) == 1 for tokens in site)


@settings(max_examples=30, deadline=None)
@given(
    lm=st.sampled_from([LM, BYTES, tiny_lm("ab", eos=False), tiny_lm("ab", unused_logits=1)]),
    prefix=st.lists(st.integers(0, 1), min_size=1, max_size=3),
    max_tokens=st.integers(1, 3),
    stop=st.lists(st.text("ab.é", min_size=1, max_size=2), max_size=2),
    temperature=st.floats(0.3, 3.0),
)
def test_probabilities_sum_to_one(lm, prefix, max_tokens, stop, temperature):
    site = enumerate_site(lm, prefix, max_tokens, stop, temperature)
    assert math.fsum(map(math.exp, site.values())) == pytest.approx(1.0, abs=1e-9)
    for first, second in itertools.combinations(site, 2):  # no value begins another
        assert first != second[: len(first)] and second != first[: len(second)]
