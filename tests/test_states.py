"""Files that are there whole or not at all."""

from __future__ import annotations

import pytest

from lmppl.states import write_text


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "folder" / "file"
    write_text(path, "old ü")
    with pytest.raises(TypeError):
        write_text(path, None)
    assert path.read_text(encoding="utf-8") == "old ü" and list(path.parent.iterdir()) == [path]
