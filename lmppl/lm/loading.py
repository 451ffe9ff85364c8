"""Loading: from a name or a path to a model and its tokenizer, on a device, in a dtype."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from lmppl.checks import nearest
from lmppl.lm import embedded
from lmppl.lm.gguf import load_local, load_pretrained

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


def load(
    name_or_path: str | Path,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    **hf_kwargs: Any,
) -> tuple[Any, Any]:
    """A frozen model and its tokenizer; see ``LM.from_pretrained``."""
    if not isinstance(name_or_path, (str, Path)):
        raise TypeError(f"name_or_path={name_or_path!r}: it must be a name or a path")
    if "trust_remote_code" in hf_kwargs:
        raise ValueError(
            "trust_remote_code is not supported: lmppl does not run code that comes with a model. "
            "Load such a model yourself and wrap it with LM(model, tokenizer)."
        )
    if "torch_dtype" in hf_kwargs:
        raise ValueError("torch_dtype is called dtype here: LM.from_pretrained(..., dtype=...)")
    device = choose_device(device)
    dtype = choose_dtype(dtype, device)
    name = str(name_or_path)
    is_embedded = name.lower() == embedded.ALIAS
    # The hub would be asked ten times. Its names of this form are few, and none is like this one.
    like_alias = nearest(name.lower(), [embedded.ALIAS], cutoff=0.7)
    path = embedded.model_dir() if is_embedded else Path(name).expanduser()
    if path.suffix == ".gguf" or path.is_dir():
        model, tokenizer = load_local(path, dtype, **hf_kwargs)
    elif like_alias and "/" not in name:
        raise OSError(f"no model is called {name!r}{like_alias} (That one is embedded.)")
    else:
        try:  # a download may take long: let it show
            model, tokenizer = load_pretrained(name, dtype, progress=True, **hf_kwargs)
        except OSError as error:  # the hub's own errors are OSErrors too
            raise OSError(
                f"{name!r} is neither the embedded model {embedded.ALIAS!r}, nor a local directory, "
                f"nor a .gguf file, and the Hugging Face hub did not give it. The hub said: "
                f"{error}"
            ) from error
    if "device_map" not in hf_kwargs:
        model.to(device)
    model.requires_grad_(False)
    return model.eval(), tokenizer


def choose_device(device: str | torch.device | None) -> torch.device:
    """The given device, else cuda, else mps, else cpu. ValueError if torch cannot use it."""
    if device is None:
        if torch.cuda.is_available():  # torchrun numbers the processes of a machine
            place = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
            return torch.device("cuda", place % torch.cuda.device_count())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device={str(device)!r} cannot be used here: {reason}. "
            "device=None takes the best that is there."
        ) from error
    return chosen


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The given dtype, else bfloat16 where the machine computes fast in it, else float32."""
    if dtype is None:
        return torch.bfloat16 if _fast_bfloat16(device) else torch.float32
    chosen = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise ValueError(
            f"dtype={dtype!r} is not supported; use one of {', '.join(DTYPES)}, or None"
        )
    if chosen == torch.float64 and device.type == "mps":
        raise ValueError("dtype='float64' does not exist on mps; use float32")
    return chosen


def _fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return any(getattr(torch.cpu, check, lambda: False)() for check in checks)
    return False
