"""The words that a program is written in, beside Pyro's own.

``lm_sample`` (text from a language model), ``tool`` (any Python function), ``require`` (a hard
condition), ``chat`` (a prefix by a model's chat template), and ``use`` (which model is meant).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar, Token
from functools import lru_cache
from operator import is_
from types import NoneType
from typing import Any, Literal, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.do_messenger import DoMessenger
from pyro.poutine.mask_messenger import MaskMessenger
from pyro.poutine.runtime import _PYRO_STACK, am_i_wrapped, apply_stack
from pyro.poutine.scale_messenger import ScaleMessenger
from pyro.poutine.trace_messenger import TraceMessenger

from lmppl.checks import check_choice, with_known_keywords
from lmppl.distributions import LMText, ToolCall, ToolResult, check_lm
from lmppl.lm import LM
from lmppl.lm.tokens.chat import strings_of
from lmppl.lm.tokens.constraints.constraint import Constraint
from lmppl.lm.tokens.constraints.guidance import Grammar, JsonSchema, Regex
from lmppl.lm.tokens.stopping import Stopping
from lmppl.lm.tokens.text import Text

# --- which language model ------------------------------------------------------------------------

# Of a block, and of its own thread or task; and for good, everywhere.
_default_lm: ContextVar[LM | None] = ContextVar("lmppl_default_lm", default=None)
_lasting: list[use] = []


class use:
    """Make ``lm`` the model of all sites that name none, from now on or within a ``with`` block.

    ```python
    lmppl.use(lm)                # from now on, in all threads
    with lmppl.use(lm):          # within the block
        trace = poutine.trace(model).get_trace(x)
    ```
    """

    def __init__(self, lm: LM) -> None:
        self._lm = check_lm("lmppl.use", lm)
        self._bare: Token[LM | None] | None = _default_lm.set(lm)
        self._blocks: list[Token[LM | None]] = []
        _lasting.append(self)
        del _lasting[:-4]  # so that replaced models can be freed

    def __enter__(self) -> LM:
        if self._bare is not None:  # it is for a block, after all
            with suppress(ValueError):
                _lasting.remove(self)
            with suppress(ValueError):  # it was made in another thread or task
                _default_lm.reset(self._bare)
            self._bare = None
        self._blocks.append(_default_lm.set(self._lm))
        return self._lm

    def __exit__(self, *exc: object) -> None:
        _default_lm.reset(self._blocks.pop())


def default_lm() -> LM | None:
    """The model that ``use`` made the default, or None."""
    lm = _default_lm.get()
    return _lasting[-1]._lm if lm is None and _lasting else lm


def _resolve_lm(lm: LM | None, what: str) -> LM:
    lm = lm if lm is not None else default_lm()
    if lm is None:
        raise ValueError(
            f"{what} names no language model and there is no default: pass lm= to lmppl.infer or "
            "to the site, or call lmppl.use(lm)"
        )
    return check_lm(what, lm)


# --- sites ---------------------------------------------------------------------------------------


class _SiteMessage(dict[str, Any]):
    """A Pyro message whose value is a tensor that the site could hold, whichever handler gives it:
    ``pyro.condition(data={"z": "text"})`` gives a string. Vectorised plates are refused."""

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "value" and value is not None:
            if isinstance(self["fn"], ToolCall):
                value = value if isinstance(value, ToolResult) else ToolResult.wrap(value)
            else:
                value = _as_value(self["name"], self["fn"], value)
        elif key == "cond_indep_stack" and (plates := [f.name for f in value if f.vectorized]):
            name, plate = self["name"], plates[0]
            is_tool = isinstance(self["fn"], ToolCall)
            what = f"tool '{name}'" if is_tool else f"site '{name}': text"
            call = "tool" if is_tool else "lm_sample"
            raise ValueError(
                f"{what} cannot stand in the vectorised plate '{plate}', since programs branch on "
                f"its value. Use the sequential form: for i in pyro.plate('{plate}', n): "
                f"{call}(f'{name}_{{i}}', ...)"
            )
        super().__setitem__(key, value)

    def copy(self) -> _SiteMessage:
        return _SiteMessage(self)


_SEQUENTIALLY = (
    "TraceEnum_ELBO enumerates its choices one after another, if the guide's site says so: "
    "lm_sample(..., infer={'enumerate': 'sequential'}). HMC and NUTS enumerate in parallel only: "
    "condition on the text, or take lmppl.infer(method='exact')."
)


def _as_value(name: str, fn: LMText, value: Any) -> torch.Tensor:
    """What a handler gives as the value of a text site, as token ids."""
    if hasattr(value, "string"):  # of an intervention, for which Pyro has renamed the site
        name, value = name.removesuffix("__CF"), value.string
    if isinstance(value, torch.Tensor) and value.dim() > 1:
        way = _SEQUENTIALLY if fn.choices else "Run the program once for each."
        raise ValueError(
            f"site '{name}' is given a batch of texts (shape {tuple(value.shape)}), but a program "
            f"branches on one. {way}"
        )
    return _of_site(name, fn.as_value, value)


def _site(name: str, fn: Any, obs: torch.Tensor | None, infer: Mapping[str, Any] | None) -> Any:
    """``pyro.sample`` with a ``_SiteMessage``."""
    infer = dict(infer or {})
    is_observed = infer.pop("is_observed", obs is not None)
    if not am_i_wrapped():
        return obs if obs is not None else fn()
    message = _SiteMessage(type="sample", name=name, fn=fn, args=(), kwargs={}, value=obs)
    message.update(is_observed=is_observed, infer=infer, scale=1.0, mask=None, cond_indep_stack=())
    message.update(done=False, stop=False, continuation=None)
    for frame in _PYRO_STACK:  # ``do`` takes no strings, so they are put into tensors for it
        if isinstance(frame, DoMessenger) and isinstance(frame.data.get(name), str):
            carrier: Any = torch.zeros(())
            carrier.string = frame.data[name]
            frame.data = {**frame.data, name: carrier}
    apply_stack(message)  # type: ignore[arg-type]
    return message["value"]


def _of_site(name: str, make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``make(...)``, whose refusals of an argument name the site."""
    try:
        return make(*args, **kwargs)
    except Exception as error:
        if type(error) not in (TypeError, ValueError):  # one that a constraint's predicate raised
            error.add_note(f"raised at site '{name}'")
            raise
        message = str(error).removeprefix(f"site '{name}': ").removeprefix("site '': ")
        raise type(error)(f"site '{name}': {message}") from error


