from __future__ import annotations

import subprocess
import sys

LATE = [
    "peft", "rich", "gguf", "accelerate", "matplotlib", "rapidfuzz", "ray", "pyarrow",
    "transformers.modeling_outputs", "transformers.modeling_utils",
]  # fmt: skip


def test_what_is_heavy_is_imported_when_it_is_used():
    code = f"import sys, lmppl; print([name for name in {LATE} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
