"""Reading a model and its tokenizer from files: a folder, a name on the hub, or a GGUF file."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch

# What also matters for fetching a tokenizer; all else is the model's alone.
_FETCHING = {"cache_dir", "force_download", "gguf_file", "local_files_only"}
_FETCHING |= {"revision", "subfolder", "token"}


def load_local(path: Path, dtype: torch.dtype, **hf_kwargs: Any) -> tuple[Any, Any]:
    """The model and the tokenizer of a folder, or of a GGUF file, whose weights are dequantised.
    ``OSError`` if they are not there."""
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"there is no GGUF file {str(path)!r}")
        path, hf_kwargs = path.parent, {**hf_kwargs, "gguf_file": path.name}
    try:
        return load_pretrained(str(path), dtype, **hf_kwargs)
    except (OSError, ValueError) as error:
        raise OSError(
            f"{path} does not hold a Hugging Face causal language model and its tokenizer: {error}"
        ) from error


def load_pretrained(
    source: str, dtype: torch.dtype, *, progress: bool = False, **hf_kwargs: Any
) -> tuple[Any, Any]:
    """A model and its tokenizer by transformers' own ways, with its own errors."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fetching = {k: v for k, v in hf_kwargs.items() if k in _FETCHING}
    with quiet(progress=progress):
        tokenizer = AutoTokenizer.from_pretrained(source, **fetching)
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **hf_kwargs), tokenizer


@contextmanager
def quiet(*, progress: bool = False) -> Iterator[None]:
    """Without transformers' notices, and without its progress bars unless ``progress``."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not progress:
        logging.disable_progress_bar()
    # The bar of a GGUF's dequantisation obeys no setting, but goes to standard error like the rest.
    redirected: Any = nullcontext() if progress else redirect_stderr(io.StringIO())
    try:
        with redirected:
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
