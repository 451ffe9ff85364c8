from __future__ import annotations

import functools
import random
import warnings

import pytest
import torch
from architectures import FAST, SIZE, make_model, naive_log_probs

from lmppl.lm.batches.rows import CachedRows, PlainRows, Rows
from lmppl.lm.network.attention import ATTENTION, PrefixCache
from lmppl.lm.network.runner import NO_PROMPT, Runner, common_length, padded

LONG = tuple((7 * i + i * i) % SIZE for i in range(30))


def random_tokens(n, seed):
    generator = random.Random(seed)
    return tuple(generator.randrange(SIZE) for _ in range(n))


def assert_naive(model, rows, sequences):
    got = torch.log_softmax(rows.logits.float(), -1)
    want = torch.stack([naive_log_probs(model, s)[-1] for s in sequences])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def grow(model, rows, sequences, steps, selections):
    """Extend by random tokens and select in between; compare each step with the naive pass (over
    the longest sequences, which have all steps of their beginnings too)."""
    generator = random.Random(1)
    seen = []
    for step in range(steps):
        if step in selections:
            rows.select(selections[step])
            sequences = [sequences[i] for i in selections[step]]
        assert len(rows) == len(sequences)
        seen += zip([step] * len(rows), sequences, rows.logits.clone(), strict=True)
        new = [generator.randrange(SIZE) for _ in sequences]
        rows.extend(torch.tensor(new) if step % 2 else new)
        sequences = [(*s, t) for s, t in zip(sequences, new, strict=True)]
    seen += zip([steps] * len(rows), sequences, rows.logits, strict=True)
    naive = {}
    for step, sequence, logits in reversed(seen):
        if sequence not in naive:
            log_probs = naive_log_probs(model, sequence)
            naive |= {sequence[: i + 1]: log_probs[i] for i in range(len(sequence))}
        got = torch.log_softmax(logits.float(), -1)
        torch.testing.assert_close(
            got,
            naive[sequence],
            atol=1e-4,
            rtol=0,
            msg=lambda said, step=step: f"step {step}: {said}",
        )


PREFIXES = {
    "one": [LONG],
    "one token": [(5,)],
    "equal": [LONG[:12]] * 4,
    "ragged suffixes": [LONG[:20] + random_tokens(n, n) for n in (3, 1, 7, 4, 4)],
    "one is the prefix of another": [LONG[:9], LONG[:20], LONG[:9], LONG[:21]],
    "equal suffixes, other prefixes": [random_tokens(4, s) + LONG[:6] for s in range(4)],
    # two long prefixes in turn, each shared by several rows: two groups in one batch
    "groups": [(s, *random_tokens(40 + 9 * s, s), 3 + n) for n in range(3) for s in (0, 1)],
    "groups of one length": [(s, *random_tokens(50, s), n) for n in (3, 3, 5) for s in (0, 1)],
    "nothing shared": [random_tokens(n, 50 + n) for n in (1, 12, 5, 12)],
}


@functools.cache
def model_and_runner(name):
    model = make_model(name)
    return model, Runner(model)


@pytest.mark.parametrize("prefixes", PREFIXES.values(), ids=PREFIXES)
@pytest.mark.parametrize("name", FAST)
def test_equals_a_naive_forward_pass(name, prefixes):
    model, runner = model_and_runner(name)
    runner.forget()
    rows = Rows.start(runner, prefixes, 12)
    assert isinstance(rows, CachedRows)
    n = len(prefixes)
    gather = [n - 1, 0, n - 1, *range(n)]  # more rows than before
    # in place: the last row is copied into the first row's place, and one row dropped
    shrink = [n + 2, *range(1, n + 2)]
    grow(model, rows, prefixes, 12, {3: gather, 5: shrink, 8: [0], 9: [0, 0, 0]})


@pytest.mark.parametrize("prefixes", PREFIXES.values(), ids=PREFIXES)
@pytest.mark.parametrize("name", FAST)
def test_static_steps_equal_a_naive_forward_pass(name, prefixes, monkeypatch):
    """What CUDA records, step by step on the CPU."""
    monkeypatch.setattr("lmppl.lm.batches.rows._STATIC_DEVICES", {"cpu"})
    model, runner = model_and_runner(name)
    runner.forget()
    rows = Rows.start(runner, prefixes, 14)
    n = len(prefixes)
    gather = [n - 1, 0, n - 1, *range(n)]  # more rows than before
    drop = [i for i in range(n + 3) if i != 1]  # their places stay
    again = [0, 0, *range(2, n + 2)]  # as many rows as before, one of them twice
    swap = [1, 0, *range(2, n + 2)]
    selections = {3: gather, 4: drop, 6: again, 7: swap, 9: [1, 0], 10: [1], 12: [0, 0]}
    grow(model, rows, prefixes, 14, selections)


