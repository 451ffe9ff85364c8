"""Adapters: trainable copies of a language model that share its weights.

peft edits a model in place, so it gets a clone of the module tree on the base's own memory, where
it may not write: the base stays bit-exact, and base and adapter can be used in turn.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from lmppl.lm.network.lora import factors, plain_adapter
from lmppl.lm.network.modules import clone, logits_agree, plain_logits

if TYPE_CHECKING:  # peft takes seconds, and is imported when an adapter is made
    from peft import PeftConfig, PeftModel


def is_adapted(model: Any) -> bool:
    """Whether it is a model with an adapter of peft, which is not imported for the question."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def adapter_summary(model: PeftModel) -> str:
    """An adapter in a few words: kind, rank, how many layers it changes, how many numbers it trains."""
    config = next(iter(model.peft_config.values()))
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    parts = [{"LORA": "LoRA"}.get(kind, kind)]
    if isinstance(rank := getattr(config, "r", None), int):
        parts[0] += f" of rank {rank}"
    if layers := len(_tuned_layers(model)):
        parts[0] += f" on {layers} layer{'s' * (layers != 1)}"
    parts.append(f"{sum(p.numel() for p in _trained(model)):,} trainable parameters")
    return ", ".join(parts)


def adapted_modules(model: PeftModel) -> Any:
    """The base model's modules, with those of the adapter in their place. ``ValueError``: the
    adapter is more than that (prompt learning)."""
    for config in model.peft_config.values():
        if config.is_prompt_learning:
            raise ValueError(
                f"{_name(config)}: prompt-learning adapters (prefix or prompt tuning) are not "
                "supported: their virtual tokens would be lost; use LoRA or another adapter of the "
                "weights"
            )
    return model.get_base_model()


def default_config(model: torch.nn.Module) -> PeftConfig:
    """LoRA (Hu et al. 2021, arXiv 2106.09685) on every linear layer but the output embedding."""
    from peft import LoraConfig

    return LoraConfig(
        r=16,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),
        task_type="CAUSAL_LM",
    )


def add_adapter(model: torch.nn.Module, config: PeftConfig | None = None) -> PeftModel:
    """A trainable adapter on a clone of ``model``.

    Parameters of the base are shared and frozen; those that the configuration trains (biases) are
    copied. What peft adds is float32 whatever the base's dtype. Dropout has no effect,
    as densities must be the same when drawn and when scored.

    Raises:
        ValueError: peft refuses the configuration, or the adapter would change the base, train
            nothing, or change the logits by other means than the base model's layers.
    """
    from peft import get_peft_model

    parameters = list(model.parameters())
    memory = {_memory(p) for p in parameters}
    plain = [p for p in parameters if type(p) is Parameter]  # quantised ones are more than numbers
    shared = {p: Parameter(p.detach(), requires_grad=False) for p in plain}
    base = clone(model, shared)
    config = default_config(base) if config is None else copy.deepcopy(config)
    try:
        with warnings.catch_warnings(), _ReadOnly(memory):
            # peft 0.21 asks transformers for a property under the name it had before.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            adapted = get_peft_model(base, config)
    except _BaseWrittenError:
        raise _changes_base(config) from None
    except (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"peft makes no adapter of {_name(config)}: {error}") from error
    if any(_memory(new) != _memory(old) for old, new in shared.items()):
        raise _changes_base(config)
    # The base's very parameters in place of their frozen stand-ins: the adapter follows their fate.
    originals = {new: old for old, new in shared.items() if not old.requires_grad}
    for module in adapted_modules(adapted).modules():
        for name, parameter in module._parameters.items():
            if parameter in originals and not parameter.requires_grad:
                module._parameters[name] = originals[parameter]
    trained = _trained(adapted)
    for parameter in trained:
        if _memory(parameter) in memory:
            parameter.data = parameter.data.clone()
    if not trained:
        raise ValueError(f"{_name(config)} leaves nothing to train (inference_mode?)")
    if not _is_plain(adapted) or getattr(config, "layer_replication", None):
        _check_logits(adapted, model, config)
    return adapted


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _BaseWrittenError(Exception):
    pass


class _ReadOnly(TorchDispatchMode):
    """Inside, whatever would write into some memory raises ``_BaseWrittenError``."""

    def __init__(self, memory: set[int]) -> None:
        super().__init__()
        self._memory = memory - {0}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        arguments = func._schema.arguments
        given = kwargs | {a.name: value for a, value in zip(arguments, args, strict=False)}
        for argument in arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = given.get(argument.name)
                for tensor in written if isinstance(written, (list, tuple)) else [written]:
                    if isinstance(tensor, Tensor) and _memory(tensor) in self._memory:
                        raise _BaseWrittenError
        return func(*args, **kwargs)


def _changed_fields(config: PeftConfig) -> list[str]:
    """What the configuration asks for besides its defaults, as ``name=value``."""
    fields = []
    for field in dataclasses.fields(config):
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        value = getattr(config, field.name)
        if field.init and value != default and not field.name.startswith(("peft_", "task_")):
            fields.append(f"{field.name}={value!r}")
    return fields


def _name(config: PeftConfig) -> str:
    return f"{type(config).__name__}({', '.join(_changed_fields(config))})"


def _changes_base(config: PeftConfig) -> ValueError:
    pattern = re.compile("init_.*?=|[^=]*_config=")
    what = " and ".join(filter(pattern.match, _changed_fields(config))) or _name(config)
    return ValueError(
        f"{type(config).__name__}: {what} changes the base's weights when the adapter is made, but "
        "the base is the model that the adapter's draws are weighed by, and is shared. Leave that "
        "out, which starts from the base as it is (LoRA: init_lora_weights=True or 'gaussian')"
    )


