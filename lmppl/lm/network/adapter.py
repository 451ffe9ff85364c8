"""Adapters: trainable copies of a language model that share its weights.

peft edits a model in place, so it gets a clone of the module tree whose parameters and buffers
are the base's own tensors. The base stays bit-exact, and base and adapter can be used in turn.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D

from lmppl.lm.network.lora import factors, plain_adapter

if TYPE_CHECKING:  # peft takes seconds, and is imported when an adapter is made
    from peft import LoraConfig, PeftModel


def clone(
    model: torch.nn.Module, *, own: Iterable[torch.nn.Parameter] = (), frozen: bool = False
) -> Any:
    """A copy of the module tree and its configuration on the same parameters and buffers.

    Args:
        model: any module; it is not changed.
        own: parameters that the copy gets its own of.
        frozen: share the memory of parameters that need a gradient, but as parameters that need
            none: ``requires_grad`` of the original stays as it is.
    """
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    if frozen:
        for p in model.parameters():
            if p.requires_grad:
                memo[id(p)] = torch.nn.Parameter(p.detach(), requires_grad=False)
    for p in own:
        del memo[id(p)]
    return copy.deepcopy(model, memo=memo)


def is_adapted(model: Any) -> bool:
    """Whether it is a model with an adapter of peft, which is not imported for the question."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def default_config(model: torch.nn.Module) -> LoraConfig:
    """LoRA (Hu et al. 2021, arXiv 2106.09685) on every linear layer but the output embedding.

    Without dropout, since the densities of a guide must be the same when drawn and when scored.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=16,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),
        task_type="CAUSAL_LM",
    )


def add_adapter(model: torch.nn.Module, config: LoraConfig | None = None) -> PeftModel:
    """A trainable adapter on a clone of ``model``, at first equal to it.

    The adapter's parameters are float32 whatever the base's dtype, and the only ones that need a
    gradient *in the new model's* ``parameters()``; base parameters are shared and frozen.
    """
    from peft import get_peft_model

    base = clone(model, frozen=True)
    config = default_config(base) if config is None else copy.deepcopy(config)
    with warnings.catch_warnings():
        # peft 0.21 asks transformers for a property under the name it had before.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(base, config)


def adapter_version(model: PeftModel) -> tuple[float, ...]:
    """A digest of the trainable parameters, by value: fused optimisers and writes to ``.data`` do
    not count a parameter's version up."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        return ()
    with torch.no_grad():
        digests = [*torch._foreach_norm(trained), *(p.sum() for p in trained)]
        return tuple(torch.stack(digests).tolist())


def merge(model: PeftModel) -> Any:
    """A frozen copy of the adapted model with the adapter merged into its weights.

    Out of place: only the adapted layers get new weights, computed in float32 and rounded once to
    the base's dtype. (In place, merging and unmerging a bfloat16 base changes it for good.) The
    density differs from the adapter's by that rounding, so weights must use the log-probabilities
    of the model that was drawn from.
    """
    adapted = {
        parameter: None
        for layer in _tuned_layers(model).values()
        for parameter in layer.get_base_layer().parameters()
    }
    with torch.no_grad(), torch.inference_mode(False):
        copied = clone(model, own=adapted)
        layers = [layer.get_base_layer() for layer in _tuned_layers(copied).values()]
        dtypes = [(p, p.dtype) for layer in layers for p in layer.parameters()]
        for parameter, _ in dtypes:
            parameter.data = parameter.data.float()
        whole = copied.merge_and_unload()
        for parameter, dtype in dtypes:
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(False)
    return whole


def _tuned_layers(model: Any) -> dict[str, Any]:
    """The layers that peft has put in place of the model's, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def merge_again(model: PeftModel, into: Any) -> bool:
    """Write the present merged weights into what ``merge(model)`` has returned before.

    Returns False where the adapter is more than a difference of weights (DoRA, trained biases, ...).
    """
    modules = dict(into.named_modules())
    pairs: list[tuple[Any, torch.Tensor]] = []
    for name, layer in _tuned_layers(model.get_base_model()).items():
        target = modules.get(name)
        plain = hasattr(layer, "lora_A") and not any(getattr(layer, "use_dora", {}).values())
        bias = any(getattr(layer, "lora_bias", {}).values())
        if not plain or bias or target is None or not hasattr(layer, "get_delta_weight"):
            return False
        base_bias = getattr(layer.get_base_layer(), "bias", None)
        if getattr(layer, "lora_embedding_A", None) or (
            base_bias is not None and base_bias.requires_grad
        ):
            return False
        pairs.append((layer, target.weight))
    others = {id(p) for layer, _ in pairs for p in layer.parameters()}
    if any(p.requires_grad and id(p) not in others for p in model.parameters()):
        return False
    room: dict[torch.Size, torch.Tensor] = {}  # float32, used again by every layer of a shape
    with torch.no_grad(), torch.inference_mode(False):
        for layer, weight in pairs:
            base = layer.get_base_layer().weight
            if base.shape not in room:
                room[base.shape] = torch.empty_like(base, dtype=torch.float32)
            total = room[base.shape].copy_(base)
            alone = plain_adapter(layer)
            if alone is not None:
                down, up, scale = factors(layer, alone)
                total.addmm_(up.float(), down.float(), alpha=scale)
            else:
                for adapter in layer.active_adapters:
                    if adapter in layer.lora_A:
                        total += layer.get_delta_weight(adapter).float()
            weight.copy_(total)  # counts its version up, so that kept prompts are dropped
    return True