def _check_name(name: Any, what: str) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"{what}'s name must be a non-empty string, given {name!r}")


_PLAIN = frozenset((NoneType, bool, int, float, str))  # what options of a call are compared as


class Call(NamedTuple):
    """How ``lm_sample`` was called at a site."""

    lm: LM | None
    texts: tuple[str | None, ...]  # of prefix, observation, choices and stop; None between them
    options: tuple[Any, ...]  # the other arguments
    handlers: tuple[Any, ...]  # what those within the run's recorder add to the site

    @classmethod
    def of(
        cls, lm: Any, prefix: Any, obs: Any, choices: Any, stop: Any, infer: Any, *options: Any
    ) -> Call | None:
        """A call with these arguments; None where handlers may give it another meaning, or an argument
        may change or is not to be compared."""
        handlers = () if len(_PYRO_STACK) == 1 else _annotations()
        parts = (prefix,) if isinstance(prefix, str) else prefix
        stops = (stop,) if stop is None or isinstance(stop, str) else stop
        if (
            handlers is None
            or not isinstance(parts, (list, tuple))
            or not isinstance(stops, (list, tuple))
            or not (choices is None or isinstance(choices, (list, tuple)))
            or not (infer is None or isinstance(infer, dict))
        ):
            return None
        if infer:
            options = (*options, *infer, *infer.values())
        if not _PLAIN.issuperset(type(o) for o in options if not isinstance(o, Constraint)):
            return None
        texts = (*parts, None, obs, None, *(choices or ()), None, *stops)
        return tuple.__new__(cls, (lm, texts, (choices is None, *options), handlers))

    def same_as(self, other: Call) -> bool:
        """Whether another call is the same, token by token."""
        lm, texts, options, handlers = self
        other_lm, other_texts, other_options, other_handlers = other
        if lm is not other_lm or options != other_options or handlers != other_handlers:
            return False
        # Mostly they are the very same objects.
        return len(texts) == len(other_texts) and (
            all(map(is_, texts, other_texts))
            or list(map(_as_key, texts)) == list(map(_as_key, other_texts))
        )

    def key(self, name: str) -> Hashable:
        """Equal for calls at sites of one name that have the same distribution and observation."""
        return name, self.lm, self.options, *map(_as_key, self.texts)


