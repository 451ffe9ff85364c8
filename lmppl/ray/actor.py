"""``Infer``: what Ray Data makes actors of, each with a language model of its own."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
import ray
import torch
from ray.data.block import BlockAccessor

from lmppl.checks import check_callable, check_int
from lmppl.engines import EngineLike
from lmppl.engines.infer_batch import infer_batch
from lmppl.lm import LM
from lmppl.ray.rows import (
    Key,
    Settings,
    answer_of,
    answer_of_error,
    arguments_of,
    inputs_of,
    joined,
    keys_of,
    seed_of,
)
from lmppl.runtime import fresh_seed
from lmppl.runtime.arguments import name_of
from lmppl.training.lm_guide import LMGuide


class Actor:
    """A process that answers batches of rows. ``Infer`` makes a class of it that has ``settings``.

    Attributes:
        lm: the language model, loaded when the actor begins.
        guide: the guide; None: there is none.

    Raises:
        RuntimeError: for a language model or a guide that cannot be loaded; names the node.
    """

    settings: ClassVar[Settings]

    def __init__(self) -> None:
        settings, given = self.settings, _resources()
        if "CPU" in given:
            torch.set_num_threads(max(1, int(given["CPU"])))
        self.lm = self._load("language model", settings.lm, lambda: self._load_lm(given))
        self.guide = settings.guide
        if isinstance(settings.guide, (str, Path)):
            self.guide = self._load(
                "guide",
                settings.guide,
                lambda: LMGuide.load(settings.guide, settings.model, self.lm),
            )

    def _load_lm(self, given: Mapping[str, float]) -> LM:
        settings = self.settings
        if callable(settings.lm):
            return settings.lm()
        device = settings.device
        if device is None and given:  # Ray shows a process the devices that it has, and no others
            device = "cuda:0" if given.get("GPU") else "cpu"
        return LM.from_pretrained(settings.lm, device=device, dtype=settings.dtype)

    def _load(self, what: str, source: Any, load: Callable[[], Any]) -> Any:
        try:
            return load()
        except Exception as error:
            name = name_of(source) if callable(source) else str(source)
            raise RuntimeError(
                f"node {node()} cannot load the {what} {name!r}: {type(error).__name__}: {error}. What "
                "actors load has to be on every node that has one, or on a file system that they share; "
                "label_selector= keeps actors to some nodes"
            ) from error

    def __call__(self, batch: Any) -> pa.Table:
        """The rows of a batch with their answers behind them.

        Args:
            batch: as Ray Data gives it, in any ``batch_format``.

        Raises:
            ValueError, TypeError: for rows that are not those of the program; see ``Infer``.
            RuntimeError: for an input that failed, by its key and node (``on_error="raise"``).
        """
        return self.answer(table_of(batch))

    def answer(self, table: pa.Table) -> pa.Table:
        """The same of rows as a table."""
        settings = self.settings
        keys = keys_of(table, settings.key)
        seeds = [seed_of(settings.seed, key) for key in keys]
        inputs = inputs_of(table, arguments_of(table.column_names, settings))
        posteriors = infer_batch(
            settings.model,
            inputs,
            method=settings.method,
            lm=self.lm,
            num_samples=settings.num_samples,
            guide=self.guide,
            seed=seeds,
            progress=False,
            on_error="return",
            at_once=settings.at_once,
            kwargs=settings.kwargs,
            **settings.options,
        )
        answers = []
        with contextlib.closing(posteriors):
            for key, posterior in zip(keys, posteriors, strict=True):
                try:
                    if isinstance(posterior, Exception):
                        raise posterior
                    answers.append(answer_of(posterior, settings))
                except Exception as error:
                    answers.append(self.failed(key, error))
        return joined(table, answers)

    def failed(self, key: Key, error: Exception) -> dict[str, Any]:
        """The answer of an input that failed. Raises ``RuntimeError`` if that is to end the run."""
        settings = self.settings
        if settings.on_error == "raise":
            raise RuntimeError(
                f"the input with {settings.key}={key!r} failed on node {node()}: "
                f"{type(error).__name__}: {error}. on_error='return' gives such an input "
                "a row with its error, and answers the others"
            ) from error
        return answer_of_error(error, seed_of(settings.seed, key))


def table_of(batch: Any) -> pa.Table:
    """A batch, as Ray Data gives it, in any ``batch_format``."""
    return BlockAccessor.for_block(BlockAccessor.batch_to_block(batch)).to_arrow()


def Infer(
    model: Callable[..., Any],
    *,
    lm: str | Path | Callable[[], LM],
    method: str | EngineLike = "smc",
    guide: str | Path | Callable[..., Any] | None = None,
    num_samples: int = 64,
    seed: int = 0,
    key: str = "key",
    arguments: Sequence[str] | None = None,
    site: str | Callable[[dict[str, Any]], Any] | None = None,
    top: int = 10,
    on_error: Literal["raise", "return"] = "raise",
    at_once: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> type[Actor]:
    """What to infer of each row of a Ray data set, for ``lmppl.ray.run`` or ``Dataset.map_batches``.

    ```python
    infer = lmppl.ray.Infer(infill, lm="smollm2-135m-instruct", method="smc", num_samples=64)
    answers = lmppl.ray.run(infer, ray.data.read_json("inputs.jsonl"), concurrency=2)
    ```

    It is a class, as Ray Data makes actors of classes only: processes that live as long as the run, and
    each loads the language model once. A row's columns are the program's arguments by name; null is as
    if it were not there. The answer is the row, and behind its columns

    - ``log_evidence``, ``log_evidence_stderr``, ``ess``: as of ``Posterior``; null: not known;
    - ``num_samples``: how many weighted traces there are;
    - ``texts``, ``weights``: the most probable values of a site, and their probabilities;
    - ``notes``: what the posterior has to say of itself;
    - ``seed``: with it, ``infer`` on the input gives this posterior again;
    - ``error``: what an input that failed has raised; null: it has not.

    The seed of an input is made of ``seed`` and the row's key, and of nothing else. So an answer does
    not depend on how many actors there are, which rows are beside it, or whether a process died and its
    rows were answered again: to rounding in float32, in distribution in bfloat16.

    Args:
        model: the program, as of ``infer``.
        lm: the name or path of a language model, as ``LM.from_pretrained`` takes it, or a function
            without arguments that returns an ``LM``.
        method: as of ``infer``.
        guide: the folder of a saved ``LMGuide``, or a guide program; None: none.
        num_samples: as of ``infer``, for each input.
        seed: of the run.
        key: the column that tells rows apart: whole numbers or strings. A key i that is a number gets
            the seed that input i gets of ``infer_batch(seed=seed)``.
        arguments: the columns that are arguments of the program; None: all but the key.
        site: what is ranked, as ``Posterior.probs`` takes it: the name of a site, or a function of a
            sample's values; None: the program's only latent text (or number of a discrete kind).
        top: how many texts at most.
        on_error: ``"raise"``: an input's exception ends the run. ``"return"``: it is in the input's row.
        at_once: as of ``infer_batch``.
        kwargs: arguments of the program by name that all rows share.
        dtype: of the language model, as of ``LM.from_pretrained``.
        device: of the language model; None: ``"cuda:0"`` where Ray gave the actor a GPU, else the CPU.
        **options: of the engine, as of ``infer``.

    Raises:
        ValueError, TypeError: as ``infer_batch``; for a language model or a guide that is an object and
            not where to find one.
    """
    if not (isinstance(lm, (str, Path)) or callable(lm)) or isinstance(lm, LM):
        raise TypeError(
            f"lm= takes a name, a path, or a function that returns a language model, given a "
            f"{type(lm).__name__}: each actor loads one of its own"
        )
    if callable(lm) and (dtype is not None or device is not None):
        raise ValueError("dtype= and device= go with a name; a function loads as it likes")
    if isinstance(guide, LMGuide):
        raise TypeError(
            "guide= takes the folder of a guide, which each actor loads: guide.save('folder')"
        )
    if site is not None and not isinstance(site, str):
        check_callable("site", site)
    if isinstance(arguments, str):
        raise TypeError(f"arguments= takes a list of names, ['x', 'y'], given {arguments!r}")
    top = check_int("top", top)
    common: dict[str, Any] = {"method": method, "num_samples": num_samples, "guide": guide}
    common |= {"on_error": on_error, "at_once": at_once, "kwargs": kwargs}
    infer_batch(model, [], seed=[], progress=False, **common, **options).close()  # its checks
    settings = Settings(
        model, lm, seed=fresh_seed(check_int("seed", seed, least=0)), key=key, arguments=arguments,
        site=site, top=top, dtype=dtype, device=device, options=options, **common,
    )  # fmt: skip
    return type("Infer", (Actor,), {"settings": settings, "__module__": __name__})


def _resources() -> Mapping[str, float]:
    """What Ray has given this actor, ``{"CPU": 1.0}``; nothing, outside of one."""
    if not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
        return {}
    return ray.get_runtime_context().get_assigned_resources()


def node() -> str:
    """This machine, for messages: its name and its address in the cluster."""
    address = f" ({ray.util.get_node_ip_address()})" if ray.is_initialized() else ""
    return f"{socket.gethostname()}{address}"
