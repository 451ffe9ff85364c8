"""Messages say which process of a run they are from."""

from __future__ import annotations

import socket

import pytest

import lmppl
from lmppl.processes import naming_this_process, this_process


def test_a_process_alone_has_no_name(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert this_process() == ""
    with pytest.raises(ValueError, match="wrong") as caught, naming_this_process():
        raise ValueError("wrong")
    assert not hasattr(caught.value, "__notes__")


def test_one_of_several_is_named_once(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert this_process() == f"rank 1 of 4 (machine {socket.gethostname()})"
    inner, outer = naming_this_process("it needs this"), naming_this_process()
    with pytest.raises(ValueError, match="wrong") as caught, outer, inner:
        raise ValueError("wrong")
    assert caught.value.__notes__ == [f"raised in {this_process()}; it needs this"]


def test_a_model_that_one_machine_does_not_have(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match="nowhere") as caught:
        lmppl.LM.from_pretrained(tmp_path / "nowhere")
    (note,) = caught.value.__notes__
    assert (
        note
        == f"raised in {this_process()}; every machine of a run needs the model under this name"
    )
