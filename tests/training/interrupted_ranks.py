"""A training in several processes, one of which dies, for ``test_ranks.py``.

    torchrun --nproc-per-node 2 --max-restarts 1 tests/training/interrupted_ranks.py FOLDER 5

The last rank kills itself after that step, once. The run goes on with what is in FOLDER.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path

import lmppl
from lmppl.testing import tiny_lm
from lmppl.testing.programs import CASES

INPUTS = [("ab.", "aba"), ("b", "aba"), ("a", "bab"), ("ab", "ba"), ("ba", "ab")]


def main(folder: Path, kill_at: int) -> None:
    rank, num = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))
    )
    marker = folder / "killed"

    def callback(figures):
        if figures["step"] == kill_at and rank == num - 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    guide = lmppl.LMGuide(CASES["one site"].program, lm=tiny_lm("ab.", seed=0))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        guide.fit(
            INPUTS, steps=9, batch_size=24, inputs_per_step=3, seed=0, progress=False,
            callback=callback, checkpoint=folder / "run", checkpoint_every=2, resume=True,
        )  # fmt: skip
    found = {
        "parameters": [p.detach().reshape(-1).tolist() for p in guide.parameters()],
        "losses": guide.history.column("loss"),
        "warnings": [str(one.message) for one in told if "processes" in str(one.message)],
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
