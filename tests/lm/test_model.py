"""LM: what a user holds. Prefixes, observed text, samples and densities of a tiny model."""

import functools
import math

import pytest
import torch
from transformers import LlamaForCausalLM

import lmppl
from lmppl.lm import LM, begin_draws
from lmppl.lm.batches.requests import Draw, Score
from lmppl.lm.loading import choose_device, choose_dtype
from lmppl.lm.tokens.stopping import Stopping
from lmppl.lm.tokens.text import Text
from lmppl.testing import tiny_lm

A, B, DOT, EOS, BOS = range(5)


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm("ab.", bos=True)


def text_of(lm: LM, *ids: int, **options: object) -> Text:
    return Stopping(lm.vocabulary, **options).text(ids)  # type: ignore[arg-type]


def naive(lm: LM, prefix: tuple[int, ...], ids: tuple[int, ...], temperature: float = 1.0) -> float:
    with torch.no_grad():
        logits = lm.model(torch.tensor([prefix + ids])).logits[0].float() / temperature
    steps = torch.log_softmax(logits, -1)[len(prefix) - 1 : -1]
    return float(sum(row[t] for row, t in zip(steps, ids, strict=True)))


# Construction.


def test_what_a_model_tells_of_itself(lm: LM) -> None:
    assert (lm.device, lm.dtype) == (torch.device("cpu"), torch.float32)
    assert (lm.context_length, lm.hidden_size) == (256, 64)
    assert lm.vocabulary.size == 5 and lm.vocabulary.eos_ids == {EOS}
    assert not lm.model.training
    assert repr(lm) == "LM('tiny-ab.-0', float32 on cpu)"