def _as_key(part: Any) -> Hashable:
    """Equal for parts with the same tokens; what will be refused has a key like nothing else."""
    if isinstance(part, Text):  # which equals any ``str`` of its characters
        return part.parts, part._token_ids
    return part if part is None or isinstance(part, str) else object()


def _annotations() -> tuple[Any, ...] | None:
    """What the handlers within the outermost one add to a site; None: they may do more than that."""
    found: list[Any] = []
    for frame in _PYRO_STACK[1:]:
        if type(frame) is ScaleMessenger and isinstance(frame.scale, (int, float)):
            found.append(frame.scale)
        elif type(frame) is MaskMessenger and isinstance(frame.mask, bool):
            found.append(frame.mask)
        elif type(frame) is pyro.plate and frame._vectorized is False:
            found.append((frame.name, frame.size, frame.subsample_size, frame.counter))
        else:
            return None
    return tuple(found)


class CallMemory:
    """Remembers the calls of ``lm_sample`` in a run, as its outermost handler.

    ``shared`` holds the distributions and observed values that calls have made, by ``Call.key``, and
    those of factors. Runs of one program may share them, as most begin with the same.
    """

    shared: dict[Hashable, Any]

    def recall(self, name: str, call: Call) -> Text | None:
        """What the run that this one repeats got by the same call, the site now visited; or None."""
        raise NotImplementedError

    def remember(self, name: str, call: Call, text: Text) -> None:
        """Keep what a call returned."""
        raise NotImplementedError


_MOST_SHARED = 4096


def keep(shared: dict[Hashable, Any], key: Hashable, value: Any) -> Any:
    """Keep what runs share, and return it. (Of too much, all is dropped.)"""
    if len(shared) >= _MOST_SHARED:
        shared.clear()
    shared[key] = value
    return value


