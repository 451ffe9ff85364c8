"""LM: a frozen language model and its tokenizer, as a density over token sequences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmppl.checks import check_int, check_number, check_seed
from lmppl.exclusive import exclusive
from lmppl.lm.batches import scoring
from lmppl.lm.batches.decoding import Decoding
from lmppl.lm.batches.draw_log import note_drawn, note_scored
from lmppl.lm.batches.requests import Draw, Drawn, Score, Scored
from lmppl.lm.loading import DTYPES, load
from lmppl.lm.meter.work import Usage
from lmppl.lm.network import adapter as adapters
from lmppl.lm.network.memory import Memory
from lmppl.lm.network.modules import clone, context_length, text_config
from lmppl.lm.network.runner import Runner
from lmppl.lm.tokens.chat import apply_chat_template
from lmppl.lm.tokens.stopping import Stopping, encode_observed
from lmppl.lm.tokens.text import Text
from lmppl.lm.tokens.vocabulary import Vocabulary
from lmppl.processes import naming_this_process

Prefix = str | Sequence[str]  # a Text is a str


class LM:
    """A causal language model, wrapped as a distribution over token sequences.

    Args:
        model: a Hugging Face causal language model. It is put into evaluation mode (no dropout).
        tokenizer: its tokenizer.
        name: for messages; by default the model's own.

    Attributes:
        model: the Hugging Face model.
        tokenizer: its Hugging Face tokenizer.
        vocabulary: text to ids, ids to text, which tokens end a text.
        usage: counters of tokens sampled, scored and trained on, shared with its adapters.
        memory: what a batch may take (``lmppl.Memory``); adapters begin with their base's.

    Raises:
        TypeError: a model that is no causal language model; a tokenizer that can't decode.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str | None = None) -> None:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if head is None:
            raise TypeError(
                f"{type(model).__name__} is not a causal language model: it has no output "
                "embeddings. Load it with transformers.AutoModelForCausalLM."
            )
        if not callable(getattr(tokenizer, "decode", None)):
            raise TypeError(
                f"tokenizer must be the model's Hugging Face tokenizer, given {tokenizer!r}: load "
                "it with transformers.AutoTokenizer"
            )
        self.model: Any = model.eval()
        self.tokenizer: Any = tokenizer
        self.name: str = name or getattr(model.config, "name_or_path", "") or type(model).__name__
        size = int(head.weight.shape[0])
        self.vocabulary = Vocabulary(tokenizer, _eos_ids(model, tokenizer, size), size)
        self.usage = Usage()
        self.memory = Memory()
        self._runner: Runner | None = None  # made at first use
        self._sampler: tuple[Any, Any] = None, None  # its version, and an LM

    @classmethod
    @exclusive()
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        **hf_kwargs: Any,
    ) -> LM:
        """Load a model, frozen.

        Args:
            name_or_path: a name on the Hugging Face hub, a local directory, a ``.gguf`` file, or
                ``"smollm2-135m-instruct"``, the embedded model.
            device: by default cuda, else mps, else cpu.
            dtype: by default bfloat16 where the machine is fast at it, else float32.
            **hf_kwargs: for ``transformers.AutoModelForCausalLM.from_pretrained``.

        Raises:
            OSError: there is no such model, or it cannot be fetched.
            ValueError: a device or dtype that cannot be used; ``trust_remote_code``.
        """
        with naming_this_process("every machine of a run needs the model under this name"):
            model, tokenizer = load(name_or_path, device, dtype, **hf_kwargs)
        return cls(model, tokenizer, name=str(name_or_path))

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        adapter = ""
        if adapters.is_adapted(self.model):
            adapter = f", with an adapter: {adapters.adapter_summary(self.model)}"
        return f"LM({self.name!r}, {dtype} on {self.device}{adapter})"

    @property
    def device(self) -> torch.device:
        """Where its token embeddings are."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """That of its token embeddings."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def hidden_size(self) -> int:
        return int(text_config(self.model).hidden_size)

    @cached_property
    def context_length(self) -> int | None:
        """The most tokens of a prefix and its continuation; None if the model has no such limit."""
        return context_length(self.model)

    @property
    def tokens_sampled(self) -> int:
        """Tokens drawn so far, by this model and its adapters."""
        return self.usage.tokens_sampled

    @property
    def tokens_scored(self) -> int:
        """Tokens scored so far, by this model and its adapters; not those of training."""
        return self.usage.tokens_scored

    @property
    def tokens_trained(self) -> int:
        """Tokens scored so far with a gradient to parameters of this model or its adapters."""
        return self.usage.tokens_trained

    # Sampling and scoring of plain text.

    @exclusive()
    def sample(
        self,
        prefix: Prefix,
        num_samples: int,
        *,
        max_tokens: int,
        stop: str | Sequence[str] | None = None,
        temperature: float = 1.0,
        seed: int | None = None,
    ) -> tuple[list[Text], Tensor]:
        """Draw continuations of one prefix.

        Args:
            prefix: a string, a ``Text``, or a list of them (see ``encode``).
            num_samples: how many, N.
            max_tokens: of each, the closing token included.
            stop: string or strings that close a continuation.
            temperature: T > 0; each step is renormalised, p^(1/T).
            seed: of the draws; by default torch's random state is used.

        Returns:
            N texts, and their log-probabilities, (N,) float32 in nats.

        Raises:
            ValueError: no ``max_tokens``, an argument out of range, or a prefix without tokens.
        """
        num_samples, seed = check_int("num_samples", num_samples, least=0), check_seed(seed)
        if max_tokens is None:
            raise ValueError("max_tokens is required: how long may a sample become, in tokens?")
        temperature = check_number("temperature", temperature, above=0)
        stopping = Stopping(self.vocabulary, stop, max_tokens)  # type: ignore[arg-type]
        ids = self.encode(prefix)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        size = num_samples, int(max_tokens)
        uniforms = torch.rand(size, generator=generator, dtype=torch.float64, device="cpu")
        drawn = self.draw([Draw(ids, stopping, row, temperature) for row in uniforms])
        return [stopping.text(d.token_ids) for d in drawn], _totals(drawn)

    def log_prob(
        self,
        prefix: Prefix,
        continuations: Sequence[str],
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """log p(continuation | prefix), by the rule of an observed site.

        With neither ``stop`` nor ``max_tokens``: the probability that the text goes on so. With
        them: that it goes on so *and ends*; a string that does not close gets an EOS scored.

        Args:
            prefix: a string, a ``Text``, or a list of them.
            continuations: N strings (scored as their canonical tokens) or ``Text``s (as theirs).
            max_tokens: the most tokens that the text may have, as of ``sample``.
            stop: string or strings that close it.
            temperature: T > 0; each step is renormalised, p^(1/T).

        Returns:
            (N,) float32, in nats.

        Raises:
            TypeError: for what is no list of strings.
            ValueError: a continuation that could not have been produced; says where and why.
        """
        if isinstance(continuations, str):
            continuations = [continuations]
        if not isinstance(continuations, Iterable):
            raise TypeError(f"continuations takes a list of strings, given {continuations!r}")
        temperature = check_number("temperature", temperature, above=0)
        stopping = Stopping(self.vocabulary, stop, max_tokens)  # type: ignore[arg-type]
        ids = self.encode(prefix)
        observed = [self.encode_observed(text, stopping) for text in continuations]
        return _totals(self.score([Score(ids, tokens, temperature) for tokens in observed]))

    # Text to tokens.

    def encode(self, prefix: Prefix, *, name: str = "") -> tuple[int, ...]:
        """The tokens of a prefix.

        Adjacent strings of a list are separate parts, each tokenised as a continuation. A ``Text``
        keeps its tokens, without EOS. BOS stands once at the front, if the tokenizer adds one.

        Args:
            prefix: a string, a ``Text``, or a list of them.
            name: the site, for messages.

        Raises:
            ValueError: no tokens at all; a ``Text`` of another tokenizer.
            TypeError: a part that is not a string.
        """
        site = f"site '{name}': " if name else ""
        if not isinstance(prefix, Sequence):
            raise TypeError(
                f"{site}a prefix is a string, a Text, or a list of them, not "
                f"{type(prefix).__name__} ({prefix!r})"
            )
        parts: list[str | tuple[int, ...]] = []
        for part in [prefix] if isinstance(prefix, str) else prefix:
            if isinstance(part, Text):
                self._check_text(part, site)
                parts.extend(part.parts)
            elif isinstance(part, str):
                parts.append(part)
            else:
                raise TypeError(
                    f"{site}a prefix holds strings and Texts, not {type(part).__name__} ({part!r})"
                )
        try:
            ids = self.vocabulary.encode_prefix(parts)
        except ValueError as error:
            raise ValueError(f"{site}{error}") from error
        if not ids:
            raise ValueError(
                f"{site}the prefix is empty, and the tokenizer of {self.name!r} puts no BOS token "
                "in front, so the model has nothing to continue. Begin with some text, if only "
                'a newline ("\\n").'
            )
        return ids

    def decode(self, ids: Any, *, stop: str | Sequence[str] | None = None) -> Any:
        """The texts of token ids: of values as Pyro keeps them, in traces and in what ``Predictive`` and
        ``EmpiricalMarginal`` return.

        ```python
        draws = Predictive(infill, num_samples=3)(x)
        texts = lm.decode(draws["z"])              # a list of 3 texts
        ```

        Args:
            ids: ``(..., max_tokens)`` integers, a tensor or nested lists; each row is padded on the
                right with -1.
            stop: the site's stop string or strings, for ``Text.body`` and ``Text.finish_reason``.

        Returns:
            A ``Text`` of ids of one dimension, else nested lists of them, of the shape ``(...)``.

        Raises:
            TypeError: what are no integers.
            ValueError: what is no token of the vocabulary; a row that goes on after -1, after an EOS or
                after a stop string.
        """
        values = torch.as_tensor(ids)
        if values.numel() and (values.is_floating_point() or values.dtype is torch.bool):
            raise TypeError(f"decode takes token ids, integers, given a tensor of {values.dtype}")
        if values.dim() == 0:
            raise ValueError(f"decode takes token ids of shape (..., max_tokens), given {ids!r}")
        stopping = Stopping(self.vocabulary, stop, values.shape[-1] + 1)  # type: ignore[arg-type]
        return self._decoded(values.tolist(), values.dim(), stopping)

    def _decoded(self, rows: list[Any], dim: int, stopping: Stopping) -> Any:
        if dim > 1:
            return [self._decoded(row, dim - 1, stopping) for row in rows]
        ids = rows[: rows.index(-1)] if -1 in rows else rows
        rest = rows[len(ids) :]
        if any(token != -1 for token in rest) or not all(
            0 <= t < self.vocabulary.size for t in ids
        ):
            raise ValueError(
                f"{rows} is no text of {self.name!r}: a row holds tokens from 0 to "
                f"{self.vocabulary.size - 1}, and then only -1"
            )
        return stopping.text(ids)

    def encode_observed(self, obs: str, stopping: Stopping, *, name: str = "") -> tuple[int, ...]:
        """The tokens that are scored when ``obs`` is observed at a site: those of a ``Text``, or the
        canonical ones of a ``str``. If something closes the site and ``obs`` does not, EOS is appended.

        Raises:
            ValueError: the site could not have produced ``obs``; says where and why.
        """
        site = f"site '{name}': " if name else ""
        if isinstance(obs, Text):
            self._check_text(obs, site)
        return encode_observed(obs, stopping, site)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> Text:
        """Messages (``{"role": ..., "content": ...}``) as a prefix, by the model's chat template, in
        which ``Text``s keep their tokens."""
        return apply_chat_template(
            self.vocabulary, messages, add_generation_prompt=add_generation_prompt
        )

    def _check_text(self, text: Text, site: str) -> None:
        if not self.vocabulary.same_as(text.vocabulary):
            raise ValueError(
                f"{site}the tokens of {str(text)!r} belong to another tokenizer than that of "
                f"{self.name!r}. Use str(z) instead of z to tokenise it anew."
            )

    # Token sequences, in batches.

    @property
    def runner(self) -> Runner:
        """The model's forward passes."""
        if self._runner is None:
            self._runner = Runner(self.model, name=self.name, decode=self.vocabulary.decode)
        self._runner.memory, self._runner.usage = self.memory, self.usage
        return self._runner

    @exclusive()
    def draw(self, draws: Sequence[Draw]) -> list[Drawn]:
        """Draw a sequence for every request, all of them side by side."""
        decoding = begin_draws([(self, request) for request in draws])
        while not decoding.done:
            decoding.step()
        drawn = decoding.results()
        note_drawn(self, draws, drawn)
        return drawn

    @exclusive()
    def score(self, scores: Sequence[Score], *, grad: bool = False) -> list[Scored]:
        """Score the tokens of every request (equal ones once). ``grad``: keep the graph, for the
        parameters of an adapter."""
        scored = scoring.score(self.runner, scores, grad=grad)
        if grad:
            note_scored(self, scores, scored)
        return scored

    @exclusive()
    def hidden(self, prefixes: Sequence[tuple[int, ...]]) -> Tensor:
        """The last layer's state at the last token of each prefix, (N, hidden_size) float32."""
        return scoring.hidden(self.runner, prefixes)

    def forget(self) -> None:
        """Drop all that was made of the model: prompts, merged and packed weights.

        Changed weights are noticed by themselves at the next draw or score. Call this after a write
        of single numbers through ``.data``, and after a module was replaced.
        """
        self._sampler, self._runner = (None, None), None

    @exclusive()
    def adapter(self, config: Any = None) -> LM:
        """A new model: this one's weights, shared, and a trainable adapter, at first equal to it.

        Args:
            config: peft's configuration of the adapter; by default LoRA on every linear layer.

        Raises:
            TypeError: this model has an adapter already; what is no configuration.
            ValueError: a configuration that peft refuses, that would change the base's weights, or
                whose adapter drawing and scoring would not see; the message names it.
        """
        if config is not None and not hasattr(config, "peft_type"):
            raise TypeError(
                f"lora takes a peft.LoraConfig, given {type(config).__name__} ({config!r})"
            )
        if adapters.is_adapted(self.model):
            raise TypeError(
                f"{self.name!r} has an adapter already: make the second adapter from the base "
                "language model, or from lm.merged()"
            )
        return self._with(adapters.add_adapter(self.model, config))

    def merged(self) -> LM:
        """A frozen model with this one's adapter merged into new weights; itself if it has none.

        Its density differs from the adapter's by rounding to the base's dtype, so weights must use
        the log-probabilities of the model that was drawn from.
        """
        return self._with(adapters.merge(self.model)) if adapters.is_adapted(self.model) else self

    def in_float32(self) -> LM:
        """A copy in which weights of 16 bits are converted to float32, which takes 4 bytes for each, and
        the others are shared; this model itself if it has none. Its log-probabilities are those that
        the weights define, without the rounding of computing in 16 bits.

        Raises:
            ValueError: quantised weights, which are not numbers by themselves.
        """
        parameters = list(self.model.parameters())
        if quantised := [p.dtype for p in parameters if p.dtype not in DTYPES.values()]:
            kind = str(quantised[0]).removeprefix("torch.")
            raise ValueError(
                f"{self.name!r} has quantised weights ({kind}), of which there is no copy in float32"
            )
        tensors = [*parameters, *self.model.buffers()]
        half = [t for t in tensors if t.dtype in (torch.float16, torch.bfloat16)]
        return self._with(clone(self.model, {t: _float32(t) for t in half})) if half else self

    @cached_property
    def _merges(self) -> bool:
        return adapters.is_adapted(self.model) and adapters.can_merge(self.model)

    @property
    def sampler(self) -> LM:
        """The model that sequences are drawn from: ``merged()`` of the adapter's present
        parameters, which makes a decoding step faster, kept until they change. This model itself if
        its adapter (or none) can't be merged."""
        if not self._merges:
            return self
        self.runner.refresh()
        kind = self.dtype, self.device
        version = kind, self.runner.generation, adapters.adapter_version(self.model)
        known, sampler = self._sampler
        if known != version:
            if sampler is None or known[0] != kind:
                sampler = self.merged()
            # Also after the first merge, whose numbers may differ in their last bits.
            adapters.merge_again(self.model, sampler.model)
            self._sampler = version, sampler
        sampler.memory = self.memory
        return sampler

    def _with(self, model: Any) -> LM:
        """Another model with the same tokenizer, vocabulary, name, memory and counters."""
        other = type(self)(model, self.tokenizer, name=self.name)
        other.usage, other.memory, other.vocabulary = self.usage, self.memory, self.vocabulary
        return other


def _float32(tensor: Tensor) -> Tensor:
    whole, is_parameter = tensor.detach().float(), isinstance(tensor, torch.nn.Parameter)
    return torch.nn.Parameter(whole, requires_grad=False) if is_parameter else whole


def begin_draws(draws: Sequence[tuple[LM, Draw]]) -> Decoding:
    """Sequences of language models that grow together: each is drawn from its model's sampler."""
    runners = {lm: lm.sampler.runner for lm in dict.fromkeys(lm for lm, _ in draws)}
    return Decoding([(runners[lm], draw) for lm, draw in draws])


def _eos_ids(model: Any, tokenizer: Any, size: int) -> set[int]:
    """Every EOS that the model, its generation settings or its tokenizer name."""
    generation = getattr(model, "generation_config", None)
    ids: set[int] = set()
    for owner in (model.config, text_config(model), generation, tokenizer):
        entry = getattr(owner, "eos_token_id", None)
        ids.update(() if entry is None else entry if isinstance(entry, Iterable) else (entry,))
    return {int(token) for token in ids if 0 <= token < size}  # others can never be drawn


def _totals(answers: Sequence[Drawn | Scored]) -> Tensor:
    return torch.tensor([float(a.log_probs.sum()) for a in answers], dtype=torch.float32)
