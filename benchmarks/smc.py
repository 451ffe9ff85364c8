"""Sequential Monte Carlo, against genlm-control in its own environment.

    make bench-peers && python -m benchmarks --only smc

Particles of at most 16 tokens each, drawn from the model after the same prompt, resampled when the
effective sample size falls below a half. Some particles end early by EOS on either side, so tokens
a second are compared. In the "steered" cases a twist (there: a critic) looks at every particle
after every token, so that resampling happens. Expect 6 times genlm-control's speed at 32 particles,
10 at 128.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import lmppl
from benchmarks.bench import Bench
from benchmarks.measuring import ratios
from benchmarks.peers.process import PeerContender, PeerProcess
from benchmarks.results import Goal, Row, Skipped
from lmppl import lm_sample

GOALS = {32: 6.0, 128: 10.0}
CRITIC: dict[str, Any] = {"byte": "e", "strength": 0.5}


def run(bench: Bench) -> list[Row]:
    if not bench.genlm_python.exists():
        raise Skipped("genlm-control is not installed: `make bench-peers` does it")
    if bench.source is None:
        raise Skipped("the model was made in memory, where another process can't load it")
    command = [
        str(bench.genlm_python), "-m", "benchmarks.peers.genlm_smc",
        "--model", bench.source,
        "--dtype", str(bench.lm.dtype).removeprefix("torch."),
        "--device", bench.device.type,
        "--threads", str(torch.get_num_threads()),
        "--eos", *eos_strings(bench),
    ]  # fmt: skip
    with PeerProcess(command) as peer:
        return [
            compare(bench, peer, particles, steered=steered)
            for steered in bench.choose(smoke=[False, True], quick=[False], full=[False, True])
            for particles in bench.choose_particles(smoke=[3], quick=[32], full=[32, 128])
        ]


def compare(bench: Bench, peer: PeerProcess, particles: int, *, steered: bool) -> Row:
    """A row of ``particles`` particles."""
    prompt = bench.choose(smoke=8, quick=64, full=64)
    length = bench.choose(smoke=4, quick=16, full=16)

    def request(number: int) -> dict[str, Any]:
        return {
            "prompt": bench.lm.encode(bench.text(prompt, number)),
            "particles": particles,
            "max_tokens": length,
            "critic": CRITIC if steered else None,
            "seed": number,
        }

    sides = bench.in_turns(
        {
            "lmppl": ours(bench, particles, prompt, length, steered=steered),
            "genlm-control": PeerContender(peer, request),
        }
    )
    versions = ", ".join(f"{name} {version}" for name, version in peer.hello.items())
    drawn = [sum(side.tokens) / len(side.tokens) for side in sides]
    return Row.of(
        f"{particles} particles x {length} tokens, prompt of {prompt}{', steered' * steered}",
        sides,
        ratios(sides[1], sides[0]),
        unit="x",
        goal=Goal(GOALS[particles]) if particles in GOALS and not steered else None,
        figures={"tokens": drawn[0], "peer_tokens": drawn[1]},
        note=f"tokens drawn: {drawn[0]:.0f} and {drawn[1]:.0f} a run ({versions})",
    )


def ours(
    bench: Bench, particles: int, prompt: int, length: int, *, steered: bool
) -> Callable[[int], int]:
    """lmppl's side: a program of one site."""

    def program(x: str) -> lmppl.Text:
        return lm_sample("z", x, max_tokens=length)

    def twist(text: lmppl.Text) -> float:
        return CRITIC["strength"] * text.count(CRITIC["byte"])

    method = lmppl.SMC(ess_threshold=0.5, twist=twist if steered else None)

    def work(number: int) -> int:
        posterior = lmppl.infer(
            program,
            bench.text(prompt, number),
            lm=bench.lm,
            method=method,
            num_samples=particles,
            seed=number,
            progress=False,
        )
        return posterior.info["tokens_sampled"]

    return work


def eos_strings(bench: Bench) -> list[str]:
    """What ends a text for lmppl, as strings, so that it does for the peer."""
    tokens = sorted(bench.lm.vocabulary.eos_ids)
    return bench.lm.tokenizer.convert_ids_to_tokens(tokens)
