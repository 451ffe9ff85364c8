"""The whole transition matrix of a Markov kernel, by enumeration of its own random choices.

The moves are run as they are. Their tokens, coins, sites and cuts are taken from ``choices.Choices``; a
proposal is accepted with the probability that its ratio says. With ``table_in_float64`` the language
model's answers are exact to 1e-16, so that what is wrong with a kernel cannot hide behind rounding.
"""

from __future__ import annotations

import math
from contextvars import ContextVar

import choices
import numpy as np
import torch
from choices import Choices, Coin
from tables import TableRows, remember_model_calls

import lmppl.runtime
from lmppl import LM, distributions
from lmppl.engines import moves
from lmppl.engines.moves import ChainState
from lmppl.guides.laws import laws_of
from lmppl.lm.batches.requests import Drawn, Scored
from lmppl.runtime import DrawWait, Given, Particle, latents_of
from lmppl.runtime.records import Record, record_of_trace, rescore
from lmppl.testing import trace_values


def key_of(particle):
    """A trace by its latents."""
    return tuple(trace_values(particle.trace).items())


class Table:
    """Next-token laws of a language model, computed once, in float64."""

    def __init__(self):
        self._known = {}

    def log_probs(self, lm, ids, temperature):
        key = lm, ids
        if key not in self._known:
            rows = TableRows(lm.runner, [ids], {})
            self._known[key] = rows.logits[0].double()
        return torch.log_softmax(self._known[key] / temperature, -1)


def table_in_float64(patch, choices, dtype=torch.float64):
    """Let language models draw by ``choices`` and score by a table, in float64 (or less)."""
    table = Table()

    def draw(self, draws):
        return [_draw(self, request, table, choices, dtype) for request in draws]

    def score(self, scores, *, grad=False):
        return [_score(self, request, table, dtype) for request in scores]

    patch.setattr(LM, "draw", draw)
    patch.setattr(LM, "score", score)


def _draw(lm, request, table, choices, dtype):
    """One sequence, as ``lmppl.lm.batches.decoding`` draws it."""
    state = request.stopping.start()
    for token in request.begun:
        assert state.push(token) is None
    is_constrained = request.stopping.constraint is not None
    ids, log_probs, log_masses = [], [], []
    while state.reason is None and state.is_alive:
        law = table.log_probs(lm, (*request.prefix, *request.begun, *ids), request.temperature)
        mask = state.mask(steered=request.steered) if is_constrained else law > -math.inf
        mass = torch.logsumexp(law.masked_fill(~mask, -math.inf), 0)
        if mass == -math.inf:
            break
        token = choices.pick((law - mass).exp().masked_fill(~mask, 0.0).tolist())
        ids.append(token)
        log_probs.append(law[token])
        log_masses.append(mass)
        state.push(token)
    matches = state.reason is not None and state.is_alive
    terms, masses = (torch.tensor(numbers, dtype=dtype) for numbers in (log_probs, log_masses))
    masses = masses if is_constrained else None
    return Drawn(tuple(ids), terms, state.reason, matches, masses)


def _score(lm, request, table, dtype):
    """The terms of one sequence, as ``lmppl.lm.batches.scoring`` finds them."""
    whole, first = request.prefix + request.continuation, len(request.prefix)
    laws = torch.stack(
        [table.log_probs(lm, whole[:n], request.temperature) for n in range(first, len(whole))]
    )
    if request.allowed is not None:
        stopping, steered = request.allowed.stopping, request.allowed.steered
        masks = stopping.masks(request.continuation, steered=steered)
        laws = torch.log_softmax(laws.masked_fill(~masks, -math.inf), -1)
    terms = laws.gather(1, torch.tensor(request.continuation)[:, None])[:, 0]
    return Scored(terms.to(dtype))


