"""Guides on disk."""

import json
import os
import shutil
import signal
import stat
import threading
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_helpers import draw_samples, equal, latent_values, shaken, weights
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

import lmppl
from lmppl import lm_sample
from lmppl.guides.parameters import adapter_state, load_adapter_state
from lmppl.states import present, read_state, replace_folder, write_state
from lmppl.testing import guide_log_probs, tiny_lm
from lmppl.testing.programs import CASES

CHAIN, BETA = CASES["chain"], CASES["beta and text"]


@pytest.fixture(autouse=True)
def fresh_store():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def log_q(guide, case):
    """Of some traces."""
    traces = list(case.enumerate())[::7]
    return guide_log_probs(guide, case.program, case.args, traces, case.lm)


@pytest.mark.parametrize("case", [CHAIN, BETA], ids=str)
def test_a_loaded_guide_is_the_saved_one(case, tmp_path):
    guide = lmppl.LMGuide(case.program, lm=case.lm, condition_on=_observed(case))
    guide.fit([case.args], steps=2, seed=0, batch_size=8)
    shaken(guide)
    guide.save(tmp_path / "folder" / "guide")
    assert sorted(os.listdir(tmp_path / "folder")) == ["guide"]  # nothing temporary is left
    loaded = lmppl.LMGuide.load(tmp_path / "folder" / "guide", case.program, lm=case.lm)
    assert torch.equal(log_q(loaded, case), log_q(guide, case))
    assert loaded.history == guide.history and len(loaded.history) == 2
    assert set(loaded.condition_on) == set(guide.condition_on)
    draws = [draw_samples(each, case.program, case.args, 4) for each in (guide, loaded)]
    assert list(map(latent_values, draws[0])) == list(map(latent_values, draws[1]))


def _observed(case):
    return ["y"] if case is CHAIN else "all"


def test_training_goes_on_after_loading(tmp_path):
    guide = lmppl.LMGuide(CHAIN.program, lm=CHAIN.lm)
    guide.fit([CHAIN.args], steps=2, seed=0, batch_size=8).save(tmp_path / "guide")
    loaded = lmppl.LMGuide.load(tmp_path / "guide", CHAIN.program, lm=CHAIN.lm)
    for each in (guide, loaded):
        each.fit([CHAIN.args], steps=3, seed=1, batch_size=8)
    assert torch.equal(log_q(guide, CHAIN), log_q(loaded, CHAIN))
    assert [figures["step"] for figures in loaded.history] == [0, 1, 2, 3, 4]


