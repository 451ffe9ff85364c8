"""The forward passes of one language model: with shared prefixes, or plain.

A runner works on clones of the model that share its parameters, so the user's object keeps its
attention implementation, its output layer and its training flags. Whether the fast path is right
for a model is decided by a probe that compares it with the plain one, never by the model's name.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmppl.lm.meter.roofline import Matrices
from lmppl.lm.meter.work import Usage, count_pass
from lmppl.lm.network.adapter import adapted_modules, is_adapted
from lmppl.lm.network.attention import Group, LayerKV, PrefixCache, Tree, use_attention
from lmppl.lm.network.linear import PackedProduct, can_pack, input_groups, pack, packed_products
from lmppl.lm.network.lora import fuse
from lmppl.lm.network.memory import Memory
from lmppl.lm.network.modules import (
    Checkpointing,
    WeightWatch,
    clone,
    context_length,
    logits_agree,
    plain_logits,
    text_config,
)
from lmppl.lm.network.output import OutputHead, OutputLayer

Tokens = tuple[int, ...]

# What a score costs beside its two products: as many FLOPs of a matrix product would take as long.
_SOFTMAX_FLOPS = 600.0

# Of the widest activation on a CPU: larger buffers come fresh from the system at every use.
_CPU_ACTIVATION_BYTES = 32 << 20


@contextmanager
def without_autocast() -> Iterator[None]:
    """Outside the caller's autocast: log-probabilities must not depend on who asks."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def without_grad() -> Iterator[None]:
    """In ``no_grad``, and outside the caller's autocast and inference mode (a later backward pass
    could not use the tensors of the latter, and caches outlive the call)."""
    with torch.inference_mode(False), torch.no_grad(), without_autocast():
        yield


@dataclass(frozen=True, eq=False)
class Prompt:
    """Keys and values of a prefix: per layer (H_kv, P, D)."""

    tokens: Tokens
    layers: Sequence[LayerKV]

    def group(self, num_rows: int) -> Group:
        """For so many rows of a pass."""
        return Group(self.layers, len(self.tokens), num_rows)

    @functools.cached_property
    def num_bytes(self) -> int:
        return sum(t.nbytes for layer in self.layers for t in layer)

    def head(self, length: int) -> Prompt:
        """The first ``length`` tokens."""
        if length == len(self.tokens):
            return self
        layers = [(k[:, :length], v[:, :length]) for k, v in self.layers]
        return Prompt(self.tokens[:length], layers)


NO_PROMPT = Prompt((), ())


