"""``make docs`` builds the site, and fails on what is wrong in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def make_docs(folder: Path) -> subprocess.CompletedProcess[str]:
    """``make docs`` in a copy of the repository, in the environment that runs this test."""
    environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    command = ["make", "docs", "--old-file=setup", f"BIN={Path(sys.executable).parent}"]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """What ``make docs`` reads."""
    for name in ("docs", "lmppl"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "mkdocs.yml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# Not the page of results, which shows programs as they stand in examples/.
PAGES = sorted({str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} - {"results.md"})


@pytest.mark.parametrize("name", PAGES)
def test_code_fits_its_column_and_can_be_copied(name):
    page = (DOCS / name).read_text()
    blocks = re.findall(r"^```(?:python|bash|console)\n(.*?)^```$", page, re.S | re.M)
    lines = "".join(blocks).splitlines()
    assert not [line for line in lines if len(line) > 80 or line.startswith("$ ")]


def is_excerpt(code, source):
    """Whether lines stand in a file as they are, at any depth."""
    return any(textwrap.indent(code, depth * " ") in source for depth in (0, 4, 8, 12))


def test_excerpts_are_verbatim():
    page = (DOCS / "tutorials/mini_lmppl.md").read_text()
    source = (ROOT / "examples/mini_lmppl.py").read_text()
    excerpts = re.findall(r"^```py\n(.*?)^```$", page, re.S | re.M)
    assert len(excerpts) > 5
    assert not [code for code in excerpts if not is_excerpt(code, source)]
    assert not is_excerpt(excerpts[0].replace("closes", "ends"), source)


@pytest.mark.slow
def test_the_site_can_be_read_from_disk(repository):
    built = make_docs(repository)
    assert built.returncode == 0, built.stderr
    site = repository / "site"
    assert (site / "search/search_index.js").is_file()
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|iframe)\b[^>]*\bsrc=[\"']?([^\"' >]*)"
            r"|<link\b[^>]*\brel=[\"']?stylesheet[^>]*\bhref=[\"']?([^\"' >]*)",
            page.read_text(),
        )
        assert loaded
        assert not [url for url in map("".join, loaded) if "//" in url], page.name
    page = (site / "engines.html").read_text()
    assert '<math display="block">' in page and "arithmatex" not in page
    assert 'sentences"><pre><span></span><code>all 10 samples have probability zero' in page
    assert 'sentences"><pre><span></span><code>exact       log evidence' not in page
    for page in sorted(DOCS.glob("tutorials/*.md")):
        shown = (site / "tutorials" / f"{page.stem}.html").read_text()
        assert page.stem == "index" or f'href="{page.stem}.ipynb" download' in shown
        assert page.stem == "index" or (site / "tutorials" / f"{page.stem}.ipynb").is_file()
    overview = (site / "tutorials/index.html").read_text()
    assert overview.count('<img alt="') >= 3 and 'href="mini_lmppl.html"' in overview
    overview = (site / "reference/index.html").read_text()
    assert 'href="inference.html#lmppl.infer"' in overview and "<!-- names -->" not in overview
    assert "x |p(x) - q(x)|</code>" in overview  # total_variation
    assert 'href="../index.html" title="lmppl"' in overview
    page = (site / "tutorials/conditioning.html").read_text()
    assert '<p class="picture"><a href="../images/tutorials/conditioning.svg"><img ' in page
    page = (site / "reference/inference.html").read_text()
    yields = page.split("Yields:", 1)[1].split("</ul>", 1)[0]
    assert yields.count("<li") == 1, "what infer_batch yields is one item, of several lines"
    page = (site / "reference/posteriors.html").read_text()
    assert 'id="lmppl.Posterior.__getitem__"' in page and "__deepcopy__" not in page


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "old", "new", "warning"),
    [
        pytest.param(
            "docs/index.md", "(quickstart.md)", "(quickstrat.md)", "'quickstrat.md'", id="link"
        ),
        pytest.param(
            "docs/index.md", "(engines.md)", "(engines.md#smcc)", "'engines.md#smcc'", id="anchor"
        ),
        pytest.param(
            "docs/index.md", "(quickstart.md)", "(#results-are)", "'#results-are'", id="own-anchor"
        ),
        pytest.param(
            "lmppl/engines/dispatch.py",
            "        num_samples: ",
            "        num_sample: ",
            "Parameter 'num_sample' does not appear in the function signature",
            id="docstring",
        ),
        pytest.param("docs/engines.md", r"\hat Z", r"\hatt Z", r"\hatt", id="formula"),
        pytest.param(
            "docs/reference/inference.md",
            "::: lmppl.infer\n",
            "::: lmppl.infr\n",
            "lmppl.infr",
            id="name",
        ),
    ],
)
def test_a_mistake_fails_the_build(repository, file, old, new, warning):
    replace(repository / file, old, new)
    built = make_docs(repository)
    assert built.returncode != 0
    assert warning in built.stderr
