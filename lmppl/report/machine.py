"""Which machine a result is from, in words."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def machine(device: torch.device) -> str:
    """The processor, and the accelerator if ``device`` is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    words = f"{_processor()}, {cores} cores{_features()}, {platform.system()}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}; {words}"
    return words


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _features() -> str:
    """What decides how fast bfloat16 is."""
    checks = {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}
    found = [name for name, check in checks.items() if getattr(torch.cpu, check, bool)()]
    return f" with {' and '.join(found)}" if found else ""