@with_known_keywords
def lm_sample(
    name: str,
    prefix: str | Sequence[str],
    *,
    max_tokens: int | None = None,
    stop: str | Sequence[str] | None = None,
    choices: Sequence[str] | None = None,
    regex: str | None = None,
    json_schema: Any = None,
    grammar: str | None = None,
    constraint: Constraint | None = None,
    constrain: Literal["global", "local"] = "global",
    temperature: float = 1.0,
    obs: str | None = None,
    lm: LM | None = None,
    infer: Mapping[str, Any] | None = None,
) -> Text:
    """Text from a language model, as a Pyro sample site.

    Args:
        name: the site's name, unique in a run of the program.
        prefix: what the model continues: a ``str``, a ``Text`` or a list of them. A ``Text``
            keeps its tokens; each ``str`` is tokenised on its own.
        max_tokens: the most tokens, the closing one included. A latent needs it, or ``choices``.
        stop: a stop string or several. The value closes with the token that completes one.
        choices: whole strings; the site is a categorical over them.
        regex: a regular expression that the whole body must match (without stop string and EOS), in
            the syntax of Rust's ``regex``.
        json_schema: a JSON schema (a dict, a string or a pydantic model) that the body must be JSON of.
        grammar: a Lark grammar that the body must be of, from its rule ``start``.
        constraint: a ``lmppl.constraints.Constraint`` of your own. At most one of these four is given.
            A text that nothing can extend to another match closes without EOS.
        constrain: what a constraint makes of the density. ``"global"``: it conditions the site on a
            match: log p is the model's where the text matches, ``-inf`` elsewhere. ``"local"``: every
            step is renormalised over the tokens that are allowed, which is another model.
        temperature: renormalises every next-token distribution (with ``choices``, the categorical).
            It is part of the model.
        obs: the observed text; None means latent. With neither ``max_tokens`` nor ``stop`` it is
            scored as the *beginning* of a continuation.
        lm: the language model; by default that of ``lmppl.infer`` or ``lmppl.use``.
        infer: hints for engines, as in ``pyro.sample``. ``{"guide_prompt": text}`` sets the
            automatic guide's prompt for this site.

    Returns:
        The text. In the trace its value is a right-padded tensor of token ids.

    Raises:
        TypeError: for an argument of another type.
        ValueError: for a latent without ``max_tokens`` or ``choices``, an impossible observation, and
            arguments that define no distribution. The message names the site. (An observation that does
            not match its constraint has probability zero.)
    """
    _check_name(name, "a site")
    given = {"regex": regex, "json_schema": json_schema, "grammar": grammar}
    constraint = _of_site(name, _constraint, given, constraint)
    memory: Any = _PYRO_STACK[0] if _PYRO_STACK else None
    call = None
    if isinstance(memory, CallMemory):
        meant = default_lm() if lm is None else lm
        options = max_tokens, temperature, constraint, constrain
        call = Call.of(meant, prefix, obs, choices, stop, infer, *options)
        text = None if call is None else memory.recall(name, call)
        if text is not None:
            return text
    lm = _resolve_lm(lm, f"site '{name}'")
    if obs is not None and not isinstance(obs, str):
        raise TypeError(f"site '{name}': obs must be a str or a Text, given {type(obs).__name__}")
    if obs is None and max_tokens is None and choices is None:
        raise ValueError(
            f"site '{name}' is latent and needs max_tokens= (the largest number of tokens) or "
            "choices= (whole strings)"
        )
    if infer is not None and not isinstance(infer, Mapping):
        raise TypeError(f"site '{name}': infer takes a dict of hints, given {infer!r}")
    limits = {"max_tokens": max_tokens, "stop": stop, "choices": choices}
    law = {"constraint": constraint, "constrain": constrain, "temperature": temperature}
    arguments = name, lm, prefix, obs, {**limits, **law}
    if call is None:
        fn, value = _distribution(*arguments)
    else:
        key, shared = call.key(name), memory.shared
        fn, value = shared.get(key) or keep(shared, key, _distribution(*arguments))
    _warn_of_retokenisation(name, prefix)
    text = _of_site(name, fn.text, _site(name, fn, value, infer))
    if (
        obs is None
        and stop in _SPACES
        and text.finish_reason == "stop"
        and len(text.token_ids) == 1
    ):
        _warn_of_space_as_stop(name, text)
    if call is not None:
        memory.remember(name, call, text)
    return text


_CONSTRAINTS: dict[str, Callable[[Any], Constraint]] = {
    "regex": lru_cache(maxsize=1024)(Regex),
    "json_schema": JsonSchema,
    "grammar": lru_cache(maxsize=1024)(Grammar),
}


def _constraint(given: Mapping[str, Any], constraint: Constraint | None) -> Constraint | None:
    """The constraint that some arguments of ``lm_sample`` stand for."""
    named = [name for name, value in given.items() if value is not None]
    if not named:
        return constraint
    if len(named) > 1 or constraint is not None:
        both = " and ".join([*named, *["constraint"] * (constraint is not None)])
        raise ValueError(
            f"{both} are given, and a site has one constraint: put all into one grammar, or into "
            "one Constraint of your own"
        )
    return _CONSTRAINTS[named[0]](given[named[0]])