def test_a_model_with_an_adapter_says_so(lm: LM) -> None:
    from peft import IA3Config, LoraConfig

    small = lm.adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert sum(p.numel() for p in small.model.parameters() if p.requires_grad) == 896
    assert repr(small) == (
        "LM('tiny-ab.-0', float32 on cpu, with an adapter: LoRA of rank 2 on 4 layers, "
        "896 trainable parameters)"
    )
    other = lm.adapter(IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    assert "with an adapter: IA3 on 2 layers, 64 trainable parameters" in repr(other)
    assert "adapter" not in repr(lm) + repr(small.merged())


def test_decode_gives_the_texts_of_padded_ids(lm: LM) -> None:
    ids = torch.tensor([[[0, 1, -1], [2, -1, -1]], [[1, EOS, -1], [-1, -1, -1]]])
    texts = lm.decode(ids)
    assert texts == [["ab", "."], ["b", ""]]
    assert [text.token_ids for row in texts for text in row] == [(0, 1), (2,), (1, EOS), ()]
    assert [texts[0][0].finish_reason, texts[1][0].finish_reason] == [None, "eos"]
    text = lm.decode([0, 2, -1], stop=".")
    assert (text, text.body, text.finish_reason, text.stop) == ("a.", "a", "stop", ".")
    assert lm.encode(["ab", text])[-4:] == (0, 1, 0, 2)
    assert lm.decode(torch.zeros(0, 3, dtype=torch.long)) == []


@pytest.mark.parametrize(
    "ids, error, match",
    [
        ([0.0, 1.0], TypeError, "integers, given a tensor of torch.float32"),
        (3, ValueError, r"shape \(..., max_tokens\), given 3"),
        ([[0, -1, 1]], ValueError, r"\[0, -1, 1\] is no text .* from 0 to 4, and then only -1"),
        ([5], ValueError, r"\[5\] is no text"),
        ([EOS, 1], ValueError, "closes at token 1"),
    ],
)
def test_decode_refuses_what_is_no_text(lm: LM, ids, error, match) -> None:
    with pytest.raises(error, match=match):
        lm.decode(ids)


def test_eos_is_the_union_of_all_that_is_named() -> None:
    base = tiny_lm("abcd.")
    base.model.config.eos_token_id = [1, 99]  # 99 is not in the vocabulary: it cannot occur
    base.model.generation_config.eos_token_id = 2
    lm = LM(base.model, base.tokenizer)
    assert lm.vocabulary.eos_ids == {1, 2, base.tokenizer.eos_token_id}
    assert lm.vocabulary.eos_id == base.tokenizer.eos_token_id


def test_the_vocabulary_is_as_wide_as_the_logits() -> None:
    lm = tiny_lm("ab.", unused_logits=3)
    assert lm.vocabulary.size == lm.model.lm_head.weight.shape[0] == len(lm.tokenizer) + 3


def test_a_model_without_output_embeddings_is_refused(lm: LM) -> None:
    with pytest.raises(TypeError, match="not a causal language model"):
        LM(lm.model.model, lm.tokenizer)


# Prefixes.


def test_prefixes(lm: LM) -> None:
    z = text_of(lm, A, B, EOS, max_tokens=5)
    assert lm.encode("ab") == lm.encode(["a", "b"]) == (BOS, A, B)
    assert lm.encode([z, "."]) == lm.encode(z + ".") == (BOS, A, B, DOT)
    assert lm.encode(["a", z + "b", z]) == (BOS, A, A, B, B, A, B)
    assert lm.encode("") == lm.encode([]) == (BOS,)


def test_a_text_keeps_its_tokens() -> None:
    lm = tiny_lm(["a", "b", "ab", "."])
    z = text_of(lm, 0, 1)  # canonical is the single token "ab"
    assert z == "ab"
    assert lm.encode(z) == (0, 1)
    assert lm.encode(str(z)) == lm.encode(f"{z}") == (2,)
    assert lm.encode(["a", "b"]) == (0, 1)


def test_bad_prefixes(lm: LM) -> None:
    with pytest.raises(ValueError, match="site 'z': the prefix is empty"):
        tiny_lm("ab.").encode("", name="z")
    with pytest.raises(TypeError, match="site 'z': a prefix holds strings and Texts, not int"):
        lm.encode(["a", 3], name="z")  # type: ignore[list-item]
    with pytest.raises(TypeError, match="not int"):
        lm.encode(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="site 'z': the tokenizer cannot encode 'xyz'"):
        lm.encode("xyz", name="z")
    other = text_of(tiny_lm("abc."), 0)
    with pytest.raises(ValueError, match=r"another tokenizer .* Use str\(z\)"):
        lm.encode(["a", other])
    assert lm.encode(["a", str(other)]) == (BOS, A, A)


# Observed text.


@pytest.mark.parametrize(
    ("obs", "stop", "max_tokens", "expected"),
    [
        ("ab", None, None, (A, B)),
        ("a.b", None, None, (A, DOT, B)),
        ("ab", ".", None, (A, B, EOS)),
        ("ab.", ".", None, (A, B, DOT)),
        ("ab", None, 3, (A, B, EOS)),
        ("aba", None, 3, (A, B, A)),
        ("", ".", 3, (EOS,)),
        ("ab<eos>", ".", 9, (A, B, EOS)),
        ("ab<eos>a", None, None, (A, B, EOS, A)),
    ],
)
def test_observed_strings(lm, obs, stop, max_tokens, expected) -> None:
    assert lm.encode_observed(obs, Stopping(lm.vocabulary, stop, max_tokens)) == expected


@pytest.mark.parametrize(
    ("obs", "stop", "max_tokens", "message"),
    [
        ("a.b", ".", 9, r"stop string '\.' closes it at token 2 \(character 2\), but 'b' follows"),
        ("abab", ".", 3, r"4 tokens, but max_tokens=3 closes the site at token 3"),
        ("a<eos>b", ".", 9, r"an EOS token closes it at token 2 .* 'b' follows"),
        ("", None, None, r"is empty"),
        ("axb", ".", 9, r"cannot encode 'axb'"),
    ],
)
def test_text_that_the_site_could_not_have_produced(lm, obs, stop, max_tokens, message) -> None:
    with pytest.raises(ValueError, match="site 'y': .*" + message):
        lm.encode_observed(obs, Stopping(lm.vocabulary, stop, max_tokens), name="y")


def test_observed_texts_are_scored_as_their_tokens() -> None:
    lm = tiny_lm(["a", "b", "ab", "."])
    stopping = Stopping(lm.vocabulary, (".",), 4)
    assert lm.encode_observed(text_of(lm, 0, 1, 3), stopping) == (0, 1, 3)
    assert lm.encode_observed(text_of(lm, 0, 1), stopping) == (0, 1, lm.vocabulary.eos_id)
    with pytest.raises(ValueError, match="another tokenizer"):
        lm.encode_observed(text_of(tiny_lm("abc."), 0), stopping)
    with pytest.raises(TypeError, match="not int"):
        lm.encode_observed(3, stopping)  # type: ignore[arg-type]


def test_without_eos_a_text_must_close_by_itself() -> None:
    lm = tiny_lm("ab.", eos=False)
    stopping = Stopping(lm.vocabulary, (".",), 4)
    assert lm.encode_observed("ab.", stopping) == (A, B, DOT)
    with pytest.raises(ValueError, match="no EOS token"):
        lm.encode_observed("ab", stopping)


# Densities and draws.


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_prob_is_the_naive_one(lm: LM, temperature: float) -> None:
    texts = ["ab", "a.", "", "abab"]
    got = lm.log_prob("ba", texts, stop=".", max_tokens=4, temperature=temperature)
    ids = [(A, B, EOS), (A, DOT), (EOS,), (A, B, A, B)]
    want = torch.tensor([naive(lm, lm.encode("ba"), t, temperature) for t in ids])
    assert got.shape == (4,) and got.dtype == torch.float32
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    prefix_likelihood = lm.log_prob("ba", ["a"])
    assert prefix_likelihood.item() == pytest.approx(naive(lm, lm.encode("ba"), (A,)), abs=1e-4)
    assert lm.log_prob("ba", []).shape == (0,)


def test_a_single_string_is_one_continuation(lm: LM) -> None:
    torch.testing.assert_close(lm.log_prob("b", "ab"), lm.log_prob("b", ["ab"]))


def test_samples_carry_their_own_log_prob(lm: LM) -> None:
    texts, log_probs = lm.sample("ab", 48, max_tokens=4, stop=".", temperature=4.0, seed=3)
    assert len(texts) == 48 and log_probs.shape == (48,)
    assert {t.finish_reason for t in texts} == {"stop", "eos", "length"}
    scored = lm.log_prob("ab", texts, max_tokens=4, stop=".", temperature=4.0)
    torch.testing.assert_close(log_probs, scored, atol=1e-4, rtol=0)
    again, _ = lm.sample("ab", 48, max_tokens=4, stop=".", temperature=4.0, seed=3)
    assert [t.token_ids for t in again] == [t.token_ids for t in texts]
    other, _ = lm.sample("ab", 48, max_tokens=4, stop=".", temperature=4.0, seed=4)
    assert [t.token_ids for t in other] != [t.token_ids for t in texts]
    assert lm.sample("ab", 0, max_tokens=4)[0] == []


def test_without_a_seed_samples_follow_torch(lm: LM) -> None:
    torch.manual_seed(0)
    one, _ = lm.sample("ab", 8, max_tokens=4)
    two, _ = lm.sample("ab", 8, max_tokens=4)
    torch.manual_seed(0)
    three, _ = lm.sample("ab", 8, max_tokens=4)
    assert [t.token_ids for t in one] == [t.token_ids for t in three]
    assert [t.token_ids for t in one] != [t.token_ids for t in two]


def test_bad_arguments(lm: LM) -> None:
    with pytest.raises(ValueError, match="max_tokens is required"):
        lm.sample("a", 2, max_tokens=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_tokens=0"):
        lm.sample("a", 2, max_tokens=0)
    with pytest.raises(ValueError, match="num_samples=-1"):
        lm.sample("a", -1, max_tokens=2)
    for temperature in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            lm.sample("a", 2, max_tokens=2, temperature=temperature)
    with pytest.raises(ValueError, match="must not be empty"):
        lm.log_prob("a", ["b"], stop="")


def test_context_length_is_checked_and_named() -> None:
    lm = tiny_lm("ab.", context_length=8)
    stopping = Stopping(lm.vocabulary, (), 4)
    uniforms = torch.full((4,), 0.5, dtype=torch.float64)
    lm.draw([Draw((A,) * 4, stopping, uniforms, name="z")])
    with pytest.raises(ValueError, match="site 'z': a prefix of 5 tokens and 4 more .* 8 tokens"):
        lm.draw([Draw((A,) * 5, stopping, uniforms, name="z")])
    with pytest.raises(ValueError, match="site 'y': a prefix of 5 tokens and 4 more"):
        lm.score([Score((A,) * 5, (B,) * 4, name="y")])
    with pytest.raises(ValueError, match="do not fit"):
        lm.hidden([(A,) * 9])


def _drawn(lm, prefix, num_tokens):
    stopping = Stopping(lm.vocabulary, ".", num_tokens)
    return lm.draw([Draw(prefix, stopping, torch.rand(num_tokens).double(), name="z")])


def _closing(lm, prefix, num_tokens):
    stopping = Stopping(lm.vocabulary, ".", num_tokens)
    uniforms = torch.full((num_tokens,), 1e-9, dtype=torch.float64)
    decoding = begin_draws([(lm, Draw(prefix, stopping, uniforms, name="z"))])
    for _ in range(num_tokens - 1):
        assert math.isfinite(decoding.closing_log_probs()[0])
        decoding.step()


def _inferred(lm, prefix, num_tokens, method, **options):
    def model():
        limit = {} if "choices" in options else {"max_tokens": num_tokens}
        lmppl.lm_sample("z", Text("ab", prefix, lm.vocabulary), **limit, **options)

    lmppl.infer(model, lm=lm, method=method)


WAYS_IN = {
    "draw": _drawn,
    "closing": _closing,
    "score": lambda lm, prefix, n: lm.score([Score(prefix, (0,) * n, name="z")]),
    "hidden": lambda lm, prefix, n: lm.hidden([(*prefix, *(0,) * n)]),
    "exact": functools.partial(_inferred, method="exact", stop="."),
    "importance": functools.partial(_inferred, method="importance"),
    "choices": functools.partial(_inferred, method="exact", choices=["ab", "ba"]),
}


@pytest.mark.parametrize("way", WAYS_IN.values(), ids=WAYS_IN)
def test_no_way_into_the_model_leads_past_its_context(way) -> None:
    lm = tiny_lm("ab.", context_length=8)
    way(lm, (0, 1, 0, 1, 0, 1), 2)
    with pytest.raises(ValueError, match="do not fit the context of 'tiny-ab.-0', 8 tokens"):
        way(lm, (0, 1, 0, 1, 0, 1, 0), 2)


def test_tokens_are_counted_and_adapters_share_the_count() -> None:
    lm = tiny_lm("ab.")
    texts, _ = lm.sample("a", 4, max_tokens=3, seed=0)
    drawn = sum(len(t.token_ids) for t in texts)
    assert lm.tokens_sampled == drawn and lm.tokens_scored == 0
    adapter = lm.adapter()
    assert adapter.vocabulary is lm.vocabulary and adapter.usage is lm.usage
    adapter.log_prob("a", ["bb"])
    assert lm.tokens_scored == 2
    lm.usage.tokens_sampled = lm.usage.tokens_scored = 0
    assert adapter.tokens_sampled == adapter.tokens_scored == 0


def test_empty_batches(lm: LM) -> None:
    assert lm.draw([]) == [] and lm.score([]) == []


# Chat.


def test_chat_keeps_tokens_and_puts_bos_once() -> None:
    lm = tiny_lm(["a", "b", "ab", ".", "u", "s"], bos=True)
    bos = lm.tokenizer.bos_token_id
    lm.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}{{ m.content }}.{% endfor %}"
        "{% if add_generation_prompt %}s{% endif %}"
    )
    z = text_of(lm, 0, 1)
    messages = [{"role": "u", "content": z}, {"role": "s", "content": "ab"}]
    prefix = lm.apply_chat_template(messages)
    assert prefix == "<bos>uab.sab.s"
    assert lm.encode(prefix) == (bos, 4, 0, 1, 3, 5, 2, 3, 5)
    bare = lm.apply_chat_template(messages[:1], add_generation_prompt=False)
    assert lm.encode([bare, "a"]) == (bos, 4, 0, 1, 3, 0)