def _trained(model: torch.nn.Module) -> list[Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@torch.no_grad()
def adapter_version(model: PeftModel) -> tuple[float, ...]:
    """A digest of the trainable parameters, by value: fused optimisers and writes to ``.data`` do
    not count a parameter's version up."""
    trained = _trained(model)
    if not trained:
        return ()
    return tuple(
        torch.stack([*torch._foreach_norm(tuple(trained)), *map(torch.sum, trained)]).tolist()
    )


def _twin(model: PeftModel) -> PeftModel:
    """A copy with trained parameters of its own, some way from the present ones."""
    generator = torch.Generator().manual_seed(0)
    twins = {}
    for old in _trained(model):
        noise = torch.randn(old.shape, generator=generator).to(old.device, old.dtype)
        size = max(0.2 * float(old.std(correction=0)), 0.02)
        twins[old] = Parameter(old.detach() + size * noise)
    return clone(model, twins).eval()


def _probe(model: PeftModel) -> Tensor:
    """A few tokens (1, T), among them those that a configuration names (trained ones, triggers)."""
    values = [value for config in model.peft_config.values() for value in vars(config).values()]
    lists = [value[:8] for value in values if isinstance(value, list)]
    named = [number for numbers in lists for number in numbers if type(number) is int]
    embedding = model.get_input_embeddings().weight
    return torch.tensor([[1, 2, *named, 0, 1]], device=embedding.device) % len(embedding)


@torch.no_grad()
def _check_logits(model: PeftModel, base: torch.nn.Module, config: PeftConfig) -> None:
    """Raises ``ValueError`` unless the adapter changes the logits, in the base model's layers
    alone, and leaves them a function of the tokens before."""
    tokens = _probe(model)
    try:
        twin = _twin(model)
        whole = plain_logits(twin, tokens)
        by_layers = plain_logits(twin.get_base_model(), tokens)
        early = plain_logits(twin, tokens[:, :2])
    except Exception as error:  # whatever its code raises
        raise ValueError(f"{_name(config)}: the adapted model does not run: {error}") from error
    if torch.equal(whole, plain_logits(clone(base).eval(), tokens)):
        wrong = "its parameters have no effect on the logits"
    elif not torch.equal(whole, by_layers):
        wrong = "it changes the model by other means than its layers, which nobody else would see"
    elif not logits_agree(early, whole[:, :2], exact=whole.dtype == torch.float32):
        wrong = "logits depend on the tokens that follow, so they define no density"
    else:
        return
    raise ValueError(f"{_name(config)}: {wrong}; use LoRA or another adapter of the weights")


@torch.no_grad()
def can_merge(model: PeftModel) -> bool:
    """Whether merged weights give the adapter's logits."""
    if _is_plain(model):
        return True
    twin, tokens = _twin(model), _probe(model)
    try:
        got = plain_logits(merge(twin), tokens)
    except Exception:  # peft says in many ways that it can't merge
        return False
    return logits_agree(got, plain_logits(twin, tokens), exact=got.dtype == torch.float32)


def _tuned_layers(model: Any) -> dict[str, Any]:
    """The layers that peft has put in place of the model's, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def _is_plain(model: PeftModel) -> bool:
    """Whether the adapter consists of nothing but plain LoRA layers."""
    known: set[int] = set()
    for layer in _tuned_layers(model).values():
        name = plain_adapter(layer)
        if name is None:
            return False
        known.update(id(factor) for factor in factors(layer, name)[:2])
    return all(id(p) in known for p in _trained(model))


def merge(model: PeftModel) -> Any:
    """A frozen copy of the adapted model with the adapter merged into its weights.

    Only the adapted layers get new weights, each its own even where the base's are tied, computed
    in float32 and rounded once to the base's dtype; by that the density differs from the adapter's.
    (In place, merging and unmerging a bfloat16 base changes it for good.)
    """
    with torch.no_grad(), torch.inference_mode(False):
        copied = clone(model, {p: Parameter(p.detach().clone()) for p in _trained(model)})
        with warnings.catch_warnings():  # such as that it is tied, which it no longer is
            warnings.simplefilter("ignore", UserWarning)
            for layer in _tuned_layers(copied).values():
                _merge_layer(layer)
            merged = copied.merge_and_unload()
        return merged.requires_grad_(False)


def _merge_layer(layer: Any) -> None:
    """Merge one layer, which gets weights of its own: no more than one of them is float32 at a time."""
    base = layer.get_base_layer()
    dtypes = {name: parameter.dtype for name, parameter in base.named_parameters(recurse=False)}
    for name in dtypes:
        whole = base.get_parameter(name).detach().to(torch.float32, copy=True)
        base._parameters[name] = Parameter(whole, requires_grad=False)
    layer.merge()
    for name, dtype in dtypes.items():
        parameter = base.get_parameter(name)
        parameter.data = parameter.data.to(dtype)


def merge_again(model: PeftModel, into: Any) -> None:
    """Write the present merged weights into what ``merge(model)`` has returned before, which counts
    their versions up."""
    with torch.no_grad(), torch.inference_mode(False):
        if not _is_plain(model):
            present = dict(merge(model).named_parameters())
            for name, parameter in into.named_parameters():
                if parameter is not present[name]:
                    parameter.copy_(present[name])
            return
        modules = dict(into.named_modules())
        room: dict[torch.Size, Tensor] = {}  # float32, used again by every layer of a shape
        for name, layer in _tuned_layers(model.get_base_model()).items():
            base = layer.get_base_layer().weight
            if base.shape not in room:
                room[base.shape] = torch.empty_like(base, dtype=torch.float32)
            down, up, scale = factors(layer, str(plain_adapter(layer)))
            total = room[base.shape].copy_(base)
            modules[name].weight.copy_(total.addmm_(up.float(), down.float(), alpha=scale))
