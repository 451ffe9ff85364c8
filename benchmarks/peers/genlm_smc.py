"""SMC by genlm-control, one run for each line of standard input. Runs in its own environment.

    .venv-peers/genlm-control/bin/python -m benchmarks.peers.genlm_smc --model FOLDER

(``benchmarks/smc.py`` starts it.)
"""

from __future__ import annotations

from typing import Any

from genlm.control import SMC, Potential, PromptedLLM, direct_token_sampler

from benchmarks.peers.genlm import begin, serve


class CountOf(Potential):
    """exp(strength * occurrences of a byte), of a text so far: a cheap critic."""

    def __init__(self, vocabulary: list[Any], byte: str, strength: float) -> None:
        super().__init__(vocabulary)
        self._byte, self._strength = byte.encode(), strength

    async def prefix(self, context: list[Any]) -> float:
        return self._strength * b"".join(map(bytes, context)).count(self._byte)

    async def complete(self, context: list[Any]) -> float:
        return await self.prefix(context)


async def smc(llm: PromptedLLM, request: dict[str, Any]) -> dict[str, Any]:
    """One run. Returns the number of tokens of all particles, their EOS included."""
    begin(llm, request)
    critic = CountOf(llm.vocab, **request["critic"]) if request.get("critic") else None
    sampler = SMC(direct_token_sampler(llm), critic)
    sequences = await sampler(
        n_particles=request["particles"], ess_threshold=0.5, max_tokens=request["max_tokens"]
    )
    return {"tokens": sum(len(context) for context in sequences.contexts)}


if __name__ == "__main__":
    serve(str(__doc__).splitlines()[0], smc)