class Runner:
    """Runs one model.

    Args:
        model: a causal LM of transformers, or a ``PeftModel`` on one.
        name, decode: of the model, and from tokens to text, for messages.
        max_prompt_bytes: bound on the memory of remembered prompts.
    """

    hidden: Tensor  # (N, hidden), what would have entered the output layer in the last pass

    def __init__(
        self,
        model: Any,
        *,
        name: str = "the model",
        decode: Callable[[Sequence[int]], str] = repr,
        max_prompt_bytes: int = 256 << 20,
    ) -> None:
        self.name, self.decode = name, decode
        self.memory = Memory()  # what a batch may take
        self.usage = Usage()  # where tokens are counted
        self._given = model
        self._max_prompt_bytes = max_prompt_bytes
        self.computed_tokens = 0  # positions that went through the model, padding included
        self.generation = 0  # how often weights were found changed
        self._build()

    def _build(self) -> None:
        """Begin with the model as it is now."""
        for found in ("fast", "matrices"):
            self.__dict__.pop(found, None)
        model = adapted_modules(self._given) if is_adapted(self._given) else self._given
        self._model = clone(model).eval()
        self._config = text_config(self._model)
        self.context_length = context_length(self._model)
        self._head = OutputHead(self._model.get_output_embeddings())
        self.size = self._head.size  # width of the logits
        self._model.set_output_embeddings(self._head)
        self.output = OutputLayer(self._model, self._head)  # ready once ``fast`` is known
        self.checkpointing = Checkpointing()
        self._fast_model: Any = None
        self._parameters = tuple(self._model.parameters())
        self._prompts: OrderedDict[Tokens, Prompt] = OrderedDict()  # the last used at the end
        self._watch = WeightWatch(self._parameters)
        self._cache_argument = _cache_argument(self._model)
        self._kinds = self._watch.kinds()
        self.slow_reason: str | None = None  # why it is not fast
        self.can_record = len({p.device for p in self._parameters}) == 1  # steps, on CUDA

    @property
    def device(self) -> torch.device:
        return self._model.get_input_embeddings().weight.device

    @property
    def trains(self) -> bool:
        """Whether any of its parameters needs a gradient."""
        return any(p.requires_grad for p in self._parameters)

    def check_request(self, prefix: int, tokens: int, name: str) -> None:
        """Raises ``ValueError`` if the prefix has no tokens, or exceeds the context with so many
        more. Every way into the model asks: positions past the context would be clamped."""
        site = f"site '{name}': " if name else ""
        if not prefix:
            raise ValueError(
                f"{site}the prefix has no tokens, and this model has no BOS token to start from; "
                "give a prefix"
            )
        limit = self.context_length
        if limit is not None and prefix + tokens > limit:
            raise ValueError(
                f"{site}a prefix of {prefix} tokens and {tokens} more do not fit the context of "
                f"{self.name!r}, {limit} tokens. Shorten the prefix or lower max_tokens."
            )

    @functools.cached_property
    def matrices(self) -> Matrices:
        """What a forward pass multiplies by."""
        return Matrices(self._model, self._head, self._packed)

    def _packed(self) -> tuple[list[PackedProduct], list[PackedProduct]]:
        """What it multiplies by instead where it can: outside the output layer, and in it."""
        fast = () if self._fast_model is None else self._fast_model.modules()
        output = self.output.packed
        return packed_products(fast), packed_products([output] if output else [])

    @property
    def activation_bytes(self) -> int:
        """Of the widest activation of a token (two layers of that width may be one product)."""
        widest = max((max(m.shape) for m in self.matrices.body), default=self.size)
        return 2 * widest * self._head.weight.element_size()

    @property
    def cache_bytes(self) -> int:
        """Of a token's keys and values."""
        config = self._config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        numbers = 2 * config.num_hidden_layers * heads * self._head_width
        return int(numbers) * self._head.weight.element_size()

    @property
    def _head_width(self) -> int:
        """Of each attention head."""
        width = getattr(self._config, "head_dim", None)
        return width or self._config.hidden_size // self._config.num_attention_heads

    @property
    def pass_tokens(self) -> int:
        """How many tokens a pass without gradients reads, padding included."""
        bytes_a_token = self.activation_bytes
        most = self.memory.available(self.device) // (6 * bytes_a_token)  # so many are alive
        if self.device.type == "cpu":
            most = min(most, _CPU_ACTIVATION_BYTES // bytes_a_token)
        return max(1, most)

    def batch_rows(self, num_slots: int) -> int:
        """How many rows with so many tokens of their own may grow together."""
        # On a CPU logits are made for some rows at a time, on a GPU in one piece.
        logits = 0 if self.device.type == "cpu" else 4 * self.size
        row = num_slots * self.cache_bytes + 6 * self.activation_bytes + 3 * logits
        return max(1, self.memory.available(self.device) // row)

    def cost(self, prefix: int, num_rows: int, length: int) -> float:
        """In FLOPs, of a batch of rows that see a prefix of so many tokens."""
        heads = self._config.num_hidden_layers * self._config.num_attention_heads
        score = heads * (4.0 * self._head_width + _SOFTMAX_FLOPS)
        token = self.matrices.flops(1, 0)[0] + score * (prefix + length)
        return num_rows * length * token

    @functools.cached_property
    @without_grad()
    def fast(self) -> bool:
        """Whether prefixes can be shared, by a probe."""
        self.output.check(torch.tensor([[1, 0, 2]], device=self.device) % self.size)
        self.slow_reason = self._probe()
        if self.slow_reason is not None:
            warnings.warn(
                f"{type(self._model).__name__} runs on the slow path, which computes every prefix "
                f"anew at every token: {self.slow_reason}",
                stacklevel=2,
            )
        return self.slow_reason is None

    # Forward passes. They end at what enters the output layer: few of its rows are asked for.

    def run_plain(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """States (N, hidden) at ``positions`` of the flattened right-padded ``tokens`` (B, T).

        The model as it is: its own attention, no cache. Differentiable.
        """
        self.count(tokens, positions)
        return self._run(self._model, tokens, positions, use_cache=False)

    def run_cached(
        self,
        tokens: Tensor,
        cache: PrefixCache,
        positions: Tensor | None = None,
        *,
        counted: bool = True,
    ) -> Tensor:
        """States (N, hidden) at ``positions`` of the flattened ``tokens`` (B, T) that continue
        ``cache``; at all of them if None. The cache then holds the tokens' keys and values."""
        if counted:
            self.count(tokens, positions)
        at = cache.positions(tokens.shape[1], tokens.device).expand(tokens.shape[0], -1)
        if self.context_length is not None:  # padding may stand behind it, nothing else does
            at = at.clamp(max=self.context_length - 1)
        given = {self._cache_argument: cache, "lmppl_cache": cache, "position_ids": at}
        return self._run(self._fast_model, tokens, positions, use_cache=True, **given)

    def count(self, tokens: Tensor, positions: Tensor | None) -> None:
        """A pass of ``tokens`` (B, T) is made, of which ``positions`` are asked for (None: all)."""
        self.computed_tokens += tokens.numel()
        count_pass(lambda: self.matrices, tokens, positions)

    def _run(self, model: Any, tokens: Tensor, positions: Tensor | None, **given: Any) -> Tensor:
        with self._head.asking_for(positions):
            out = model(input_ids=tokens, return_dict=True, **given)
        states = self._head.take()
        self.hidden = states.detach()
        return out.logits if self._head.opaque else states

    def shared_prompt(self, sequences: Sequence[Tokens], limit: int | None = None) -> Prompt:
        """The keys and values of what the non-empty sequences have in common, at most ``limit``
        tokens. The last token of each is left over: a pass of the rest has the next one's
        logits."""
        shortest = min(len(s) for s in sequences) - 1
        limit = shortest if limit is None else min(limit, shortest)
        low, high = min(sequences), max(sequences)
        common = common_length(low, high, limit)
        known = max((common_length(t, low, common) for t in self._prompts), default=0)
        if (common - known) * len(sequences) <= 16:
            common = known  # a few tokens in each row cost less than a pass for them alone
        return self.prompt(low[:common])

    @without_grad()
    def prompt(self, tokens: Tokens) -> Prompt:
        """The keys and values of ``tokens``, computed as far as they aren't remembered."""
        longest = longest_beginning(self._prompts, tokens)
        base = NO_PROMPT
        if longest:
            self._prompts.move_to_end(longest)
            base = self._prompts[longest].head(common_length(longest, tokens))
        if base.tokens == tokens:
            return base
        prompt = self.extend_prompt(base, tokens)
        if prompt.num_bytes <= self._max_prompt_bytes:
            self._prompts[tokens] = prompt
            while len(self._prompts) > 32 or self._prompt_bytes > self._max_prompt_bytes:
                self._prompts.popitem(last=False)
        return prompt

    @property
    def _prompt_bytes(self) -> int:
        return sum(prompt.num_bytes for prompt in self._prompts.values())

    def extend_prompt(self, base: Prompt, tokens: Tokens) -> Prompt:
        """The keys and values of ``tokens``, which begin with those of ``base``. Differentiable."""
        known = len(base.tokens)
        cache = PrefixCache([base.group(1)])
        new = torch.tensor([tokens[known:]], device=self.device)
        with self.checkpointing(False):  # its keys and values are wanted, not its output
            self.run_cached(new, cache, torch.zeros(1, dtype=torch.long, device=self.device))
        layers: list[LayerKV] = [(k[0], v[0]) for k, v in cache.suffix]
        if known:
            layers = [
                (torch.cat([k0, k], 1), torch.cat([v0, v], 1))
                for (k0, v0), (k, v) in zip(base.layers, layers, strict=True)
            ]
        return Prompt(tokens, layers)

    def refresh(self) -> None:
        """Drop what was made of weights that have changed since (see ``WeightWatch``): prompts and
        packed products. Every way into the model begins so."""
        if not self._watch.changed():
            return
        self.generation += 1
        if self._watch.kinds() == self._kinds:
            self.forget()
        else:  # another dtype, or device
            self._build()
            self._watch.changed()

    def forget(self) -> None:
        """Drop the prompts and the packed products."""
        self._prompts.clear()
        for product in itertools.chain(*self._packed()):
            product.forget()

    def _probe(self) -> str | None:
        """Try the shared-prefix path. Returns what is wrong with it, or None."""
        types = set(getattr(self._config, "layer_types", None) or ())
        unknown = types - {"full_attention", "sliding_attention"}
        if unknown:
            return f"it has layers of type {', '.join(sorted(unknown))}"
        try:
            self._fast_model = self._make_fast_model()
            reason = self._compare()
            if reason is None and not self.trains and can_pack(self._fast_model):
                self._try_to_pack()
            return reason
        except Exception as error:  # whatever the model's code raises: it isn't supported
            return f"its attention can't be reached ({type(error).__name__}: {error})"

    def _try_to_pack(self) -> None:
        """Pack the layers below the output layer, if the logits stay the same."""
        model = self._fast_model
        try:
            groups = input_groups(model, lambda: self.extend_prompt(NO_PROMPT, (0,)))
            outside = {id(layer) for layer in self._head.modules()}
            names = {name for name, module in model.named_modules() if id(module) in outside}
            pack(model, [group for group in groups if not names.intersection(group)])
            good = self._compare() is None
        except RuntimeError:  # kernels that this machine turns out not to have
            good = False
        if not good:
            self._fast_model = self._make_fast_model()

    def _make_fast_model(self) -> Any:
        model = clone(self._model)
        model.set_output_embeddings(torch.nn.Identity())  # what follows is for the layers below it
        fuse(model)
        use_attention(model)
        # One output layer serves both, so that asking it for positions reaches both.
        model.set_output_embeddings(self._head)
        self.checkpointing.wrap(model)
        return model

    def _compare(self) -> str | None:
        """What is wrong with a pass of the fast model, or None."""
        tensor = functools.partial(torch.tensor, device=self.device)
        prompt = self.extend_prompt(NO_PROMPT, tuple(i % self.size for i in (1, 2, 0)))
        ids = tensor([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]]) % self.size
        # The second row is a tree: 7 and 1 follow 2; 8 and then 2 follow that 1.
        ends = tensor([[5, 5, 5, 5, 5], [5, 2, 5, 5, 5]])
        depths = tensor([[0, 1, 2, 3, 4], [0, 1, 1, 2, 3]])
        cache = PrefixCache([prompt.group(2)], tree=Tree(depths, ends))
        got = self.output(self.run_cached(ids, cache))[[0, 1, 2, 3, 4, 5, 6, 5, 7, 8, 9]]
        paths = ids[0], ids[1, [0, 1]], ids[1, [0, 2, 3, 4]]
        whole = [torch.cat([tensor(prompt.tokens), path]).unsqueeze(0) for path in paths]
        with self._head.as_it_is():
            want = torch.cat([plain_logits(self._model, tokens)[0, 3:] for tokens in whole])
        num_layers = self._config.num_hidden_layers
        if cache.calls != num_layers:
            return f"{cache.calls} of its {num_layers} layers have an attention that can be shared"
        # Windows are longer than a probe: that they are handed over must do.
        types = getattr(self._config, "layer_types", None) or [None] * num_layers
        sliding = bool(getattr(self._config, "sliding_window", None))
        wanted = [sliding if kind is None else kind == "sliding_attention" for kind in types]
        if [window is not None for window in cache.windows] != wanted[:num_layers]:
            return "its attention layers don't say which of them have a sliding window"
        exact = prompt.layers[0][0].dtype in (torch.float32, torch.float64)
        agree = logits_agree(got, want, exact=exact)
        return None if agree else "its logits are not those of the plain model"


def _cache_argument(model: Any) -> str:
    """What the model's forward pass calls its cache: ``cache`` from transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def common_length(a: Tokens, b: Tokens, limit: int | None = None) -> int:
    """Length of the common prefix, at most ``limit``."""
    most = min(len(a), len(b)) if limit is None else min(len(a), len(b), limit)
    if a[:most] == b[:most]:
        return most
    return next(n for n in range(most) if a[n] != b[n])


def longest_beginning(known: Iterable[Tokens], tokens: Tokens) -> Tokens:
    """The one of the ``known`` sequences that has most in common with the beginning of ``tokens``;
    ``()`` if none has anything."""
    found = max(known, default=(), key=lambda other: common_length(other, tokens))
    return found if common_length(found, tokens) else ()


def padded(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(B, T), padded on the right with 0."""
    longest = max(map(len, sequences))
    rows = [list(s) + [0] * (longest - len(s)) for s in sequences]
    return torch.tensor(rows, device=device)
