"""Tiny models: real, reproducible, and sensitive to their prefix."""

import itertools
import time

import pytest
import torch

from lmppl.testing import tiny_byte_lm, tiny_lm


def next_probs(lm, length):
    """Next-token distributions after every prefix of one length: prefixes (N, T), probs (N, V)."""
    size = lm.model.config.vocab_size
    prefixes = torch.tensor(list(itertools.product(range(size), repeat=length)))
    with torch.no_grad():
        return prefixes, lm.model(prefixes).logits[:, -1].softmax(-1)


@pytest.mark.parametrize("position", range(4))
def test_a_changed_token_moves_the_next_distribution(position):
    distances = []
    for seed in range(10):
        prefixes, probs = next_probs(tiny_lm(seed=seed), 4)
        table = {tuple(row): p for row, p in zip(prefixes.tolist(), probs, strict=True)}
        for row, p in table.items():
            changed = list(row)
            changed[position] = (changed[position] + 1) % 4
            distances.append(0.5 * float((p - table[tuple(changed)]).abs().sum()))
    assert sum(distances) / len(distances) > 0.3


def test_contrast_sets_the_spread_of_the_logits():
    _, flat = next_probs(tiny_lm(contrast=0.0), 3)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.25))
    _, sharp = next_probs(tiny_lm(contrast=4.0), 3)
    _, mild = next_probs(tiny_lm(contrast=1.0), 3)
    assert sharp.max(-1).values.mean() > mild.max(-1).values.mean() + 0.2


def test_equal_arguments_give_equal_weights_and_leave_the_random_state_alone():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, again, other = tiny_lm(seed=1), tiny_lm(seed=1), tiny_lm(seed=2)
    assert torch.equal(before, torch.random.get_rng_state())
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name])
    assert not torch.equal(first.model.lm_head.weight, other.model.lm_head.weight)


def test_a_forward_is_fast():
    lm = tiny_lm()
    ids = torch.tensor([[0, 1, 2, 1]])
    seconds = []
    with torch.no_grad():
        for _ in range(50):
            start = time.perf_counter()
            lm.model(ids, use_cache=False)
            seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.005  # about 1 ms on one core; the bound allows for a busy machine


def test_tokens_encode_longest_first_and_decode_by_concatenation():
    lm = tiny_lm(["a", "b", "ab", "b. "])
    assert lm.tokenizer("aabb. ")["input_ids"] == [0, 2, 3]
    assert lm.tokenizer.decode([0, 2, 3]) == "aabb. "
    assert lm.tokenizer.decode([0, 4, 1]) == "a<eos>b"


@pytest.mark.parametrize("lm", [tiny_lm("ab."), tiny_byte_lm()], ids=["characters", "bytes"])
def test_an_unknown_character_raises(lm):
    with pytest.raises(Exception, match="UNK"):
        lm.tokenizer("ax")


def test_bos_is_put_in_front_once():
    lm = tiny_lm("ab", bos=True)
    assert lm.tokenizer("ab")["input_ids"] == [3, 0, 1]
    assert lm.tokenizer("ab", add_special_tokens=False)["input_ids"] == [0, 1]
    assert tiny_lm("ab").tokenizer("ab")["input_ids"] == [0, 1]


def test_without_eos_nothing_is_called_eos():
    lm = tiny_lm("ab", eos=False)
    assert lm.model.config.vocab_size == 2
    assert lm.tokenizer.eos_token_id is None
    assert lm.model.config.eos_token_id is None
    assert lm.model.generation_config.eos_token_id is None


def test_byte_tokens_split_characters():
    lm = tiny_byte_lm()
    assert lm.tokenizer("aé.è")["input_ids"] == [0, 2, 3, 5, 4]
    assert lm.tokenizer.decode([2, 3]) == "é"
    assert lm.tokenizer.decode([5, 4]) == ".è"
    assert lm.tokenizer.decode([0, 2]) == "a\ufffd"


def test_unused_logits_have_probability_and_no_text():
    lm = tiny_lm("ab", unused_logits=2)
    _, probs = next_probs(lm, 1)
    assert probs.shape[-1] == 5
    assert (probs[:, 3:] > 0).all()
    assert lm.tokenizer.decode([4]) == ""


@pytest.mark.parametrize("tokens", ["", ["a", ""], "aa", ["a", "<eos>"]])
def test_bad_tokens_are_refused(tokens):
    with pytest.raises(ValueError, match="token"):
        tiny_lm(tokens)
