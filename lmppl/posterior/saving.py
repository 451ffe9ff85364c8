"""Posteriors on disk, in the format of ``lmppl.states``: JSON and tensors, no pickle.

posterior.json, posterior.safetensors
    log_weights, trace   of each sample, and which of the different traces it has
    columns              the traces: values and log-probabilities, by site
    returns, info        what is plain of them
    vocabularies         the fingerprints of the tokenizers that the texts are of
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pyro.poutine import Trace

from lmppl.distributions import check_lm
from lmppl.lm import LM
from lmppl.lm.tokens.vocabulary import Vocabulary
from lmppl.posterior.columns import columns_of, traces_of
from lmppl.posterior.plain import Vocabularies, is_plain, read, write
from lmppl.states import check_unused, present, read_state, replace_folder, write_state

FORMAT = 1
_KIND = "posterior"


@dataclass(frozen=True)
class Samples:
    """What is saved of a posterior: its arguments."""

    traces: Sequence[Trace]
    log_weights: torch.Tensor
    returns: Sequence[Any]
    info: Mapping[str, Any]
    claims_evidence: bool


@dataclass(frozen=True)
class Loaded:
    """What was saved: ``distinct``, the different traces, ``trace``, which of them each sample has, and
    ``columns``, what they were made of."""

    samples: Samples
    distinct: list[Trace]
    trace: list[int]
    columns: Mapping[str, Any]


def save_samples(path: str | Path, samples: Samples, *, overwrite: bool) -> None:
    """Write a posterior; see ``Posterior.save``."""
    path = Path(path)
    check_unused(path, overwrite=overwrite)
    vocabularies = Vocabularies()
    numbers: dict[int, int] = {}
    trace = [numbers.setdefault(id(trace), len(numbers)) for trace in samples.traces]
    first = {number: i for i, number in reversed(list(enumerate(trace)))}
    distinct = [samples.traces[first[number]] for number in range(len(numbers))]
    info = {key: write(value, vocabularies) for key, value in _plain(samples.info).items()}
    state = {
        "log_weights": samples.log_weights,
        "trace": torch.tensor(trace),
        "columns": columns_of(distinct, vocabularies),
        "returns": [write(value, vocabularies) for value in samples.returns],
        "info": list(info.items()),
        "claims_evidence": samples.claims_evidence,
    }
    state["vocabularies"] = [vocabulary.fingerprint for vocabulary in vocabularies.found]
    replace_folder(path, _KIND, lambda folder: write_state(folder, _KIND, FORMAT, state))


def _plain(info: Mapping[str, Any]) -> dict[str, Any]:
    """What can be saved of ``info``, with a note of what cannot."""
    plain = {key: dict(v) if isinstance(v, dict) else v for key, v in info.items()}  # of a Counter
    if "islands" in plain:
        plain["islands"] = [_plain(island) for island in plain["islands"]]
    lost = [key for key, value in plain.items() if not is_plain(value)]
    kept = {key: value for key, value in plain.items() if key not in lost}
    if lost:
        note = f"info had entries that are not saved: {', '.join(sorted(lost))}"
        kept["notes"] = [*kept.get("notes", ()), note]
    return kept


def load_samples(path: str | Path, lms: Sequence[LM]) -> Loaded:
    """Read a posterior; its texts have tokens where ``lms`` has the language model of their tokenizer.
    See ``Posterior.load``."""
    folder = present(Path(path))
    if not folder.exists():
        raise FileNotFoundError(f"there is no posterior at {path}")
    state = read_state(folder, _KIND, FORMAT, ": save it anew")
    vocabularies = _vocabularies(folder, state["vocabularies"], lms)
    distinct, trace = traces_of(state["columns"], vocabularies), state["trace"].tolist()
    info = {key: read(value, vocabularies) for key, value in state["info"]}
    returns = [read(value, vocabularies) for value in state["returns"]]
    traces = [distinct[number] for number in trace]
    samples = Samples(traces, state["log_weights"], returns, info, state["claims_evidence"])
    return Loaded(samples, distinct, trace, state["columns"])


def _vocabularies(
    folder: Path, fingerprints: Sequence[str], lms: Sequence[LM]
) -> list[Vocabulary | None]:
    """For each fingerprint the vocabulary that has it, None if there are no language models."""
    known = {check_lm("Posterior.load", lm).vocabulary.fingerprint: lm.vocabulary for lm in lms}
    if known:
        for fingerprint in [f for f in fingerprints if f not in known]:
            given = ", ".join(f"{lm.name} ({lm.vocabulary.fingerprint[:8]})" for lm in lms)
            raise ValueError(
                f"texts of the posterior {folder} are of another tokenizer ({fingerprint[:8]}) than "
                f"lm={given}: give the language model that it was made with (several: a list), or "
                "leave out lm=, for plain strings"
            )
    return [known.get(fingerprint) for fingerprint in fingerprints]
