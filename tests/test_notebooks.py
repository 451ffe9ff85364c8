"""Tutorials as notebooks: all of a page's code, in order, which runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import notebooks  # a script, and a hook of mkdocs

ROOT = Path(__file__).parent.parent
PAGES = notebooks.pages()
pytestmark = pytest.mark.filterwarnings("ignore")  # of zmq and asyncio, which run the kernel


def read(page):
    return nbformat.reads(notebooks.written(page), as_version=4)


def code_cells(made):
    """Those of the page: the first sets up the notebook."""
    first, *others = [cell for cell in made.cells if cell.cell_type == "code"]
    assert first.source == notebooks.SET_UP
    return others


def code_of(made):
    return [cell.source for cell in code_cells(made)]


def run(made):
    """Run all cells of a notebook, in a folder of the repository as the written ones are."""
    NotebookClient(made, timeout=300, kernel_name="python3").execute(cwd=str(ROOT / "docs"))
    return made


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_notebook_has_the_code_of_its_page_in_order(page):
    made, text = read(page), page.read_text()
    nbformat.validate(made)
    blocks = re.findall(r"^```python\n(.*?)\n```$", text, re.S | re.M)
    assert [source.removesuffix("\nfigure") for source in code_of(made)] == blocks
    pictures = re.findall(r"^!\[[^\]]*\]\(([^)]+)\)$", text, re.M)
    assert sum(source.endswith("\nfigure") for source in code_of(made)) == len(pictures) > 0
    told = "\n".join(cell.source for cell in made.cells if cell.cell_type == "markdown")
    assert not re.search(r"```(text|python)|!\[|\]\((?!https?:)", told)
    assert "matplotlib" in made.cells[0].source


def test_they_are_written_into_a_folder(tmp_path):
    files = notebooks.write(tmp_path / "new")
    assert [file.stem for file in files] == [page.stem for page in PAGES]
    assert [code_of(nbformat.read(file, as_version=4)) for file in files] == [
        code_of(read(page)) for page in PAGES
    ]


LITTLE = """# A page

*It opens.* See [another](page.md), and [a paper](https://arxiv.org/abs/2310.04363).

```python
import matplotlib.figure

figure = matplotlib.figure.Figure()
axis = figure.subplots()
print(2 + 2)
```

```text
5
```

![A picture](picture.svg)

```python
{}
```
"""


@pytest.mark.slow
def test_a_notebook_runs_and_shows_its_picture(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(LITTLE.format("done = True"))
    made = run(read(page))
    first, second = (cell.outputs for cell in code_cells(made))
    assert first[0].text == "4\n" and "image/png" in first[1].data and not second
    assert "*another*" in made.cells[0].source and "](https://arxiv" in made.cells[0].source
    page.write_text(LITTLE.format("assert False, 'as it should'"))
    with pytest.raises(CellExecutionError, match="as it should"):
        run(read(page))


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_notebook_runs(page):
    for cell in code_cells(run(read(page))):
        assert str(cell.outputs).count("image/png") == cell.source.endswith("\nfigure")
