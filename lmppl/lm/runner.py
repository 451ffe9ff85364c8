"""The forward passes of one language model: with shared prefixes, or plain.

A runner works on clones of the model that share its parameters, so the user's object keeps its
attention implementation, its output layer and its training flags. Whether the fast path is right
for a model is decided by a probe that compares it with the plain one, never by the model's name.
"""

from __future__ import annotations

import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from peft import PeftModel

from lmppl.lm.adapter import clone
from lmppl.lm.attention import ATTENTION, LayerKV, PrefixCache
from lmppl.lm.roofline import Matrices
from lmppl.lm.work import count_pass

if TYPE_CHECKING:
    from lmppl.lm.model import LM

Tokens = tuple[int, ...]
P = ParamSpec("P")
R = TypeVar("R")


def without_grad(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function in ``no_grad``, and outside the caller's inference mode and autocast.

    Not in inference mode: its tensors could not be used in a later backward pass, and caches
    outlive the call. Not under autocast: log-probabilities must not depend on who asks.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            for kind in ("cpu", "cuda", "mps"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return wrapped


class Head(torch.nn.Module):
    """An output layer that projects only the positions asked for.

    They go through it as a contiguous matrix: with three dimensions, and weights that need no
    gradient, ``linear`` may copy the weights once a row.
    """

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.positions: torch.Tensor | None = None  # of the flattened (B * T), None for all
        self.hidden: torch.Tensor | None = None  # what went into the layer last

    @property
    def weight(self) -> Any:
        return self.layer.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, hidden) to (N, V)."""
        hidden = hidden.reshape(-1, hidden.shape[-1])
        if self.positions is not None:
            hidden = hidden.index_select(0, self.positions)
        hidden = hidden.contiguous()
        self.hidden = hidden.detach()
        return self.layer(hidden)


@dataclass(frozen=True, eq=False)
class Prompt:
    """Keys and values of a prefix: per layer (H_kv, P, D)."""

    tokens: Tokens
    layers: Sequence[LayerKV]

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer)

    def head(self, length: int) -> Prompt:
        """The first ``length`` tokens."""
        if length == len(self.tokens):
            return self
        if length == 0:
            return NO_PROMPT
        return Prompt(
            self.tokens[:length], [(k[:, :length], v[:, :length]) for k, v in self.layers]
        )


NO_PROMPT = Prompt((), ())


class Runner:
    """Runs one model.

    Args:
        model: a causal LM of transformers, or a ``PeftModel`` on one.
        max_prompt_bytes: bound on the memory of remembered prompts.

    Attributes:
        fast: whether prefixes can be shared (found by a probe on first use).
        slow_reason: why not.
        size: width of the logits.
    """

    def __init__(self, model: Any, *, max_prompt_bytes: int = 256 << 20) -> None:
        if isinstance(model, PeftModel):
            if any(c.is_prompt_learning for c in model.peft_config.values()):
                raise ValueError(
                    "prompt-learning adapters (prefix or prompt tuning) are not supported: their "
                    "virtual tokens would be lost; use LoRA or another adapter of the weights"
                )
            model = model.get_base_model()
        self._model = clone(model).eval()
        output = self._model.get_output_embeddings()
        if output is None:
            raise TypeError(f"{type(model).__name__} has no output layer: it is no causal LM")
        self._head = Head(output)
        self._model.set_output_embeddings(self._head)
        self._fast_model: Any = None
        self._parameters = tuple(self._model.parameters())
        self._prompts: OrderedDict[Tokens, Prompt] = OrderedDict()
        self._prompt_bytes = 0
        self._max_prompt_bytes = max_prompt_bytes
        self._versions: tuple[int, ...] = ()
        self.slow_reason: str | None = None
        self.computed_tokens = 0  # positions that went through the model, padding included

    @property
    def device(self) -> torch.device:
        return self._model.get_input_embeddings().weight.device

    @property
    def size(self) -> int:
        return int(self._head.weight.shape[0])

    @property
    def num_layers(self) -> int:
        return int(_text_config(self._model).num_hidden_layers)

    @property
    def num_heads(self) -> int:
        return int(_text_config(self._model).num_attention_heads)

    @property
    def trains(self) -> bool:
        """Whether any of its parameters needs a gradient."""
        return any(p.requires_grad for p in self._parameters)

    @functools.cached_property
    def matrices(self) -> Matrices:
        """What a forward pass multiplies by."""
        return Matrices(self._model, self._head)

    @functools.cached_property
    def fast(self) -> bool:
        self.slow_reason = self._probe()
        if self.slow_reason is not None:
            warnings.warn(
                f"{type(self._model).__name__} runs on the slow path, which computes every prefix "
                f"anew at every token: {self.slow_reason}",
                stacklevel=2,
            )
        return self.slow_reason is None

    # Forward passes

    def run_plain(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits (N, V) at ``positions`` of the flattened right-padded ``tokens`` (B, T).

        The model as it is: its own attention, no cache. Differentiable.
        """
        self.computed_tokens += tokens.numel()
        count_pass(self, tokens, positions)
        with self._asking_for(positions):
            return self._model(input_ids=tokens, use_cache=False, return_dict=True).logits

    def run_cached(
        self, tokens: torch.Tensor, cache: PrefixCache, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits (N, V) at ``positions`` of the flattened ``tokens`` (B, T) that continue
        ``cache``; at all of them if None. The cache then holds the tokens' keys and values."""
        self.computed_tokens += tokens.numel()
        count_pass(self, tokens, positions)
        with self._asking_for(positions):
            return self._fast_model(
                input_ids=tokens,
                position_ids=cache.positions(tokens.shape[1], tokens.device).expand(
                    tokens.shape[0], -1
                ),
                past_key_values=cache,
                use_cache=True,
                return_dict=True,
                lmppl_cache=cache,
            ).logits

    @property
    def hidden(self) -> torch.Tensor:
        """(N, hidden): what the last forward pass fed to the output layer."""
        assert self._head.hidden is not None
        return self._head.hidden

    @contextmanager
    def _asking_for(self, positions: torch.Tensor | None) -> Iterator[None]:
        self._head.positions = positions
        try:
            yield
        finally:
            self._head.positions = None

    # Prompts

    def shared_prompt(self, sequences: Sequence[Tokens], limit: int | None = None) -> Prompt:
        """The keys and values of what the sequences have in common.

        At least the last token of each sequence is left over, so that a forward pass of what
        remains has the next token's logits.

        Args:
            sequences: non-empty.
            limit: the most tokens it may have.
        """
        shortest = min(len(s) for s in sequences) - 1
        limit = shortest if limit is None else min(limit, shortest)
        low, high = min(sequences), max(sequences)
        common = common_length(low, high, limit)
        known = max((common_length(t, low, common) for t in self._remembered()), default=0)
        if (common - known) * len(sequences) <= 16:
            common = known  # a few tokens in each row cost less than a pass for them alone
        return self.prompt(low[:common])

    @without_grad
    def prompt(self, tokens: Tokens) -> Prompt:
        """The keys and values of ``tokens``, computed as far as they aren't remembered."""
        if not tokens:
            return NO_PROMPT
        remembered = self._remembered()
        best = max(remembered.values(), key=lambda p: common_length(p.tokens, tokens), default=None)
        base = NO_PROMPT if best is None else best.head(common_length(best.tokens, tokens))
        if best is not None and base.tokens:
            remembered.move_to_end(best.tokens)
        if base.tokens == tokens:
            return base
        prompt = self.extend_prompt(base, tokens)
        if self._remembers:
            self._remember(prompt)
        return prompt

    def extend_prompt(self, base: Prompt, tokens: Tokens) -> Prompt:
        """The keys and values of ``tokens``, which begin with those of ``base``. Differentiable."""
        known = len(base.tokens)
        cache = PrefixCache(base.layers, known)
        new = torch.tensor([tokens[known:]], device=self.device)
        self.run_cached(new, cache, torch.zeros(1, dtype=torch.long, device=self.device))
        layers: list[LayerKV] = [(k[0], v[0]) for k, v in cache.suffix]
        if known:
            layers = [
                (torch.cat([k0, k], 1), torch.cat([v0, v], 1))
                for (k0, v0), (k, v) in zip(base.layers, layers, strict=True)
            ]
        return Prompt(tokens, layers)

    @property
    def _remembers(self) -> bool:
        # An optimiser can change trainable weights at any time, and nothing need tell us.
        return not self.trains

    def _remembered(self) -> OrderedDict[Tokens, Prompt]:
        """Prompts by their tokens, all of them, from the least to the most recently used."""
        versions = tuple(p._version for p in self._parameters if not p.is_inference())
        if not self._remembers or versions != self._versions:
            self.forget()
            self._versions = versions
        return self._prompts

    def forget(self) -> None:
        """Drop the remembered prompts."""
        self._prompts.clear()
        self._prompt_bytes = 0

    def _remember(self, prompt: Prompt) -> None:
        if prompt.num_bytes > self._max_prompt_bytes:
            return
        self._prompts[prompt.tokens] = prompt
        self._prompt_bytes += prompt.num_bytes
        while self._prompt_bytes > self._max_prompt_bytes or len(self._prompts) > 32:
            self._prompt_bytes -= self._prompts.popitem(last=False)[1].num_bytes

    # The probe

    @without_grad
    def _probe(self) -> str | None:
        """Try the shared-prefix path. Returns what is wrong with it, or None."""
        config = _text_config(self._model)
        unknown = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
        if unknown:
            return f"it has layers of type {', '.join(sorted(unknown))}"
        try:
            self._fast_model = clone(self._model)
            self._fast_model.config._attn_implementation = ATTENTION
            # One output layer serves both, so that asking it for positions reaches both.
            self._fast_model.set_output_embeddings(self._head)
            return self._compare(config)
        except Exception as error:  # whatever the model's code raises: it isn't supported
            return f"its attention can't be reached ({type(error).__name__}: {error})"

    def _compare(self, config: Any) -> str | None:
        device = self.device
        prompt = self.extend_prompt(NO_PROMPT, tuple(i % self.size for i in (1, 2, 0)))
        ids = torch.tensor([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]], device=device) % self.size
        cache = PrefixCache(prompt.layers, 3)
        got = self.run_cached(ids, cache).float()
        start = torch.tensor([prompt.tokens, prompt.tokens], device=device)
        full = torch.cat([start, ids], 1)
        at = torch.tensor([3, 4, 5, 6, 7, 11, 12, 13, 14, 15], device=device)
        want = self.run_plain(full, at).float()
        num_layers = self.num_layers
        if cache.calls != num_layers:
            return f"{cache.calls} of its {num_layers} layers have an attention that can be shared"
        # Windows are longer than a probe: that they are handed over must do.
        window = getattr(config, "sliding_window", None)
        types = getattr(config, "layer_types", None)
        sliding = (
            [t == "sliding_attention" for t in types] if types else [bool(window)] * num_layers
        )
        if [w is not None for w in cache.windows] != sliding[:num_layers]:
            return "its attention layers don't say which of them have a sliding window"
        exact = prompt.layers[0][0].dtype in (torch.float32, torch.float64)
        tolerance = (1e-3 if exact else 0.1) * want.std() + 1e-6
        valid = bool(torch.isfinite(want).all())  # else whoever runs the model reports it
        if valid and not bool((got - want).abs().mean() <= tolerance):
            return "its logits are not those of the plain model"
        return None


_LAYER_TYPES = {"full_attention", "sliding_attention"}


def _text_config(model: Any) -> Any:
    """The configuration of the part that writes text (some models have several parts)."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def common_length(a: Tokens, b: Tokens, limit: int | None = None) -> int:
    """Length of the common prefix, at most ``limit``."""
    most = min(len(a), len(b)) if limit is None else min(len(a), len(b), limit)
    if a[:most] == b[:most]:
        return most
    return next(n for n in range(most) if a[n] != b[n])


def padded(sequences: Sequence[Tokens], device: torch.device) -> torch.Tensor:
    """(B, T), padded on the right with token 0."""
    longest = max(map(len, sequences))
    rows = [list(s) + [0] * (longest - len(s)) for s in sequences]
    return torch.tensor(rows, device=device)


def runner_of(lm: LM) -> Runner:
    """The runner of a language model, made on first use."""
    runner = getattr(lm, "_engine", None)
    if runner is None:
        runner = lm._engine = Runner(lm.model)
    return runner