def test_static_steps_go_on_in_the_same_memory_while_few_rows_are_dropped(monkeypatch):
    monkeypatch.setattr("lmppl.lm.batches.rows._STATIC_DEVICES", {"cpu"})
    rows = Rows.start(Runner(make_model("llama")), [LONG] * 8, 10)
    rows.extend([1] * 8)
    step, keys = rows._step, rows._buffers[0][0]
    rows.select([7, 1, 2, 3, 5])  # drops and reorders
    rows.extend([2] * 5)
    assert rows._step is step and rows._buffers[0][0] is keys and len(rows) == 5
    rows.select([0, 1])
    rows.extend([3] * 2)
    assert rows._step is not step and rows._buffers[0][0].shape[0] == 2
    step, keys = rows._step, rows._buffers[0][0]
    rows.select([1, 1])  # resampled
    rows.extend([4] * 2)
    assert rows._step is step and rows._buffers[0][0] is keys


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_buffers_grow(name, static, monkeypatch):
    if static:
        monkeypatch.setattr("lmppl.lm.batches.rows._STATIC_DEVICES", {"cpu"})
    model = make_model(name)
    prefixes = [LONG, LONG[:25] + (1, 2)]
    rows = Rows.start(Runner(model), prefixes, 150)
    grow(model, rows, prefixes, 150, {70: [1, 0, 0]})


def test_more_tokens_than_were_promised():
    model = make_model("llama")
    rows = Rows.start(Runner(model), [LONG], 2)
    grow(model, rows, [LONG], 5, {})


@pytest.mark.parametrize("static", [False, True])
def test_padding_never_leaves_the_models_positions(static, monkeypatch):
    """A long prompt beside short ones, and rows that run on after they were dropped."""
    if static:
        monkeypatch.setattr("lmppl.lm.batches.rows._STATIC_DEVICES", {"cpu"})
    model = make_model("gpt2")  # a table of 256 positions
    long = random_tokens(250, 1)
    prefixes = [*[(*long, k) for k in range(3)], *[random_tokens(100, 9 + k) for k in range(3)]]
    rows = Rows.start(Runner(model), prefixes, 20)
    grow(model, rows, prefixes, 20, {4: [3, 4, 5]})


def test_steps_go_on_after_rows_of_several_prompts_are_resampled(monkeypatch):
    monkeypatch.setattr("lmppl.lm.batches.rows._STATIC_DEVICES", {"cpu"})
    rows = Rows.start(Runner(make_model("llama")), PREFIXES["groups"], 4)
    rows.extend([1] * 6)
    step, offsets = rows._step, rows._cache._offsets
    rows.select([0, 1, 0, 1, 2, 3])
    rows.extend([1] * 6)
    # What a recorded step reads must stay where it is.
    assert rows._step is step and rows._cache._offsets is offsets


def test_each_prefix_of_a_batch_is_held_once():
    model = make_model("llama")
    runner = Runner(model)
    prefixes = PREFIXES["groups"]
    rows = Rows.start(runner, prefixes, 4)
    groups = rows._cache.groups
    assert [group.num_rows for group in groups] == [3, 3]
    assert [group.length for group in groups] == [41, 50]
    assert rows._capacity <= 5  # of the last token and the new ones
    rows.select([1, 3, 1])  # one group is gone
    assert [(group.num_rows, group.length) for group in rows._cache.groups] == [(3, 50)]
    assert_naive(model, rows, [prefixes[1], prefixes[3], prefixes[1]])


