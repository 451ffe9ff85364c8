"""What can be trained in a program: the adapters that it draws from or scores by, its parameters.

Their state is a nested dict of tensors and JSON's values, which ``saving.py`` writes.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK

from lmppl import runtime
from lmppl.distributions import LMText
from lmppl.lm import LM
from lmppl.primitives import use
from lmppl.runtime import Particle
from lmppl.runtime.arguments import Args
from lmppl.runtime.particle import blind

if TYPE_CHECKING:
    from peft import LoraConfig

_RUNS = 16  # a branch may have parameters of its own


class Trainables:
    """The trainable parts of a program, found by running it: language models with parameters that
    need a gradient, but for ``base``, in the order of their use; ``pyro.param``s, by name."""

    def __init__(self, base: LM | None) -> None:
        self._base = base
        self.adapters: list[LM] = []
        self.param_names: list[str] = []

    def find(self, program: Callable[..., Any], args: Args, *, is_guide: bool = False) -> None:
        """Add what some runs of the program use, whose sites that name no model use ``base``;
        ``is_guide`` as of ``Particle``."""
        with nullcontext() if self._base is None else use(self._base):
            runs = runtime.start(program, args, _RUNS, seed=0, is_guide=is_guide)
            with runtime.ending(runs):
                runtime.run_to_end(runs)
        self.add(runs)

    def add(self, runs: Iterable[Particle]) -> None:
        """Add what these runs use."""
        for run in runs:
            for name, node in run.trace.nodes.items():
                if node["type"] == "param" and name not in self.param_names:
                    self.param_names.append(name)
                fn = node.get("fn")
                if isinstance(fn, LMText) and fn.lm not in [self._base, *self.adapters]:
                    self.adapters += [fn.lm] if trainable(fn.lm) else []

    def leave_out(self, names: Collection[str]) -> None:
        """Forget that these of ``named_parameters()`` were found: what was found last."""
        self.param_names[:] = [n for n in self.param_names if f"params.{n}" not in names]
        self.adapters = [
            adapter
            for i, adapter in enumerate(self.adapters)
            if not any(f"adapter-{i}.{name}" in names for name in trainable(adapter))
        ]

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """All of them, unconstrained, each once."""
        store = pyro.get_param_store()
        named: dict[str, Any] = {f"params.{name}": store._params[name] for name in self.param_names}
        for i, adapter in enumerate(self.adapters):
            named |= {f"adapter-{i}.{name}": p for name, p in trainable(adapter).items()}
        unique: dict[int, tuple[str, Any]] = {}  # a parameter may be an adapter's and pyro's
        for name, parameter in named.items():
            unique.setdefault(id(parameter), (name, parameter))
        return dict(unique.values())


def trainable(lm: LM) -> dict[str, torch.nn.Parameter]:
    """The parameters of a language model that need a gradient, by name."""
    return {name: p for name, p in lm.model.named_parameters() if p.requires_grad}


# --- adapters ------------------------------------------------------------------------------------


def adapter_config(lm: LM) -> dict[str, Any] | None:
    """peft's configuration of an adapter, in JSON's types; None: all weights are trained."""
    return config_state(getattr(lm.model, "peft_config", {}).get("default"))


def config_state(config: LoraConfig | None) -> dict[str, Any] | None:
    """A configuration as peft writes it, in JSON's types."""
    if config is None:
        return None
    # The model's name is a path, on some machine.
    changed = {"inference_mode": True, "base_model_name_or_path": None}
    return json.loads(json.dumps(config.to_dict() | changed, default=sorted))


def lora_config(state: Mapping[str, Any] | None) -> LoraConfig | None:
    """The configuration that ``config_state`` wrote."""
    if state is None:
        return None
    from peft import LoraConfig  # peft takes a second to import

    return LoraConfig.from_peft_type(**{**state, "inference_mode": False})


def adapter_state(lm: LM) -> dict[str, Any]:
    """The state of an adapter: its configuration, and its tensors by peft's names."""
    config = adapter_config(lm)
    tensors: dict[str, torch.Tensor] = {name: p.detach() for name, p in trainable(lm).items()}
    if config is not None:
        from peft import get_peft_model_state_dict

        tensors = get_peft_model_state_dict(lm.model, save_embedding_layers=False)
    return {"config": config, "tensors": tensors}


