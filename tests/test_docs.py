"""The documentation's snippets run, and print what the pages say they print.

On the pages listed below, the ``python`` blocks are run in order in one namespace a page. A block
that is followed by a ``text`` block must print that (numbers may differ a little, seconds and rates
freely), any other must print nothing. One that is followed by a picture must have made the matplotlib
figure ``figure``. After a change of the pages or of lmppl,

    python tests/test_docs.py docs/programs.md

writes the outputs and the pictures anew.
"""

from __future__ import annotations

import io
import math
import os
import re
import sys
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import matplotlib
import pyro
import pytest

import lmppl.primitives

DOCS = Path(__file__).parent.parent / "docs"
# Tolerances of numbers: training ends a little elsewhere on every machine.
PAGES = {
    "quickstart.md": 0.15,
    "programs.md": 0.05,
    "constraints.md": 0.05,
    "engines.md": 0.1,
    "posteriors.md": 0.05,
    "guides.md": 0.3,
    "training.md": 0.3,
    "diagnostics.md": 0.1,
    "tutorials/first_program.md": 0.05,
    "tutorials/conditioning.md": 0.05,
    "tutorials/one_argument.md": 0.3,
    "tutorials/constraints.md": 0.1,
    "tutorials/guide_programs.md": 0.2,
    "tutorials/amortizing.md": 0.2,
    "tutorials/tools_and_control_flow.md": 0.1,
    "tutorials/latent_rationales.md": 0.1,
    "tutorials/statistics_and_text.md": 0.1,
    "tutorials/diagnostics.md": 0.1,
    "tutorials/mini_lmppl.md": 0.3,
    "how-to/chat_models.md": 0.05,
    "how-to/checkpoints.md": 0.05,
    "how-to/from_pyro.md": 0.1,
    "how-to/from_transformers.md": 0.05,
    "how-to/gpu_and_memory.md": 0.05,
    "how-to/many_inputs.md": 0.05,
    "how-to/many_machines.md": 0.1,
    "how-to/new_engine.md": 0.1,
    "how-to/one_word.md": 0.15,
    "how-to/own_model.md": 0.05,
    "how-to/serve_a_guide.md": 0.3,
    "how-to/test_your_program.md": 0.1,
    "explanation/densities.md": 0.05,
    "explanation/particles.md": 0.05,
    "explanation/rewards.md": 0.1,
    "explanation/weights.md": 0.2,
}
# Pages that train guides or run every engine take half a minute and more. All tutorials but these two,
# and four other pages, run with the long tests.
_USUAL = ("tutorials/first_program.md", "tutorials/conditioning.md")
_LONG = ("engines.md", "guides.md", "training.md", "how-to/many_machines.md")  # the last starts Ray

BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?"
    r"(?:\n!\[[^\]]*\]\((?P<picture>[^)\n]+)\)\n)?",
    re.S | re.M,
)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def run(page: Path, *, draw: bool = False) -> list[tuple[re.Match[str], str]]:
    """The blocks of a page, each with what it printed; ``draw``: write its pictures."""
    lmppl.primitives._warned.clear()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    namespace: dict[str, object] = {"__name__": "__main__"}
    results = []
    text = page.read_text()
    with warnings.catch_warnings():  # a page may say what it does not want to hear
        # peft 0.21 asks transformers for a property under the name it had before.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        # Ray Data warns of settings that it makes itself.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"ray\.")
        for block in BLOCK.finditer(text):
            line = text[: block.start("code")].count("\n")
            code = compile("\n" * line + block["code"], str(page), "exec", dont_inherit=True)
            printed = io.StringIO()
            # Tables are as wide as the terminal.
            with redirect_stdout(printed), patch.dict(os.environ, COLUMNS="100"):
                exec(code, namespace)
            if block["picture"]:
                figure: Any = namespace.pop("figure")  # KeyError: the block has made none
                _draw(figure, page.parent / block["picture"] if draw else io.BytesIO())
            results.append(
                (block, "".join(f"{each.rstrip()}\n" for each in printed.getvalue().splitlines()))
            )
    return results