def test_batch_size_changes_nothing():
    model = make_model("llama")
    runner = Runner(model)
    prefixes = [LONG[:10] + random_tokens(3, seed) for seed in range(40)]
    many = Rows.start(runner, prefixes, 4)
    for n in (0, 17, 39):
        alone = Rows.start(runner, [prefixes[n]], 4)
        torch.testing.assert_close(many.logits[n], alone.logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_model_is_not_changed(implementation):
    model = make_model("llama", frozen=False).train()
    model.set_attn_implementation(implementation)
    head, state = model.lm_head, {k: v.clone() for k, v in model.state_dict().items()}
    rows = Rows.start(Runner(model), [LONG, LONG[:20]], 4)
    rows.extend([1, 2])
    assert model.config._attn_implementation == implementation
    assert model.model.config._attn_implementation == implementation
    assert model.lm_head is head and model.get_output_embeddings() is head
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not rows.logits.requires_grad


def test_runner_shares_the_parameters():
    model = make_model("llama")
    runner = Runner(model)
    assert {id(p) for p in runner._model.parameters()} == {id(p) for p in model.parameters()}
    assert runner.fast
    assert runner._fast_model.config._attn_implementation == ATTENTION
    assert {id(p) for p in runner._fast_model.parameters()} == {id(p) for p in model.parameters()}


def test_inference_mode_does_not_leak():
    model = make_model("llama")
    runner = Runner(model)
    with torch.inference_mode():
        rows = Rows.start(runner, [LONG] * 3, 4)
    assert not rows.logits.is_inference()
    assert not any(
        t.is_inference() for p in runner._prompts.values() for kv in p.layers for t in kv
    )
    rows.extend([1, 2, 3])
    rows.select([2, 2, 0])


def test_autocast_changes_nothing():
    model = make_model("llama")
    runner = Runner(model)
    want = Rows.start(runner, [LONG] * 3, 4).logits
    with torch.autocast("cpu", torch.bfloat16):
        got = Rows.start(Runner(model), [LONG] * 3, 4).logits
    assert torch.equal(got, want)


def test_empty_prefix():
    with pytest.raises(ValueError, match="site 'z': the prefix has no tokens"):
        Runner(make_model("llama")).check_request(0, 4, "z")


# Prompts


def test_prompt_is_read_once():
    runner = Runner(make_model("llama"))
    assert runner.fast
    before = runner.computed_tokens
    Rows.start(runner, [LONG] * 50, 4)
    assert runner.computed_tokens - before == len(LONG)
    Rows.start(runner, [LONG] * 50, 4)  # remembered: only the last token, for its logits
    assert runner.computed_tokens - before == len(LONG) + 1
    longer = LONG + (3, 1)
    Rows.start(runner, [longer] * 50, 4)
    assert runner.computed_tokens - before == len(LONG) + 1 + 3


def test_prompts_are_told_apart_by_all_their_tokens():
    model = make_model("llama")
    runner = Runner(model)
    for first in range(4):
        prefix = (first, *LONG[1:])  # the same suffix
        assert_naive(model, Rows.start(runner, [prefix] * 20, 4), [prefix] * 20)
    assert len(runner._prompts) == 4


def test_prompt_is_cut_and_extended():
    model = make_model("qwen2")
    runner = Runner(model)
    for prefix in (LONG, LONG[:15], LONG[:12] + LONG[:15], LONG[:12] + LONG[:17]):
        assert_naive(model, Rows.start(runner, [prefix] * 20, 4), [prefix] * 20)


def test_prompt_memory_is_bounded():
    model = make_model("llama")
    runner = Runner(model)
    one = runner.fast and runner.prompt(LONG).num_bytes
    runner = Runner(model, max_prompt_bytes=2 * one)
    assert runner.fast
    for first in range(5):
        runner.prompt((first, *LONG[1:]))
    assert [tokens[0] for tokens in runner._prompts] == [3, 4]
    assert runner._prompt_bytes == 2 * one
    runner.prompt(LONG + LONG + LONG)  # too large to keep
    assert len(runner._prompts) <= 2


def by_an_optimiser(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.5).step()


WRITES = {
    "in place": lambda weight: weight.mul_(-1),
    "data": lambda weight: weight.data.mul_(-1),  # leaves no trace in the version
    "optimiser": by_an_optimiser,
}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_prompts_are_remembered_until_weights_change(frozen, write):
    model = make_model("llama", frozen=frozen)
    runner = Runner(model)
    Rows.start(runner, [LONG] * 20, 4)
    before = runner.computed_tokens
    Rows.start(runner, [LONG] * 20, 4)
    assert runner.computed_tokens - before == 1
    with torch.no_grad():
        write(model.model.layers[0].self_attn.k_proj.weight)
    assert_naive(model, Rows.start(runner, [LONG] * 20, 4), [LONG] * 20)


def test_weights_frozen_for_a_while():
    model = make_model("llama")
    runner = Runner(model)
    Rows.start(runner, [LONG] * 20, 4)
    weight = model.model.layers[0].self_attn.k_proj.weight.requires_grad_(True)
    Rows.start(runner, [LONG] * 20, 4)
    weight.data.mul_(-1)
    weight.requires_grad_(False)
    assert_naive(model, Rows.start(runner, [LONG] * 20, 4), [LONG] * 20)


# The slow path


def test_slow_path_warns_once_and_is_right():
    model = make_model("bloom")
    runner = Runner(model)
    prefixes = [LONG, LONG[:9], LONG]
    with pytest.warns(UserWarning, match="Bloom.* slow path.*0 of its 2 layers"):
        rows = Rows.start(runner, prefixes, 4)
    assert isinstance(rows, PlainRows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grow(model, rows, prefixes, 4, {1: [0, 2, 1, 1], 2: [3]})
        Rows.start(runner, prefixes, 4)


def test_plain_rows_equal_cached_rows():
    runner = Runner(make_model("gemma2"))
    prefixes = [LONG, LONG[:9], LONG[:20]]
    cached, plain = Rows.start(runner, prefixes, 4), PlainRows(runner, prefixes, 4)
    for tokens in ([1, 2, 3], [4, 5, 6]):
        torch.testing.assert_close(cached.logits, plain.logits, atol=1e-4, rtol=0)
        cached.extend(tokens)
        plain.extend(tokens)
    torch.testing.assert_close(cached.logits, plain.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"sliding_window": 4096}, "sliding window"),
        ({"num_hidden_layers": 4}, "of its 4 layers"),
    ],
)
def test_probe_refuses(change, reason):
    model = make_model("llama")
    runner = Runner(model)
    for key, value in change.items():
        setattr(runner._model.config, key, value)
    with pytest.warns(UserWarning, match=reason):
        assert not runner.fast