def test_chat_errors(lm: LM) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        lm.apply_chat_template([{"role": "user", "content": "a"}])
    other = tiny_lm("ab.")
    other.tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ValueError, match="refuses"):
        other.apply_chat_template([{"role": "user", "content": "a"}])
    with pytest.raises(ValueError, match="message 0"):
        other.apply_chat_template([{"role": "user"}])


# Loading.


def test_loading_a_directory(tmp_path, lm: LM, recwarn, capfd) -> None:
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    capfd.readouterr()
    loaded = LM.from_pretrained(tmp_path, device="cpu", dtype="float32")
    assert isinstance(loaded.model, LlamaForCausalLM)
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.vocabulary.same_as(lm.vocabulary) and loaded.vocabulary.eos_ids == {EOS}
    torch.testing.assert_close(loaded.log_prob("ab", ["ba"]), lm.log_prob("ab", ["ba"]))
    half = LM.from_pretrained(str(tmp_path), device="cpu", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert capfd.readouterr() == ("", "") and not recwarn.list


def test_what_cannot_be_loaded(tmp_path, monkeypatch) -> None:
    with pytest.raises(OSError, match="does not hold a Hugging Face causal language model"):
        LM.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no GGUF file"):
        LM.from_pretrained(tmp_path / "model.gguf")
    with monkeypatch.context() as patch:
        patch.setattr("lmppl.lm.loading.load_pretrained", None)  # the hub is not asked
        with pytest.raises(OSError, match="'SmolLM2-135-instruct'; did you mean 'smollm2-135m-i"):
            LM.from_pretrained("SmolLM2-135-instruct")
    with pytest.raises(OSError, match="hub did not give it. The hub said"):  # its name is right
        LM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct", local_files_only=True)
    with pytest.raises(OSError, match="hub did not give it. The hub said"):
        LM.from_pretrained("distilgpt2", local_files_only=True)
    with pytest.raises(ValueError, match="trust_remote_code is not supported"):
        LM.from_pretrained(tmp_path, trust_remote_code=True)
    with pytest.raises(ValueError, match="dtype here"):
        LM.from_pretrained(tmp_path, torch_dtype="float32")
    with pytest.raises(ValueError, match="use one of float32, bfloat16"):
        LM.from_pretrained(tmp_path, dtype="int8")
    with pytest.raises(ValueError, match="use one of float32, bfloat16"):
        LM.from_pretrained(tmp_path, dtype=torch.int64)
    with pytest.raises(ValueError, match="device='nonsense' cannot be used"):
        LM.from_pretrained(tmp_path, device="nonsense")


def test_defaults_of_device_and_dtype(monkeypatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device(None) == cpu
    for check, fast in (("_is_amx_tile_supported", True), ("_is_avx512_bf16_supported", True)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        assert choose_dtype(None, cpu) == torch.float32
        monkeypatch.setattr(torch.cpu, check, lambda fast=fast: fast)
        assert choose_dtype(None, cpu) == torch.bfloat16
    assert choose_dtype("torch.float16", cpu) == torch.float16
    assert choose_dtype(None, torch.device("mps")) == torch.float32
    with pytest.raises(ValueError, match="mps"):
        choose_dtype("float64", torch.device("mps"))


# In float32.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_copy_in_float32_computes_what_the_weights_define(dtype: torch.dtype) -> None:
    half, exact = tiny_lm("ab."), tiny_lm("ab.")
    half.model.requires_grad_(False).to(dtype)
    exact.model.to(dtype).float()
    whole = half.in_float32()
    assert (whole.dtype, half.dtype) == (torch.float32, dtype)
    texts, ends = ["ab.", "b.", "aab."], {"max_tokens": 5, "stop": "."}
    want, got, rounded = (lm.log_prob("ab", texts, **ends) for lm in (exact, whole, half))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert float((rounded - want).abs().max()) > 1e-4
    assert whole.vocabulary is half.vocabulary and whole.usage is half.usage
    weight = whole.model.model.embed_tokens.weight
    assert not weight.requires_grad and {p.dtype for p in half.model.parameters()} == {dtype}


def test_an_adapter_in_float32_keeps_its_own_weights() -> None:
    half = tiny_lm("ab.")
    half.model.requires_grad_(False).bfloat16()
    adapter = half.adapter()
    whole = adapter.in_float32()
    trained, same = (
        [p for p in lm.model.parameters() if p.requires_grad] for lm in (adapter, whole)
    )
    assert trained and all(p is q for p, q in zip(trained, same, strict=True))
    with torch.no_grad():
        for p in trained:
            p.add_(0.1)
    got, base = (lm.log_prob("ab", ["ab."], max_tokens=4) for lm in (whole, half.in_float32()))
    near = adapter.log_prob("ab", ["ab."], max_tokens=4)
    assert abs(float(got - near)) < 0.1 < abs(float(got - base))


def test_in_float32_is_itself_or_refused(lm: LM) -> None:
    assert lm.in_float32() is lm
    odd = tiny_lm("ab.")
    layer = odd.model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"'tiny-ab\.-0' has quantised weights \(int8\)"):
        odd.in_float32()
