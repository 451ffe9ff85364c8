"""What the scripts with genlm-control share: the model, and one run for each line of standard input.

genlm-control is used at its best: the prompt's keys and values are cached by ``cache_kv``, which makes
it more than twice as fast; a batch is as large as the number of particles, and is not waited for
longer than a millisecond. Its other caches are emptied between runs, as a new run would find them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from importlib import metadata
from typing import Any

import torch
from genlm.control import PromptedLLM

from benchmarks.measuring import synchronize, with_peak

PACKAGES = ("genlm-control", "genlm-backend", "torch", "transformers")


def load(options: argparse.Namespace) -> PromptedLLM:
    return PromptedLLM.from_name(
        options.model,
        backend="hf",
        eos_byte_strings=[eos.encode() for eos in options.eos] or None,
        timeout=0.001,
        hf_opts={"dtype": getattr(torch, options.dtype), "device_map": options.device},
    )


def begin(llm: PromptedLLM, request: dict[str, Any]) -> None:
    """Make it ready for a run of so many ``particles`` after a ``prompt`` of token ids."""
    llm.model.batch_size = request["particles"]
    llm.model.clear_cache()
    llm.prompt_ids = request["prompt"]
    llm.model.cache_kv(request["prompt"])


def serve(
    description: str, run: Callable[[PromptedLLM, dict[str, Any]], Awaitable[dict[str, Any]]]
) -> None:
    """Answer each request with what ``run`` finds, its ``seconds``, and its ``peak_bytes`` if the
    request asks for ``peak``; or with what it raised, as ``error``. The first line says which versions
    are there."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--eos", nargs="*", default=[])
    options = parser.parse_args()
    # Whatever prints to standard output must not disturb the conversation.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if options.threads:
        torch.set_num_threads(options.threads)
    llm, device = load(options), torch.device(options.device)
    answers.write(json.dumps({package: metadata.version(package) for package in PACKAGES}) + "\n")
    loop = asyncio.new_event_loop()
    for line in sys.stdin:
        request = json.loads(line)
        torch.manual_seed(request["seed"])

        def work(request: dict[str, Any] = request) -> dict[str, Any]:
            return loop.run_until_complete(run(llm, request))

        peak = None
        synchronize(device)
        began = time.perf_counter()
        try:
            if request["peak"]:
                found, peak = with_peak(work, device)
            else:
                found = work()
        except Exception as error:
            answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
            continue
        synchronize(device)
        seconds = time.perf_counter() - began
        answers.write(json.dumps({**found, "seconds": seconds, "peak_bytes": peak}) + "\n")
    loop.close()