def _distribution(
    name: str, lm: LM, prefix: Any, obs: str | None, options: dict[str, Any]
) -> tuple[LMText, torch.Tensor | None]:
    """The distribution of a text site, and the value that it observes, if it does."""
    if obs is not None and options["max_tokens"] is None and options["choices"] is None:
        ids = obs.token_ids if isinstance(obs, Text) else lm.vocabulary.encode(obs)
        stop, constraint = options["stop"], options["constraint"]
        is_open = stop is None or (isinstance(stop, (list, tuple)) and not stop)
        if is_open and constraint is None:
            options["num_tokens"] = len(ids)
        else:  # no prefix likelihood: room for the text and the EOS that may close it, and for a match
            least = 0
            if isinstance(constraint, Constraint):
                limits = {"stop": stop, "constraint": constraint}
                least = _of_site(name, Stopping, lm.vocabulary, **limits).least_tokens
            options["max_tokens"] = max(len(ids) + 1, least)
    fn = _of_site(name, LMText, lm, prefix, **options)
    fn.name = name
    return fn, None if obs is None else _of_site(name, fn.encode, obs)


def require(name: str, condition: Any) -> None:
    """A hard condition: a particle that fails it stops here, with probability zero.

    In lmppl's engines nothing after a failed ``require`` runs. Pyro's own tools cannot stop a
    run: there the site has log-probability ``-inf`` and the program runs on.

    Args:
        name: the site's name; posteriors count how many samples it ended.
        condition: true or false.

    Raises:
        TypeError: for a condition that is neither, as of an array of several truth values.
    """
    _check_name(name, "a requirement")
    try:
        holds = bool(condition)
    except (ValueError, RuntimeError) as error:  # an array or a tensor
        raise TypeError(
            f"require '{name}': the condition is {condition!r}, neither true nor false: take "
            ".all() or .any() of it"
        ) from error
    if holds and not am_i_wrapped():
        return  # Pyro warns of observations outside inference
    log_factor = torch.tensor(0.0 if holds else -math.inf)
    unit = dist.Unit(log_factor, validate_args=False)
    pyro.sample(name, unit, obs=unit.sample(), infer={"is_auxiliary": True, "hard": True})


def tool(name: str, fn: Callable[..., Any], *args: Any, on_error: str = "raise") -> Any:
    """Call any Python function, once per particle; its result is a recorded site.

    On replay (and so in every fork of an SMC particle) the recorded result is returned and the
    function is not called again.

    Args:
        name: the site's name.
        fn: the function.
        args: its arguments.
        on_error: ``"raise"``, or ``"reject"``: a call that raises gives the particle probability
            zero, as a failed ``require`` does.

    Returns:
        Whatever ``fn(*args)`` returns. (None after a rejected call under Pyro's own tools.)

    Raises:
        TypeError: if ``fn`` can't be called.
        ValueError: for an unknown ``on_error``.
    """
    _check_name(name, "a tool")
    check_choice(f"tool '{name}': on_error", on_error, ("raise", "reject"))
    if not callable(fn):
        raise TypeError(f"tool '{name}': fn must be callable, given {type(fn).__name__}")
    value = _site(name, ToolCall(fn, args, on_error), None, {"hard": True})
    return value.result if isinstance(value, ToolResult) else value