def load_adapter_state(lm: LM, state: Mapping[str, Any]) -> None:
    """Put a saved state into an adapter of the same making.

    Raises:
        ValueError: if its configuration, its tensors or their shapes are others; says which.
    """
    saved, given = _making(state), _making(adapter_state(lm))
    for what in sorted(saved.keys() | given.keys()):
        if saved.get(what) != given.get(what):
            raise ValueError(
                f"the saved adapter has {what} {saved.get(what)}, this one {given.get(what)} (None: "
                "there is none): they were made with other LoraConfigs"
            )
    if state["config"] is None:
        parameters = trainable(lm)
        with torch.no_grad():
            for name, tensor in state["tensors"].items():
                parameters[name].copy_(tensor)
    else:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(lm.model, dict(state["tensors"]))


def _making(state: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter must share with another whose weights it takes. (Options that only a newer peft
    knows are ``None`` or ``False`` where they are not used.)"""
    nothing = ("inference_mode", "base_model_name_or_path", "revision", "peft_version",
               "auto_mapping", "task_type")  # fmt: skip
    config = {k: v for k, v in (state["config"] or {}).items() if v and k not in nothing}
    return config | {f"tensor {name}": tuple(t.shape) for name, t in state["tensors"].items()}


# --- base models ---------------------------------------------------------------------------------


def base_state(lm: LM) -> dict[str, Any]:
    """What a model, or that of an adapter, is known by: its tokens, shape and some of its weights."""
    shapes, dtypes, sample = [], [], []
    for name, parameter in lm.model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            continue
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        shapes.append((name, *parameter.shape))
        dtypes.append(str(parameter.dtype))
        flat = parameter.detach().reshape(-1)
        sample.append(flat[:: max(1, len(flat) // 64)][:64].float().cpu())
    return {
        "name": lm.name,
        "vocabulary": lm.vocabulary.fingerprint,
        "shapes": hashlib.sha256(repr(shapes).encode()).hexdigest(),
        "dtypes": hashlib.sha256(repr(dtypes).encode()).hexdigest(),
        "sample": torch.cat(sample),
    }


def same_base(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    """Whether two ``base_state``s are of one model, in the same or in different dtypes."""
    if any(one[key] != two[key] for key in ("vocabulary", "shapes")):
        return False
    # Rounding to bfloat16, of what was rounded to float16 or not, moves a weight by at most 2**-8 of
    # it; float16 has no numbers between multiples of 2**-24.
    rtol, atol = (0.0, 0.0) if one["dtypes"] == two["dtypes"] else (2.0**-7, 2.0**-24)
    return torch.allclose(one["sample"], two["sample"], rtol=rtol, atol=atol, equal_nan=True)


@blind
class SavedParams(Messenger):
    """Values for parameters to which a program comes late: on another input, on a rare branch. They
    are ``waiting``, unconstrained and by name."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: dict[str, torch.Tensor] = {}

    def around(self, program: Callable[..., Any]) -> Callable[..., Any]:
        """``program``, with each value put in where it first comes to its parameter. (Unlike
        ``self(program)``, it has the signature of the program.)"""

        @functools.wraps(program, updated=())
        def restoring(*args: Any, **kwargs: Any) -> Any:
            with nullcontext() if self in _PYRO_STACK else self:  # the program may call itself
                return program(*args, **kwargs)

        return restoring

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] in self.waiting:
            msg["fn"](*msg["args"], **msg["kwargs"])  # makes it, with its constraint
            self.put_in([msg["name"]])

    def put_in(self, names: Iterable[str]) -> None:
        """Put values into those of the parameters that exist; raises ``ValueError`` if one has
        another shape."""
        store = pyro.get_param_store()
        for name in self.waiting.keys() & names & store.keys():
            value, parameter = self.waiting[name], store._params[name]
            if value.shape != parameter.shape:
                raise ValueError(
                    f"the saved parameter '{name}' has the shape {tuple(value.shape)} "
                    f"(unconstrained), the program's has {tuple(parameter.shape)}: it belongs to "
                    "another program"
                )
            with torch.no_grad():
                parameter.copy_(value)
            del self.waiting[name]