def test_probe_compares_logits(monkeypatch):
    monkeypatch.setattr(PrefixCache, "bias", lambda *_: None)
    with pytest.warns(UserWarning, match="not those of the plain model|can't be reached"):
        assert not Runner(make_model("llama")).fast


def test_prompt_learning_is_refused():
    from peft import PromptTuningConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        model = get_peft_model(make_model("llama"), config)
    with pytest.raises(ValueError, match="prompt-learning"):
        Runner(model)


def test_helpers():
    assert common_length((1, 2, 3), (1, 2, 4)) == 2
    assert common_length((1, 2, 3), (1, 2, 3, 4), 2) == 2
    assert common_length((), (1,)) == 0
    assert padded([(1,), (2, 3)], torch.device("cpu")).tolist() == [[1, 0], [2, 3]]
    assert NO_PROMPT.head(0) is NO_PROMPT and NO_PROMPT.num_bytes == 0


@pytest.mark.parametrize("name", FAST)
def test_long_passes_are_taken_in_blocks(name, monkeypatch):
    import lmppl.lm.network.attention as attention

    monkeypatch.setattr(attention, "_MAX_SCORES", 2000)
    model = make_model(name)
    runner = Runner(model)
    assert runner.fast
    runner.prompt(LONG[:12])
    prefixes = [LONG, LONG[:28] + (1, 2, 3)]
    grow(model, Rows.start(runner, prefixes, 3), prefixes, 3, {})


@pytest.mark.parametrize("name", FAST)
def test_bfloat16_differs_by_rounding_only(name):
    model = make_model(name).bfloat16()
    runner = Runner(model)
    assert runner.fast, runner.slow_reason
    prefixes = [LONG, LONG[:25], LONG]
    rows = Rows.start(runner, prefixes, 3)
    rows.extend([1, 2, 3])
    assert rows.logits.dtype == torch.bfloat16
    want = torch.stack(
        [naive_log_probs(model, (*p, t))[-1] for p, t in zip(prefixes, [1, 2, 3], strict=True)]
    )
    got = torch.log_softmax(rows.logits.float(), -1)
    assert float((got - want).abs().mean()) < 0.1