def chat(
    messages: Sequence[Mapping[str, Any]],
    *,
    lm: LM | None = None,
    add_generation_prompt: bool = True,
) -> Text:
    """A prefix by the model's chat template.

    A BOS token that the template writes is not added twice.

    Args:
        messages: ``[{"role": ..., "content": ...}, ...]``. A content is a string or what else the
            template takes, as ``[{"type": "text", "text": z}]``. ``Text``s in it keep their tokens.
        lm: whose template; by default that of ``lmppl.infer`` or ``lmppl.use``.
        add_generation_prompt: end with the header of an assistant's turn.

    Raises:
        TypeError: for what is no list of messages.
        ValueError: if the tokenizer has no chat template, or a message has not both keys.
    """
    lm = _resolve_lm(lm, "chat")
    prefix = lm.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
    site = _latent_within(list(strings_of([message["content"] for message in messages])))
    if site is not None:
        _warn_once(
            ("chat", site),
            f"chat(): a message holds the text of site '{site}' as a plain str (an f-string or a "
            "str method makes one), which is tokenised anew, maybe into other tokens than were "
            "drawn. Give the text itself, or join it with +: 'content': before + z + after.",
            stacklevel=3,
        )
    return prefix


# --- a warning that saves hours ------------------------------------------------------------------

_warned: set[tuple[str, str]] = set()
_SHORT = 4  # characters; shorter texts are found in many a string that was not made of them


_SPACES: tuple[Any, ...] = (" ", [" "], (" ",))


def _warn_of_space_as_stop(name: str, text: Text) -> None:
    """Warn once a site of a stop that the first token already contains."""
    _warn_once(
        ("stop", name),
        f"site '{name}': stop=' ' has closed the text at its first token, {str(text)!r}: most tokens "
        "begin with the space before a word. For one of several words give choices=, for a word and "
        "what closes it a regex such as regex=r' [a-z]+[.,!?]'.",
    )


def _warn_of_retokenisation(name: str, prefix: str | Sequence[str]) -> None:
    """Warn once a site where a plain ``str`` makes the model see other tokens than were drawn."""
    parts = [prefix] if isinstance(prefix, str) else list(prefix)
    plain = [part for part in parts if not isinstance(part, Text)]
    if plain and parts[-1] is plain[-1] and plain[-1].endswith(" "):
        _warn_once(
            ("space", name),
            f"site '{name}': its prefix ends in a space. Most tokenizers attach a space to the "
            "word that follows, so the model has hardly seen such a prefix: end it before the space.",
        )
    if ("text", name) in _warned:
        return
    site = _latent_within(plain)
    if site is None:
        joined = [part for text in parts if isinstance(text, Text) for part in text.parts]
        site = _latent_within([part for part in joined if isinstance(part, str)])
        if ("chat", site) in _warned:  # ``chat`` has said so of this text
            return
    if site is not None:
        _warn_once(
            ("text", name),
            f"site '{name}': its prefix holds the text of site '{site}' as a plain str (an "
            "f-string or a str method makes one), which is tokenised anew, maybe into other "
            "tokens than were drawn. Pass a list, [before, z, after], to keep its tokens.",
        )


def _warn_once(key: tuple[str, str], message: str, stacklevel: int = 5) -> None:
    if key not in _warned:
        _warned.add(key)
        warnings.warn(message, stacklevel=stacklevel)


def _latent_within(strings: Sequence[str]) -> str | None:
    """The name of a latent site of this run whose text stands in one of some plain strings."""
    if all(len(string) < _SHORT for string in strings):
        return None
    for frame in _PYRO_STACK:
        for site, node in frame.trace.nodes.items() if isinstance(frame, TraceMessenger) else ():
            fn = node.get("fn")
            if not isinstance(fn, LMText) or node["is_observed"]:
                continue
            if node["infer"].get("was_observed"):  # data in the program, drawn in a simulation
                continue
            body = fn.text(node["value"]).body.strip() if node["value"].dim() == 1 else ""
            holding = [part for part in strings if len(body) >= _SHORT and body in part]
            # What stood in the site's own prefix was there before its text was drawn.
            earlier = fn.lm.vocabulary.decode(fn.prefix_ids) if holding else ""
            if any(part not in earlier for part in holding):
                return site
    return None