def _draw(figure: Any, file: Path | io.BytesIO) -> None:
    with matplotlib.rc_context({"svg.hashsalt": "lmppl", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", facecolor="white", metadata={"Date": None})


def untimed(text: str) -> str:
    """Without seconds, and without a table's columns of rates (of something a second) and of shares of
    the time."""
    lines = text.splitlines()
    at = next((i for i, line in enumerate(lines) if "/s" in line), len(lines))
    columns = re.finditer(r"\S+/s\b|\bshare\b|\broofline\b", "".join(lines[at : at + 1]))
    for end in sorted((column.end() for column in columns), reverse=True):
        lines[at:] = [re.sub(r"[\d.,]+%?$", "", line[:end]) + line[end:] for line in lines[at:]]
    text = re.sub(r"^time: .*", "time", "\n".join(lines), flags=re.M)
    return re.sub(r"[\d.]+ s\b", "s", text)


def agree(expected: str, printed: str, tolerance: float) -> bool:
    """Equal but for seconds, bars and small differences of numbers."""
    sides = [re.sub(r"[█▏▎▍▌▋▊▉ ─]+", " ", untimed(each)) for each in (expected, printed)]
    numbers = [[float(number) for number in NUMBER.findall(each)] for each in sides]
    words = [NUMBER.sub("#", each) for each in sides]
    return words[0] == words[1] and all(
        math.isclose(a, b, rel_tol=tolerance, abs_tol=0.2 * tolerance)
        for a, b in zip(*numbers, strict=True)
    )


def _marked(page: str) -> Any:
    """Most tutorials take half a minute each; the first two run with the usual tests."""
    is_long = page in _LONG or (page.startswith("tutorials/") and page not in _USUAL)
    return pytest.param(page, marks=pytest.mark.long if is_long else pytest.mark.slow)


@pytest.mark.parametrize("page", [_marked(page) for page in PAGES])
def test_snippets_print_what_the_page_says(page):
    lasting = list(lmppl.primitives._lasting)
    token = lmppl.primitives._default_lm.set(None)
    try:
        for block, printed in run(DOCS / page):
            assert agree(block["output"] or "", printed, PAGES[page]), (
                f"{block['code']}\nprints\n{printed}"
            )
    finally:  # the pages say lmppl.use(lm), and may have started Ray
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()
        lmppl.primitives._default_lm.reset(token)
        lmppl.primitives._lasting[:] = lasting


@pytest.mark.slow
@pytest.mark.parametrize("page", ["index.md", "how-to/many_gpus.md"])
def test_other_snippets_run(page):
    """With few samples and steps: what they print is of a processor, or takes minutes."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        # Ray Data warns of settings that it makes itself.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"ray\.")
        blocks = list(BLOCK.finditer((DOCS / page).read_text()))
        for block in blocks:
            code = re.sub(r"\bnum_samples=\d+", "num_samples=4", block["code"])
            code = re.sub(r"\bsteps=\d+", "steps=1", code)
            code = re.sub(r"\bbatch_size=\d+", "batch_size=2", code)
            with redirect_stdout(io.StringIO()):
                exec(compile(code, page, "exec", dont_inherit=True), namespace)
    assert blocks


def write(page: Path) -> None:
    """Replace the outputs on a page by real ones."""
    text, parts, at = page.read_text(), [], 0
    for block, printed in run(page, draw=True):
        output = f"\n```text\n{printed}```\n" if printed else ""
        picture = block[0][block[0].rindex("\n![") :] if block["picture"] else ""
        parts += [text[at : block.start()], f"```python\n{block['code']}```\n{output}{picture}"]
        at = block.end()
    page.write_text("".join([*parts, text[at:]]))


if __name__ == "__main__":
    warnings.simplefilter("error")
    for name in sys.argv[1:]:
        write(Path(name))
