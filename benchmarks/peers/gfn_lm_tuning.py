"""A training step of gfn-lm-tuning (Hu et al., 2024), by its own functions from a checkout of it.

The checkout is https://github.com/GFNOrg/gfn-lm-tuning at commit 8604cff; ``make bench-peers`` makes
it. ``next_sentence/utils.py`` is imported as it is, except that three packages which it imports for
other purposes (data and metrics) are replaced by empty modules while it is read.
"""

from __future__ import annotations

import importlib.util
import sys
import time
import types
import warnings
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model

UTILS = "next_sentence/utils.py"
LEARNING_RATE = 1e-4  # as in its configuration

_UNUSED = {
    "editdistance": (),
    "spacy": (),
    "sentence_transformers": ("SentenceTransformer",),
    "sentence_transformers.util": ("cos_sim",),
}


def load_utils(checkout: Path) -> Any:
    """The module ``next_sentence/utils.py`` of a checkout.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = checkout / UTILS
    if not path.is_file():
        raise FileNotFoundError(path)
    stand_ins = {}
    for name, members in _UNUSED.items():
        stand_ins[name] = types.ModuleType(name)
        for member in members:
            setattr(stand_ins[name], member, None)
    spec = importlib.util.spec_from_file_location("gfn_lm_tuning_utils", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, stand_ins):
        spec.loader.exec_module(module)
    return module


class Steps:
    """Training steps: sentences that continue one prompt, on policy.

    What its ``training_step`` does for samples of the policy at temperature 1, without logging,
    the replay buffer, and the list of tokens that its configuration forbids.

    Args:
        utils: what ``load_utils`` returned.
        model: a causal LM, loaded in the ordinary way; it gets the adapter.
        lora: peft's configuration of the adapter.
        prompt: tokens, (P,).
        stop: the token that ends a sentence.
        batch_size: sentences a step.
        max_tokens: of a sentence, the one that ends it included.

    Attributes:
        split: seconds of the last step: of sampling, of the rewards, of the
            gradient, of the optimiser.
    """

    def __init__(
        self,
        utils: Any,
        model: Any,
        lora: LoraConfig,
        prompt: torch.Tensor,
        stop: int,
        batch_size: int,
        max_tokens: int,
    ) -> None:
        self._utils, self._stop, self._max_tokens = utils, stop, max_tokens
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            self._model = get_peft_model(model, lora)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=LEARNING_RATE)
        self._prompt = prompt
        self._batch_size = batch_size
        self._reward = utils.FrozenModelSentenceGivenPrompt(sentence_token_id=stop, min_len=1)
        self.split: dict[str, float] = {}

    def step(self) -> int:
        """One optimiser step. Returns the number of tokens that it drew."""
        prompt, times = self._prompt, [time.perf_counter()]
        rewarding = 0.0
        score = partial(
            self._reward.score, prompt_length=len(prompt), model=self._model, tokenizer=None
        )

        def reward(state: torch.Tensor) -> Any:
            nonlocal rewarding
            began = time.perf_counter()
            result = score(state)
            rewarding = time.perf_counter() - began
            return result

        text, log_pf, log_pterm, log_r, _ = self._utils.generate_and_return_termination_logprob(
            self._model,
            prompt.unsqueeze(0).expand(self._batch_size, -1),
            reward_fn=reward,
            termination_token_id=self._stop,
            min_len=1,
            max_len=self._max_tokens - 1,
        )
        times.append(time.perf_counter())
        loss = self._utils.modified_subtb_loss(
            log_pf=log_pf,
            log_r=log_r,
            log_pterm=log_pterm,
            generated_text=text,
            termination_token_id=self._stop,
            prompt_len=len(prompt),
        )
        self._optimizer.zero_grad()
        loss.backward()
        times.append(time.perf_counter())
        self._optimizer.step()
        times.append(time.perf_counter())
        sampling, gradient, optimizer = (b - a for a, b in zip(times, times[1:], strict=False))
        self.split = {
            "sampling": sampling - rewarding,
            "rewards": rewarding,
            "gradient": gradient,
            "optimizer": optimizer,
        }
        stopped = (text[:, len(prompt) :] == self._stop).cumsum(1)
        return int((stopped == 0).sum()) + self._batch_size