class Kernel:
    """Moves of one program, to be enumerated.

    Args:
        patch: pytest's monkeypatch.
        barrier: of how many texts the traces are drawn, at a barrier of SMC; None: they are complete.
        table: whether language models answer by a table in ``dtype``; else they are asked (once).
        options: those of ``moves.plan_move``, and ``guide`` and ``temperature`` of its laws.
    """

    def __init__(self, patch, program, args, lm, *, guide=None, temperature=1.0, dtype=torch.float64,
                 kernels=None, turn=0, table=True, barrier=None, **options):  # fmt: skip
        self.choices = Choices()
        self.program, self.args, self.lm = program, args, lm
        self.barrier = barrier
        options |= {"at_barrier": barrier is not None}
        self.options = {"kernels": kernels or {}, "turn": turn, **options}
        patch.setattr(lmppl.primitives, "_default_lm", ContextVar("lm of a kernel", default=lm))
        self.laws = laws_of(guide, args, temperature)
        if table:
            table_in_float64(patch, self.choices, dtype)
        else:
            remember_model_calls(patch)
            choices.route(patch, self.choices)
        patch.setattr(moves, "pick", lambda rng, num: self.choices.pick([1 / num] * num))
        if table:
            patch.setattr(distributions, "inverse_cdf", self._inverse_cdf)
        patch.setattr(Coin, "choices", self.choices, raising=False)

    def _inverse_cdf(self, weights, uniforms):
        return torch.tensor([self.choices.pick((weights / weights.sum()).tolist())])

    def states(self):
        """All traces of positive probability, up to the barrier if there is one."""
        exact = lmppl.infer(self.program, *self.args, lm=self.lm, method="exact")
        states = {}
        for trace in exact.traces:
            state = self.state(trace) if self.barrier is None else self.state_at_barrier(trace)
            if state is not None and state.log_joint > -math.inf:
                states.setdefault(key_of(state.particle), state)
        return list(states.values())

    def state_of(self, values):
        """The chain state at the values of the latents, by site."""
        run = rescore(Record(values), self.program, self.args, complete=True)
        lmppl.runtime.run_to_end([run])
        return ChainState(run, self.laws)

    def state(self, trace):
        """The chain state at the values of a trace."""
        run = rescore(record_of_trace(trace), self.program, self.args, complete=True)
        lmppl.runtime.run_to_end([run])
        return ChainState(run, self.laws)

    def state_at_barrier(self, trace):
        """The same, as SMC has it: it waits at the first text that is not closed yet; None: it ends."""
        given, texts = {}, 0
        for name, node in latents_of(trace).items():
            texts += isinstance(node["fn"], lmppl.LMText)
            if texts > self.barrier:
                break
            given[name] = Given(node["value"])
        run = Particle(self.program, self.args, seed=0, given=given)
        run.resume()
        lmppl.runtime.run_to_draws([run])
        if run.finished:
            return None
        assert isinstance(run.waiting, DrawWait)
        return ChainState(run, self.laws)

    def row(self, state):
        """The probabilities of the traces that one move from a state comes to, by ``key_of``."""
        row, total = {}, 0.0
        while True:
            self.choices.restart()
            fresh = ChainState(state.particle, self.laws, dict(state.site_laws))
            rng = np.random.default_rng(0)
            plan = moves.plan_move(fresh, rng=rng, **self.options)
            (proposed,) = moves.propose([fresh], [plan], [0])
            accept = min(1.0, math.exp(min(0.0, proposed.log_ratio)))
            p = self.choices.probability
            for key, probability in (
                (key_of(proposed.state.particle), p * accept),
                (key_of(state.particle), p * (1 - accept)),
            ):
                if probability:
                    row[key] = row.get(key, 0.0) + probability
            total += p
            if not self.choices.advance():
                break
        assert abs(total - 1) < 1e-9
        return row

    def matrix(self):
        """The states' probabilities in proportion to R, and the matrix P."""
        states = self.states()
        index = {key_of(state.particle): i for i, state in enumerate(states)}
        P = np.zeros((len(states), len(states)))
        for i, state in enumerate(states):
            for key, probability in self.row(state).items():
                P[i, index[key]] += probability
        log_r = np.array([state.log_joint for state in states])
        pi = np.exp(log_r - log_r.max())
        return pi / pi.sum(), P

    def error(self):
        """The largest entry of pi P - pi, and the share of moves that leave their trace."""
        pi, P = self.matrix()
        return np.abs(pi @ P - pi).max(), float(pi @ (1 - np.diag(P)))
