"""Guides on disk: a state (see ``lmppl.states``), with its adapters beside it, as peft writes them:

guide.json, guide.safetensors
adapter-0/   adapter_config.json, adapter_model.safetensors
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from lmppl.states import State, read_state, save_tensors, write_state

GUIDE_FORMAT = 5


def write_guide(folder: Path, state: State) -> None:
    """Write the state of a guide, ``LMGuide.state_dict()``, into a folder; see ``write_state``."""
    adapters = []
    for i, adapter in enumerate(state["guide"]["adapters"]):
        inner = folder / f"adapter-{i}"
        inner.mkdir()
        tensors = {name: tensor.cpu().contiguous() for name, tensor in adapter["tensors"].items()}
        save_tensors(tensors, inner / "adapter_model.safetensors", format="pt")
        if adapter["config"] is not None:
            text = json.dumps(adapter["config"], indent=2, sort_keys=True)
            (inner / "adapter_config.json").write_text(text)
        adapters.append(inner.name)
    written = {**state, "guide": {**state["guide"], "adapters": adapters}}
    write_state(folder, "guide", GUIDE_FORMAT, written)


def read_guide(folder: Path) -> dict[str, Any]:
    """The state that ``write_guide`` wrote; see ``read_state``."""
    state = read_state(folder, "guide", GUIDE_FORMAT, ": train anew")
    adapters = []
    for name in state["guide"]["adapters"]:
        config = folder / name / "adapter_config.json"
        config_state = json.loads(config.read_text()) if config.is_file() else None
        tensors = load_file(folder / name / "adapter_model.safetensors")
        adapters.append({"config": config_state, "tensors": tensors})
    state["guide"]["adapters"] = adapters
    return state
