"""Every configuration of peft: the base stays bit-exact and densities agree, or it is refused."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from architectures import make_model

from lmppl.lm import LM
from lmppl.lm.batches.requests import Draw, Score
from lmppl.lm.tokens.stopping import Stopping
from lmppl.testing.tiny import tiny_lm

TARGETS = ["q_proj", "v_proj", "down_proj"]
REQUESTS = [Score((0, 1, 2) * 4, (0, 1, k, 2, 1)) for k in range(2)]

# What works.
LORA = [
    *({"init_lora_weights": init} for init in (True, False, "gaussian", "orthogonal", "eva")),
    {"use_rslora": True},
    {"use_dora": True},
    {"bias": "all"},
    {"bias": "lora_only"},
    {"lora_bias": True},
    {"lora_dropout": 0.5},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    {"layers_to_transform": [1]},
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed_tokens"]},
    {"modules_to_save": ["norm", "up_proj"]},
    {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    {"trainable_token_indices": [0, 1]},
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"target_modules": ["lm_head", "q_proj"]},
    {"target_modules": ["embed_tokens", "lm_head"]},
    {"target_modules": "all-linear", "exclude_modules": ["v_proj"]},
    {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    {"task_type": None},
]
OTHERS = [
    ("AdaLoraConfig", {"total_step": 10}),
    ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    ("LNTuningConfig", {"target_modules": ["input_layernorm"]}),
    ("LoHaConfig", {}),
    ("OFTConfig", {"oft_block_size": 8}),
    ("TrainableTokensConfig", {"target_modules": None, "token_indices": [0, 1]}),
    ("VeraConfig", {}),
]
RARE = [
    ("BOFTConfig", {"boft_block_size": 8}),
    ("C3AConfig", {"block_size": 8}),
    ("FourierFTConfig", {"n_frequency": 20}),
    ("HRAConfig", {}),
    ("LoKrConfig", {}),
    ("MissConfig", {"r": 4}),
    ("RandLoraConfig", {}),
    ("RoadConfig", {"group_size": 8}),
    ("ShiraConfig", {"r": 2}),
    ("VBLoRAConfig", {"vector_length": 8, "num_vectors": 16}),
    ("WaveFTConfig", {"n_frequency": 20}),
]
WORKS = [("LoraConfig", changes) for changes in LORA] + OTHERS

CHANGES = "changes the base's weights when the adapter is made"
VIRTUAL = "virtual tokens would be lost"
REFUSED = [
    *(
        ("LoraConfig", {"init_lora_weights": init}, f"init_lora_weights='{init}' {CHANGES}")
        for init in ("pissa", "pissa_niter_4", "olora")
    ),
    ("LoraConfig", {"kasa_config": "KasaConfig"}, f"kasa_config=.* {CHANGES}"),
    ("LoraConfig", {"init_lora_weights": "corda"}, "init_lora_weights='corda'.*preprocess_corda"),
    ("LoraConfig", {"alora_invocation_tokens": [1]}, "alora_invocation_tokens=.*other means"),
    ("LoraConfig", {"inference_mode": True}, "inference_mode=True.* leaves nothing to train"),
    (
        "LoraConfig",
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        "ensure_weight_tying=True.*the adapted model does not run",
    ),
    # The layers' types are listed in this model's configuration, which peft does not replicate.
    ("LoraConfig", {"layer_replication": [[0, 2], [1, 3]]}, "layer_replication=.*does not run"),
    ("LoraConfig", {"target_modules": ["nowhere"]}, "target_modules=.*nowhere"),
    ("LilyConfig", {}, "LilyConfig.*logits depend on the tokens that follow"),
    ("PolyConfig", {}, "PolyConfig.*task_ids"),
    ("XLoraConfig", {"hidden_size": 32, "adapters": {}}, "XLoraConfig"),
    ("PromptTuningConfig", {"num_virtual_tokens": 2}, f"PromptTuningConfig.*{VIRTUAL}"),
    ("PromptEncoderConfig", {"num_virtual_tokens": 2}, f"PromptEncoderConfig.*{VIRTUAL}"),
    ("PrefixTuningConfig", {"num_virtual_tokens": 2}, f"PrefixTuningConfig.*{VIRTUAL}"),
]


def named(case):
    if isinstance(case, bool):
        return "tied" if case else "untied"
    kind, changes = case[:2]
    return "-".join([kind, *(f"{k}={v}" for k, v in changes.items() if k != "target_modules")])


def make_config(kind, changes):
    """The configuration, or a skip where this version of peft has none of that kind."""
    options = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    if kind == "LoraConfig":
        options |= {"r": 4, "lora_alpha": 8}
    options |= changes
    if "Prompt" in kind or "Prefix" in kind or kind == "XLoraConfig":
        del options["target_modules"]
    try:
        for name, value in changes.items():
            if isinstance(value, str) and value.endswith("Config"):
                options[name] = getattr(peft, value)()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's own advice
            return getattr(peft, kind)(**options)
    except (AttributeError, TypeError) as error:
        pytest.skip(f"peft {peft.__version__}: {error}")


def make_lm(tied=True):
    """A model with biases and an output layer that is tied to its embeddings, or with neither."""
    lm = tiny_lm("ab.")
    lm.model = make_model("qwen2" if tied else "llama")
    if tied:
        lm.model.config.tie_word_embeddings = True
        lm.model.tie_weights()
        assert lm.model.lm_head.weight is lm.model.model.embed_tokens.weight
    return lm


def tensors(lm):
    return {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}


def adapter(lm, config) -> LM:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own advice
        return lm.adapter(config)


def train(lm):
    """Leave the start, where many adapters are nothing, and take a step."""
    trained = [p for p in lm.model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    (-sum(s.log_probs.mean() for s in lm.score(REQUESTS, grad=True))).backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    torch.optim.SGD(trained, lr=0.3).step()
    assert any(float(p.grad.abs().max()) > 0 for p in trained if p.grad is not None)


@torch.no_grad()
def naive(lm, prefix, continuation):
    logits = lm.model(torch.tensor([[*prefix, *continuation]]), use_cache=False).logits
    log_probs = torch.log_softmax(logits[0, len(prefix) - 1 : -1].float(), -1)
    return log_probs.gather(1, torch.tensor([continuation]).T)[:, 0]


UNTIED = [
    ("LoraConfig", {"layer_replication": [[0, 2], [1, 3]]}),
    *(case for case in WORKS if "embed" in str(case) or "head" in str(case)),
]


@pytest.mark.filterwarnings("ignore:.*slow path")
@pytest.mark.parametrize(
    "case, tied",
    [
        *((case, True) for case in WORKS),
        *((case, False) for case in UNTIED),
        *(pytest.param(case, True, marks=pytest.mark.slow) for case in RARE),
    ],
    ids=named,
)
def test_what_works_keeps_the_base_and_draws_what_it_scores(case, tied):
    config = make_config(*case)
    lm = make_lm(tied)
    before, want = tensors(lm), [naive(lm, r.prefix, r.continuation) for r in REQUESTS]
    flags = [p.requires_grad for p in lm.model.parameters()]
    memory = {p.untyped_storage().data_ptr() for p in lm.model.parameters()}
    adapted = adapter(lm, config)
    _ = adapted.sampler  # at first, so that what is merged must be merged again
    train(adapted)
    scored = [s.log_probs for s in adapted.score(REQUESTS)]
    for request, log_probs in zip(REQUESTS, scored, strict=True):
        expected = naive(adapted, request.prefix, request.continuation)
        torch.testing.assert_close(log_probs, expected, atol=1e-4, rtol=0)
    for draw, drawn in zip(draws(lm), adapted.draw(draws(lm)), strict=True):
        (again,) = adapted.score([Score(draw.prefix, drawn.token_ids)])
        torch.testing.assert_close(drawn.log_probs, again.log_probs, atol=1e-4, rtol=0)
    # The adapter does something, and the base has not noticed.
    assert not torch.allclose(torch.stack(scored), torch.stack(want), atol=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(lm).items())
    assert [p.requires_grad for p in lm.model.parameters()] == flags
    trained = [p for p in adapted.model.parameters() if p.requires_grad]
    assert not memory & {p.untyped_storage().data_ptr() for p in trained}
    for request, log_probs in zip(REQUESTS, want, strict=True):
        assert torch.equal(naive(lm, request.prefix, request.continuation), log_probs)


def draws(lm):
    uniforms = torch.rand(3, 3, dtype=torch.float64, generator=torch.manual_seed(3))
    return [Draw((0, 1, 2) * 4, Stopping(lm.vocabulary, None, 3), u) for u in uniforms]


@pytest.mark.parametrize("case", REFUSED, ids=named)
def test_what_is_refused_is_named_and_leaves_the_base_alone(case):
    *case, message = case
    config = make_config(*case)
    lm = make_lm()
    before, kept = tensors(lm), copy.deepcopy(config)
    flags = [p.requires_grad for p in lm.model.parameters()]
    with pytest.raises(ValueError, match="(?s)" + message):
        adapter(lm, config)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(lm).items())
    assert [p.requires_grad for p in lm.model.parameters()] == flags
    assert config == kept
