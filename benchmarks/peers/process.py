"""A peer in a process of its own, with the python of its own environment.

It does one repetition for each line of its standard input, so that lmppl and the peer can be
measured in turns and never run at the same time. Requests and answers are JSON, a line each.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


class PeerError(RuntimeError):
    """What a peer raised on a request; it is ready for the next one."""


class PeerProcess:
    """A running peer; a context manager.

    Args:
        command: what starts it.

    Attributes:
        hello: its first line, when it is ready.

    Raises:
        RuntimeError: it ended; with the last lines of its standard error.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (see close)
        # Nothing of this environment: the peer's packages are of other versions.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            self.hello = self._read()
        except BaseException:
            self.close()
            raise

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer. ``PeerError``: it raised an error of its own."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # then it has ended; reading says why
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            tail = "".join(self._errors.readlines()[-15:])
            raise RuntimeError(f"the peer {self._process.args!r} has ended:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # it may have ended before it read all
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


@dataclass
class PeerContender:
    """A peer's repetitions, as a contender of ``measuring.in_turns``.

    The peer answers with its own ``seconds``, ``tokens`` and (where ``peak`` is asked for)
    ``peak_bytes``.

    Args:
        peer: the process.
        requests: the request of each repetition, by its number.
    """

    peer: PeerProcess
    requests: Callable[[int], dict[str, Any]]

    def warm_up(self) -> int | None:
        peak = self.peer.ask(**self.requests(0), peak=True)["peak_bytes"]
        return None if peak is None else int(peak)

    def repeat(self, number: int) -> tuple[float, int]:
        answer = self.peer.ask(**self.requests(number), peak=False)
        return float(answer["seconds"]), int(answer["tokens"])