def test_a_tempered_target_is_remembered(tmp_path):
    guide = lmppl.LMGuide(CHAIN.program, lm=CHAIN.lm)
    guide.fit([CHAIN.args], steps=1, seed=0, batch_size=8, reward_temperature=(2.0, 1.5))
    guide.save(tmp_path / "guide")
    loaded = lmppl.LMGuide.load(tmp_path / "guide", CHAIN.program, lm=CHAIN.lm)
    assert loaded.tempered_target == 1.5


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21's own
def test_the_adapter_is_a_standard_one(tmp_path):
    guide = shaken(lmppl.LMGuide(CHAIN.program, lm=CHAIN.lm, lora=LoraConfig(r=3, lora_alpha=5)))
    guide.save(tmp_path / "guide")
    base = tiny_lm("ab.", seed=0).model
    assert {file.name for file in (tmp_path / "guide" / "adapter-0").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    adapted = PeftModel.from_pretrained(base, tmp_path / "guide" / "adapter-0").eval()
    assert adapted.peft_config["default"].r == 3
    tokens = torch.tensor([[0, 1, 2, 1]])
    expected = guide.inner.adapter_for("z").model(input_ids=tokens).logits
    torch.testing.assert_close(adapted(input_ids=tokens).logits, expected)
    loaded = lmppl.LMGuide.load(tmp_path / "guide", CHAIN.program, lm=CHAIN.lm)
    assert torch.equal(log_q(loaded, CHAIN), log_q(guide, CHAIN))


def test_saving_replaces_a_guide_if_it_may_and_nothing_else(tmp_path):
    guide = lmppl.LMGuide(CHAIN.program, lm=CHAIN.lm)
    guide.save(tmp_path / "guide")
    before = log_q(guide, CHAIN)
    shaken(guide)
    with pytest.raises(FileExistsError, match="guide exists: overwrite=True replaces it"):
        guide.save(tmp_path / "guide")
    kept = lmppl.LMGuide.load(tmp_path / "guide", CHAIN.program, lm=CHAIN.lm)
    assert torch.equal(log_q(kept, CHAIN), before)
    with pytest.raises(TypeError, match="overwrite=1"):
        guide.save(tmp_path / "guide", overwrite=1)
    guide.save(str(tmp_path / "guide"), overwrite=True)
    assert os.listdir(tmp_path) == ["guide"]
    loaded = lmppl.LMGuide.load(tmp_path / "guide", CHAIN.program, lm=CHAIN.lm)
    assert torch.equal(log_q(loaded, CHAIN), log_q(guide, CHAIN))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="thesis exists and is no guide"):
        guide.save(tmp_path / "thesis", overwrite=True)
    (tmp_path / "file").write_text("also work")
    with pytest.raises(FileExistsError, match="file exists and is no guide"):
        guide.save(tmp_path / "file", overwrite=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_an_interrupted_save_leaves_the_old_guide(tmp_path, monkeypatch):
    guide = lmppl.LMGuide(CHAIN.program, lm=CHAIN.lm)
    guide.save(tmp_path / "guide")
    before = log_q(guide, CHAIN)
    shaken(guide)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lmppl.states.save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        guide.save(tmp_path / "guide", overwrite=True)
    with pytest.raises(KeyboardInterrupt):
        guide.save(tmp_path / "new")
    assert os.listdir(tmp_path) == ["guide"]
    loaded = lmppl.LMGuide.load(tmp_path / "guide", CHAIN.program, lm=CHAIN.lm)
    assert torch.equal(log_q(loaded, CHAIN), before)


def test_what_cannot_be_loaded(tmp_path):
    guide = lmppl.LMGuide(CHAIN.program, lm=CHAIN.lm)
    path = tmp_path / "guide"
    guide.save(path)
    with pytest.raises(FileNotFoundError, match="nowhere is no guide"):
        lmppl.LMGuide.load(tmp_path / "nowhere", CHAIN.program, lm=CHAIN.lm)
    with pytest.raises(
        ValueError, match="trained on the base model 'tiny-ab.-0', given 'tiny-ab.-1"
    ):
        lmppl.LMGuide.load(path, CHAIN.program, lm=tiny_lm("ab.", seed=1))
    with pytest.raises(ValueError, match="whose weights or tokens are others"):
        lmppl.LMGuide.load(path, CHAIN.program, lm=tiny_lm("ba.", seed=0))
    with pytest.raises(ValueError, match="kind 'automatic': leave out program="):
        lmppl.LMGuide.load(path, CHAIN.program, lm=CHAIN.lm, program=CHAIN.program)
    lmppl.LMGuide.load(path, CHAIN.program, lm=tiny_lm("ab.", seed=0))  # an equal base is that base
    description = json.loads((path / "guide.json").read_text())
    (path / "guide.json").write_text(json.dumps(description | {"format": 99}))
    with pytest.raises(ValueError, match="has format 99; this version of lmppl reads 5"):
        lmppl.LMGuide.load(path, CHAIN.program, lm=CHAIN.lm)


# --- the base ------------------------------------------------------------------------------------


def loaded_as(dtype, seed=0, **options):
    lm = tiny_lm("ab.", seed=seed, **options)
    return lmppl.LM(lm.model.to(dtype), lm.tokenizer, name=f"tiny in {dtype}")


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("saved", DTYPES, ids=str)
def test_a_base_is_the_same_in_another_dtype(saved, tmp_path):
    """By far more weights than one, so that some of them are rounded twice."""
    case = CHAIN
    lmppl.LMGuide(case.program, lm=loaded_as(saved, hidden_size=64)).save(tmp_path / "guide")
    for dtype in DTYPES:
        again = loaded_as(dtype, hidden_size=64)
        lmppl.LMGuide.load(tmp_path / "guide", case.program, lm=again)
        other = loaded_as(dtype, seed=1, hidden_size=64)
        with pytest.raises(ValueError, match="whose weights or tokens are others"):
            lmppl.LMGuide.load(tmp_path / "guide", case.program, lm=other)


def test_a_base_that_was_trained_since_is_another_one(tmp_path):
    lmppl.LMGuide(CHAIN.program, lm=CHAIN.lm).save(tmp_path / "guide")
    lm = tiny_lm("ab.", seed=0)
    with torch.no_grad():
        lm.model.lm_head.weight[0, 0] += 1e-6
    with pytest.raises(ValueError, match="whose weights or tokens are others"):
        lmppl.LMGuide.load(tmp_path / "guide", CHAIN.program, lm=lm)


# --- damage --------------------------------------------------------------------------------------


def rewrite_json(change):
    def rewrite(file):
        described = json.loads(file.read_text())
        change(described)
        file.write_text(json.dumps(described))

    return rewrite


def rewrite_tensors(keep):
    def rewrite(file):
        tensors = load_file(file)
        save_file({name: tensors[name] for name in sorted(tensors)[keep]}, file)

    return rewrite


def truncate(file):
    file.write_bytes(file.read_bytes()[:-20])


def flip(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def observe_less(described):
    described["state"]["guide"]["condition_on"] = []


ADAPTER, CONFIG = "adapter-0/adapter_model.safetensors", "adapter-0/adapter_config.json"
FILES = [ADAPTER, CONFIG, "guide.json", "guide.safetensors"]
DAMAGE = [
    *((file, how) for file in FILES for how in (truncate, flip, os.remove)),
    (ADAPTER, rewrite_tensors(slice(0, None, 2))),
    (ADAPTER, rewrite_tensors(slice(0, 0))),
    ("guide.safetensors", rewrite_tensors(slice(0, 0))),
    (CONFIG, rewrite_json(lambda config: config.update(lora_alpha=64))),
    ("guide.json", rewrite_json(observe_less)),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A saved guide that can be loaded, to be copied."""
    path = tmp_path_factory.mktemp("whole") / "guide"
    guide = lmppl.LMGuide(BETA.program, lm=BETA.lm)
    guide.prepare(BETA.args)
    shaken(guide).save(path)
    lmppl.LMGuide.load(path, BETA.program, lm=BETA.lm)
    return path


@pytest.mark.parametrize("file, damage", DAMAGE)
def test_a_damaged_guide_is_refused_by_the_name_of_the_file(file, damage, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "guide")
    damage(tmp_path / "guide" / file)
    if damage is os.remove and file == "guide.json":
        with pytest.raises(FileNotFoundError, match="is no guide: it has no guide.json"):
            lmppl.LMGuide.load(tmp_path / "guide", BETA.program, lm=BETA.lm)
        return
    with pytest.raises(ValueError, match=f"{file} (was damaged or edited|is missing)"):
        lmppl.LMGuide.load(tmp_path / "guide", BETA.program, lm=BETA.lm)


def test_a_guide_that_is_only_written_otherwise_is_the_same(tmp_path):
    guide = shaken(lmppl.LMGuide(CHAIN.program, lm=CHAIN.lm))
    guide.save(tmp_path / "guide")
    file = tmp_path / "guide" / "guide.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=4))  # to be read by people
    (tmp_path / "guide" / "README.md").write_text("a guide")
    loaded = lmppl.LMGuide.load(tmp_path / "guide", CHAIN.program, lm=CHAIN.lm)
    assert torch.equal(log_q(loaded, CHAIN), log_q(guide, CHAIN))


def test_every_tensor_of_an_adapter_is_there_and_no_other():
    state = adapter_state(CHAIN.lm.adapter(LoraConfig(r=2, lora_alpha=4)))
    name, tensor = next(iter(state["tensors"].items()))
    adapter = CHAIN.lm.adapter(LoraConfig(r=2, lora_alpha=4))
    load_adapter_state(adapter, state)
    less = {key: value for key, value in state["tensors"].items() if key != name}
    for tensors, has in (
        (less, r"weight None, this one \(2, 64\)"),
        (state["tensors"] | {name: tensor[:1]}, r"weight \(1, 64\), this one \(2, 64\)"),
        (state["tensors"] | {f"{name}.more": tensor}, r"weight.more \(2, 64\), this one None"),
    ):
        with pytest.raises(ValueError, match=f"has tensor {name[:-6]}{has}"):
            load_adapter_state(adapter, state | {"tensors": tensors})
    with pytest.raises(ValueError, match="has lora_alpha 4, this one 8"):
        load_adapter_state(CHAIN.lm.adapter(LoraConfig(r=2, lora_alpha=8)), state)


def test_a_state_is_read_as_it_was_written(tmp_path):
    state = {
        "tensors": [
            torch.arange(5000.0),
            torch.tensor(True),
            torch.empty(0, 3),
            {"a": torch.eye(2)},
        ],
        "small": {str(n): torch.full((n,), n, dtype=torch.bfloat16) for n in (1, 2, 3)},
        "values": [None, 1, 2.5, "text", float("-inf"), [], {}, ("a", 1)],
    }
    write_state(tmp_path, "thing", 3, state)
    again = read_state(tmp_path, "thing", 3)
    assert again["values"] == [*state["values"][:-1], ["a", 1]]
    for one, two in zip(again["tensors"], state["tensors"], strict=True):
        one, two = (each["a"] if isinstance(each, dict) else each for each in (one, two))
        assert torch.equal(one, two) and one.dtype == two.dtype and one.shape == two.shape
    for name, tensor in state["small"].items():
        assert torch.equal(again["small"][name], tensor)
        assert again["small"][name].untyped_storage().nbytes() == tensor.nbytes
    with pytest.raises(ValueError, match=r"state.a has a key '\$tensor'"):
        write_state(tmp_path, "thing", 3, {"a": {"$tensor": 1}})


# --- interruptions -------------------------------------------------------------------------------


def write_number(number):
    def write(folder):
        (folder / "part").mkdir()
        write_state(folder, "thing", 1, {"number": number})

    return write


def number_at(path):
    return read_state(present(path), "thing", 1)["number"]


@pytest.mark.parametrize("step", ["mkdir", "write", "first rename", "second rename"])
@pytest.mark.parametrize("exception", [KeyboardInterrupt, OSError], ids=lambda e: e.__name__)
def test_an_interruption_at_any_step_leaves_the_old_or_the_new(
    step, exception, tmp_path, monkeypatch
):
    path = tmp_path / "thing"
    replace_folder(path, "thing", write_number(1))
    renames = 0
    replace = os.replace

    def interrupted(*args, **kwargs):
        raise exception

    def interrupted_rename(source, target):
        nonlocal renames
        renames += 1
        if renames == (1 if step == "first rename" else 2):
            raise exception
        replace(source, target)

    def interrupted_write(folder):
        write_number(2)(folder)
        raise exception

    with monkeypatch.context() as patch:
        if step == "mkdir":
            patch.setattr("pathlib.Path.mkdir", interrupted)
        elif "rename" in step:
            patch.setattr("os.replace", interrupted_rename)
        with pytest.raises(exception):
            replace_folder(path, "thing", interrupted_write if step == "write" else write_number(2))
    assert number_at(path) == 1 and os.listdir(tmp_path) == ["thing"]
    replace_folder(path, "thing", write_number(3))
    assert number_at(path) == 3 and os.listdir(tmp_path) == ["thing"]


def test_a_process_that_is_killed_between_the_renames_loses_nothing(tmp_path):
    path = tmp_path / "thing"
    replace_folder(path, "thing", write_number(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork where there are threads
        child = os.fork()
    if not child:
        replace, renames = os.replace, []

        def killed(source, target):
            renames.append(source)
            if len(renames) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = killed
        try:
            replace_folder(path, "thing", write_number(2))
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    left_over, old = sorted(os.listdir(tmp_path))
    assert left_over.endswith(".new") and old == ".thing.old"
    assert number_at(path) == 1
    os.utime(tmp_path / left_over, (0, 0))  # by now nobody writes to it any more
    replace_folder(path, "thing", write_number(3))
    assert number_at(path) == 3 and os.listdir(tmp_path) == ["thing"]


def test_two_that_write_to_one_path_at_once_do_not_mix(tmp_path):
    """The second begins while the first writes, and ends after it."""
    path, begun, ended = tmp_path / "thing", threading.Event(), threading.Event()

    def write_first(folder):
        (folder / "a").write_text("first")
        second.start()
        begun.wait()
        write_number(1)(folder)

    def write_second(folder):
        begun.set()
        ended.wait()
        write_number(2)(folder)

    second = threading.Thread(target=replace_folder, args=(path, "thing", write_second))
    replace_folder(path, "thing", write_first)
    assert number_at(path) == 1 and (path / "a").exists()
    ended.set()
    second.join()
    assert number_at(path) == 2 and not (path / "a").exists()
    assert os.listdir(tmp_path) == ["thing"]


def test_a_guide_is_found_where_an_interruption_left_it(tmp_path):
    guide = lmppl.LMGuide(CHAIN.program, lm=CHAIN.lm)
    guide.save(tmp_path / "guide")
    os.replace(tmp_path / "guide", tmp_path / ".guide.old")
    loaded = lmppl.LMGuide.load(tmp_path / "guide", CHAIN.program, lm=CHAIN.lm)
    assert torch.equal(log_q(loaded, CHAIN), log_q(guide, CHAIN))


def test_a_saved_guide_may_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        lmppl.LMGuide(CHAIN.program, lm=CHAIN.lm).save(tmp_path / "guide")
    finally:
        os.umask(before)
    for path in (tmp_path / "guide", tmp_path / "guide" / "adapter-0"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o750


# --- guide programs ------------------------------------------------------------------------------


def model(x, y):
    k = pyro.sample("k", dist.Bernoulli(0.4))
    z = lm_sample("z", x if k else "b", max_tokens=2)
    lm_sample("y", [x, z], obs=y)


def guide_program(q):
    def program(x, y):
        p = pyro.param("p", torch.tensor(0.3), constraint=dist.constraints.unit_interval)
        pyro.sample("k", dist.Bernoulli(p))
        lm_sample("z", [y, x], max_tokens=2, lm=q)

    return program


def test_a_loaded_guide_program_is_the_saved_one(tmp_path):
    lm, args = CHAIN.lm, ("ab", "ba")
    guide = lmppl.LMGuide(model, lm=lm, program=guide_program(lm.adapter()))
    guide.fit([args], steps=3, seed=0, batch_size=8, learning_rate=0.05)
    p = pyro.param("p").item()
    expected = [
        {name: float(s[0]) for name, s in score.items()}
        for score in guide.score(
            [sample.proposer for sample in draw_samples(guide, model, args, 6)], grad=False
        )
    ]
    guide.save(tmp_path / "guide")
    pyro.clear_param_store()  # another process
    loaded = lmppl.LMGuide.load(
        tmp_path / "guide", model, lm=lm, program=guide_program(lm.adapter())
    )
    samples = draw_samples(loaded, model, args, 6)
    found = [
        {name: float(s[0]) for name, s in score.items()}
        for score in loaded.score([sample.proposer for sample in samples], grad=False)
    ]
    assert found == expected
    assert pyro.param("p").item() == pytest.approx(p) and p != pytest.approx(0.3, abs=1e-3)
    with pytest.raises(ValueError, match="holds a guide of kind 'program': give program="):
        lmppl.LMGuide.load(tmp_path / "guide", model, lm=lm)


def test_a_loaded_guide_program_can_be_saved_again_before_it_is_run(tmp_path):
    lm, args = CHAIN.lm, ("ab", "ba")
    guide = lmppl.LMGuide(model, lm=lm, program=guide_program(lm.adapter()))
    guide.fit([args], steps=1, seed=0, batch_size=8).save(tmp_path / "one")
    expected = weights(guide)
    loaded = lmppl.LMGuide.load(tmp_path / "one", model, lm=lm, program=guide_program(lm.adapter()))
    loaded.save(tmp_path / "two")
    pyro.clear_param_store()
    again = lmppl.LMGuide.load(tmp_path / "two", model, lm=lm, program=guide_program(lm.adapter()))
    draw_samples(again, model, args, 1)
    assert equal(weights(again), expected)
    new = lmppl.LMGuide(model, lm=lm, program=guide_program(lm.adapter()))
    with pytest.raises(ValueError, match="has not been run"):
        new.save(tmp_path / "three")


def test_another_guide_program(tmp_path):
    lm, args = CHAIN.lm, ("ab", "ba")
    guide = lmppl.LMGuide(model, lm=lm, program=guide_program(lm.adapter()))
    guide.fit([args], steps=1, seed=0, batch_size=8).save(tmp_path / "guide")
    q = lm.adapter()

    def other(x, y):
        lm_sample("z", [y, x], max_tokens=2, lm=q)

    loaded = lmppl.LMGuide.load(tmp_path / "guide", model, lm=lm, program=other)
    for _ in range(2):  # it is not forgotten that it could not be restored
        with pytest.raises(
            ValueError, match=r"had 1 adapters and the parameters \['p'\], this one has"
        ):
            draw_samples(loaded, model, args, 1)


def test_a_guide_with_an_adapter_each_is_saved_before_it_is_used(tmp_path):
    case = CASES["chain"]
    lmppl.LMGuide(case.program, lm=case.lm, adapter_per_site=True).save(tmp_path / "guide")
    loaded = lmppl.LMGuide.load(tmp_path / "guide", case.program, lm=case.lm)
    assert loaded.inner.adapter_per_site and loaded.adapters() == []
