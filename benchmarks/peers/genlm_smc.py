"""SMC by genlm-control, one run for each line of standard input. Runs in its own environment.

    .venv-peers/genlm-control/bin/python -m benchmarks.peers.genlm_smc --model FOLDER

(``benchmarks/smc.py`` starts it.) genlm-control is used at its best for this: the prompt's keys and
values are cached by ``cache_kv``, which makes it more than twice as fast; a batch is as large as the
number of particles, and is not waited for longer than a millisecond. Its other caches are emptied
between runs, as a new run would find them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from importlib import metadata
from typing import Any

import torch
from genlm.control import SMC, Potential, PromptedLLM, direct_token_sampler

from benchmarks.measuring import synchronize, with_peak


class CountOf(Potential):
    """exp(strength * occurrences of a byte), of a text so far: a cheap critic."""

    def __init__(self, vocabulary: list[Any], byte: str, strength: float) -> None:
        super().__init__(vocabulary)
        self._byte, self._strength = byte.encode(), strength

    async def prefix(self, context: list[Any]) -> float:
        return self._strength * b"".join(map(bytes, context)).count(self._byte)

    async def complete(self, context: list[Any]) -> float:
        return await self.prefix(context)


def load(options: argparse.Namespace) -> PromptedLLM:
    return PromptedLLM.from_name(
        options.model,
        backend="hf",
        eos_byte_strings=[eos.encode() for eos in options.eos] or None,
        timeout=0.001,
        hf_opts={"torch_dtype": getattr(torch, options.dtype), "device_map": options.device},
    )


async def smc(llm: PromptedLLM, request: dict[str, Any]) -> int:
    """One run. Returns the number of tokens of all particles, their EOS included."""
    llm.model.batch_size = request["particles"]
    llm.model.clear_cache()
    llm.prompt_ids = request["prompt"]
    llm.model.cache_kv(request["prompt"])
    critic = CountOf(llm.vocab, **request["critic"]) if request.get("critic") else None
    sampler = SMC(direct_token_sampler(llm), critic)
    sequences = await sampler(
        n_particles=request["particles"], ess_threshold=0.5, max_tokens=request["max_tokens"]
    )
    return sum(len(context) for context in sequences.contexts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
    packages = ("genlm-control", "genlm-backend", "torch", "transformers")
    hello = {package: metadata.version(package) for package in packages}
    answers.write(json.dumps(hello) + "\n")
    loop = asyncio.new_event_loop()
    for line in sys.stdin:
        request = json.loads(line)
        torch.manual_seed(request["seed"])

        def run(request: dict[str, Any] = request) -> int:
            return loop.run_until_complete(smc(llm, request))

        peak = None
        synchronize(device)
        began = time.perf_counter()
        if request["peak"]:
            tokens, peak = with_peak(run, device)
        else:
            tokens = run()
        synchronize(device)
        seconds = time.perf_counter() - began
        answers.write(json.dumps({"seconds": seconds, "tokens": tokens, "peak_bytes": peak}) + "\n")
    loop.close()


if __name__ == "__main__":
    main()
