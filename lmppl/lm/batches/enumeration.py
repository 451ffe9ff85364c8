"""All sequences of a site with their probabilities, for small vocabularies and lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from lmppl.lm.batches.requests import no_distribution
from lmppl.lm.batches.rows import Rows
from lmppl.lm.meter.work import timed
from lmppl.lm.network.runner import Runner
from lmppl.lm.tokens.stopping import Stopping, StoppingState


@timed("read")
def enumerate_sequences(
    runner: Runner, prefix: tuple[int, ...], stopping: Stopping, temperature: float, *, limit: int
) -> list[tuple[tuple[int, ...], Tensor]] | None:
    """Every closed sequence of positive probability with its log-density (0-d float32, nats), found
    breadth first, a pass a token; None if there are more than ``limit``.

    Raises:
        ValueError: the context is too short, or the logits define no distribution.
    """
    runner.check_request(len(prefix), stopping.max_tokens or 0, "")
    complete: list[tuple[tuple[int, ...], Tensor]] = []
    level: list[tuple[tuple[int, ...], Tensor, StoppingState]] = [
        ((), torch.zeros(()), stopping.start())
    ]
    while level:
        rows = Rows.start(runner, [prefix + ids for ids, _, _ in level], 1)
        log_probs = torch.log_softmax(rows.logits.float() / temperature, -1).cpu()  # (B, V)
        for (ids, _, _), row in zip(level, log_probs, strict=True):
            if bool(row.isnan().any()):
                raise no_distribution(f"the model's logits after {runner.decode(ids)!r}")
        following = []
        for (ids, log_prob, state), row in zip(level, log_probs, strict=True):
            for token in torch.nonzero(row > -torch.inf).flatten().tolist():
                after = state.copy()
                longer, total = (*ids, token), log_prob + row[token]
                if after.push(token) is not None:
                    complete.append((longer, total))
                else:
                    following.append((longer, total, after))
                if len(complete) + len(following) > limit:
                    return None
        level = following
    return complete
