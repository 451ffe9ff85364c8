"""What goes wrong in one process of a run, for ``test_ranks.py``: each prints what it is told.

    torchrun --nproc-per-node 2 tests/training/failing_ranks.py all FOLDER

``all``: what all can go on from; else one fault that ends them.
"""

from __future__ import annotations

import os
import resource
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

import lmppl
from lmppl import lm_sample
from lmppl.testing import tiny_lm

RANK = int(os.environ["RANK"])
DATA = [("ab.", "aba"), ("b", "aba"), ("a", "bab"), ("ab", "ba")]
broken: set[str] = set()


def program(x, y):
    z = lm_sample("z", x, max_tokens=3, stop=".")
    if broken:
        raise ConnectionError(f"the {'and'.join(broken)} is broken")
    lm_sample("y", [x, z], obs=y)


def fit(data=DATA, guide=None, lm=None, **options):
    guide = guide or lmppl.LMGuide(program, lm=lm or tiny_lm("ab.", seed=0))
    options = {"steps": 4, "batch_size": 8, "inputs_per_step": 2, "seed": 0} | options
    guide.fit(data, progress=False, **options)
    return guide


def say(what: str, text: object) -> None:
    print(f"{what}: {text}", flush=True)


def told(what: str, *args, **options) -> None:
    try:
        guide = fit(*args, **options)
    except Exception as error:
        write_all()
        notes = " ".join(getattr(error, "__notes__", []))
        say(what, f"{type(error).__name__}: {error} {notes}")
    else:
        write_all()
        say(what, f"loss {guide.history.column('loss')[-1]:.4f}")
    finally:
        broken.clear()


def breaking(at: int, where: int = 1):
    """A callback after which the program fails."""

    def callback(figures):
        if where == RANK and figures["step"] == at:
            broken.add("tool")

    return callback


def raising(figures):
    if RANK and figures["step"] == 1:
        raise OSError("no tracker")


def stream():
    yield from DATA[:3]
    if RANK:
        raise OSError("no such file")
    yield DATA[3]


def full_disk(figures):
    """No file of the first process may grow beyond 100 bytes."""
    if not RANK and figures["step"] == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))


def write_all():
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


def main(folder: Path) -> None:
    guide = lmppl.LMGuide(program, lm=tiny_lm("ab.", seed=0))
    num = os.environ["WORLD_SIZE"]
    os.environ["WORLD_SIZE"] = "1"  # as where a program starts processes by itself
    told("alone")

    def begin(figures):
        if figures["step"] == 1:
            os.environ["WORLD_SIZE"] = num
            dist.init_process_group("gloo")

    told("a late group", callback=begin)
    told("a guide from before the group", guide=guide)
    told("a tool", callback=breaking(1))
    told("after it")
    told("a stream", stream(), inputs_per_step=1)
    told("a callback", callback=raising)
    if RANK:  # which has caught its error
        told("another run")
    told("after that")
    dist.destroy_process_group()
    told("a group that lmppl begins")
    dist.destroy_process_group()
    told("and another")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        told("a full disk", callback=full_disk, checkpoint=folder / "run", checkpoint_every=2)
    for warning in caught:
        if "could not be written" in str(warning.message):
            say("warned", warning.message)
    told("resumed", checkpoint=folder / "run", resume=True)


def leave() -> None:
    """An error of one process where the others can't be told."""
    backward = torch.Tensor.backward

    def out_of_memory(tensor, *args, **options):
        if RANK:
            raise MemoryError("no memory for the gradient")
        backward(tensor, *args, **options)

    torch.Tensor.backward = out_of_memory
    told("a gradient")
    fit()


def main_without_model(folder: Path) -> None:
    lm = lmppl.LM.from_pretrained(folder / ("here" if RANK == 0 else "elsewhere"))
    fit(lm=lm)


if __name__ == "__main__":
    what, path = sys.argv[1], Path(sys.argv[2])
    if what == "all":
        main(path)
    elif what == "gradient":
        leave()
    else:
        main_without_model(path)
