"""A guide on disk: a standard peft adapter, tensors in safetensors, a description in JSON.

    guide.json           what it is, and which base model it belongs to
    adapter-0/           adapter_config.json, adapter_model.safetensors (as peft writes them)
    tensors.safetensors  heads of sites that are not text, or a guide program's pyro.params

A folder is written under a temporary name and renamed, so that it is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lmppl.guides.automatic import TrainedSites
from lmppl.guides.heads import Head
from lmppl.lm import LM
from lmppl.report.history import History

if TYPE_CHECKING:
    from lmppl.training.lm_guide import LMGuide

FORMAT = 4


def save(guide: LMGuide, path: Path) -> None:
    """Write a guide; replaces a guide that is there, and refuses to replace anything else.

    Raises:
        FileExistsError: if ``path`` exists and is no guide.
        ValueError: if a guide program has not been run yet, so that its parameters are unknown.
    """
    if guide.program is not None and not guide.adapters() and not guide.param_names:
        raise ValueError(
            "the guide program has not been run yet, so its parameters are not known: fit it, or "
            "draw from it, before it is saved"
        )
    replace_folder(path, "guide", lambda folder: write_guide(guide, folder))


def replace_folder(path: Path, kind: str, write: Callable[[Path], None]) -> None:
    """Write a folder under a temporary name, and rename it: it is there whole or not at all.

    Args:
        path: of the folder. A folder that holds ``{kind}.json`` is replaced, nothing else is.
        kind: what it is.
        write: writes it.

    Raises:
        FileExistsError: if ``path`` exists and is of no such kind.
        OSError: if it cannot be written; what was there before is kept.
    """
    if path.exists() and not (path / f"{kind}.json").is_file():
        raise FileExistsError(f"{path} exists and is no {kind}: choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        try:
            write(temporary)
        except SafetensorError as error:  # which is no OSError, also if the disk is full
            raise OSError(str(error)) from error
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent))
            os.replace(path, old / kind)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_guide(guide: LMGuide, folder: Path) -> None:
    """The files of a guide."""
    tensors: dict[str, torch.Tensor] = {}
    heads: dict[str, list[int]] = {}
    for key, head in guide.heads.items():
        assert isinstance(head, Head)
        heads[key] = [head.num_features, head.num_moves, head.num_numbers]
        for name, tensor in head.state_dict().items():
            tensors[f"heads.{key}.{name}"] = tensor.contiguous()
    store = pyro.get_param_store()
    for name in guide.param_names:
        tensors[f"params.{name}"] = store._params[name].detach().contiguous()
    for name, tensor in guide.saved_params.waiting.items():
        tensors[f"params.{name}"] = tensor.contiguous()
    for i, adapter in enumerate(guide.adapters()):
        adapter.model.save_pretrained(folder / f"adapter-{i}")
    save_file(tensors, folder / "tensors.safetensors")
    description = {
        "format": FORMAT,
        "kind": "automatic" if guide.program is None else "program",
        "model": getattr(guide.model, "__name__", type(guide.model).__name__),
        "base": {"name": guide.base.name, "fingerprint": fingerprint(guide.base)},
        "condition_on": "all" if guide.condition_on == "all" else sorted(guide.condition_on),
        "heads": heads,
        "num_adapters": len(guide.adapters()),
        "adapted_sites": guide.adapted_sites if guide.adapter_per_site else None,
        "tempered_target": guide.tempered_target,
        "sites": guide.sites.laws,
        "notes": guide.notes,
        "history": guide.history,
    }
    (folder / "guide.json").write_text(json.dumps(description, indent=1))


def load(
    path: Path,
    model: Callable[..., Any],
    lm: LM | None,
    program: Callable[..., Any] | None,
) -> LMGuide:
    """Read a guide; see ``LMGuide.load``."""
    from lmppl.training.lm_guide import LMGuide

    file = path / "guide.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} is no guide: it has no guide.json")
    description = json.loads(file.read_text())
    if description.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {description.get('format')!r}; this version of lmppl reads {FORMAT}"
        )
    kind = "automatic" if program is None else "program"
    if description["kind"] != kind:
        needed = "give program=" if description["kind"] == "program" else "leave out program="
        raise ValueError(f"{path} holds a guide of kind {description['kind']!r}: {needed}")
    lora = None
    if program is None and description["num_adapters"]:
        from peft import LoraConfig

        lora = LoraConfig.from_pretrained(path / "adapter-0")
        lora.inference_mode = False
    sites = description["adapted_sites"]
    guide = LMGuide(
        model,
        lm=lm,
        program=program,
        lora=lora,
        condition_on=description["condition_on"],
        adapter_per_site=sites is not None,
    )
    if fingerprint(guide.base) != description["base"]["fingerprint"]:
        raise ValueError(
            f"{path} was trained on the base model {description['base']['name']!r}, given "
            f"{guide.base.name!r}, whose weights or tokens are others: load that model, or train anew"
        )
    guide.history = History(description["history"])
    guide.notes = list(description["notes"])
    guide.tempered_target = description["tempered_target"]
    guide.sites = TrainedSites(description["sites"])
    read_parameters(guide, path, description)
    return guide


def read_parameters(guide: LMGuide, path: Path, description: dict[str, Any]) -> None:
    """The parameters of a saved guide, into one of the same making."""
    tensors = load_file(path / "tensors.safetensors")
    state: dict[str, Any] = {
        "adapters": [
            load_file(path / f"adapter-{i}" / "adapter_model.safetensors")
            for i in range(description["num_adapters"])
        ],
        "params": {n.removeprefix("params."): t for n, t in tensors.items() if "params." in n[:7]},
    }
    if guide.program is not None:
        guide.restore_later(state)
        return
    sites = [""] if description["adapted_sites"] is None else description["adapted_sites"]
    for site, adapter in zip(sites, state["adapters"], strict=True):
        _set_adapter(guide.adapter_for(site), adapter)
    for key, sizes in description["heads"].items():
        if key not in guide.heads:
            guide.heads[key] = Head(*sizes)
        prefix = f"heads.{key}."
        guide.heads[key].load_state_dict(
            {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        )


def restore_program(adapters: list[LM], names: list[str], state: dict[str, Any]) -> None:
    """Put loaded parameters into a guide program's adapters.

    Args:
        adapters: of the program.
        names: of the ``pyro.param``s that runs of it have come to.
        state: what was saved.

    Raises:
        ValueError: if the program has others than the one that was saved.
    """
    known = not state["params"] or bool(set(names) & set(state["params"]))
    if len(adapters) != len(state["adapters"]) or not known:
        raise ValueError(
            f"the saved guide program had {len(state['adapters'])} adapters and the parameters "
            f"{sorted(state['params'])}, this one has {len(adapters)} and {sorted(names)}"
        )
    for adapter, tensors in zip(adapters, state["adapters"], strict=True):
        _set_adapter(adapter, tensors)


def _set_adapter(adapter: LM, tensors: dict[str, torch.Tensor]) -> None:
    from peft import set_peft_model_state_dict

    result = set_peft_model_state_dict(adapter.model, tensors)
    unexpected = list(getattr(result, "unexpected_keys", []))
    if unexpected:
        raise ValueError(
            f"the saved adapter has the tensor {unexpected[0]!r}, which this adapter has not: it was "
            "made with another LoraConfig"
        )


def fingerprint(lm: LM) -> str:
    """A hash of a base model's tokens, of its shape and of a sample of its weights.

    Weights are rounded to bfloat16 first: the same model in another dtype is the same base.
    """
    digest = hashlib.sha256(lm.vocabulary.fingerprint.encode())
    for name, parameter in lm.model.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // 64)][:64].to(torch.bfloat16).float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
