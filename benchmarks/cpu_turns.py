"""Processes that take turns: each contestant keeps its own threads, which would otherwise wait on the others' cores.

bitsandbytes brings an OpenMP runtime of its own. In one process with torch's, threads of the one wait busily for some
milliseconds after a call while the other computes: on two cores a product that follows runs on one of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

__all__ = ["Peer", "add_arguments", "answer", "environment", "rest"]

REST = 0.04
"""Seconds until threads that wait busily have gone to sleep (libgomp: about 16 ms on Sapphire Rapids)."""


def rest() -> None:
    """Let the threads of the process that was on its turn go to sleep."""
    time.sleep(REST)


class Peer:
    """A process that answers words on its standard input with lines of JSON (:func:`answer`).

    Args:
        name: What it is called in messages.
        words: Its command line.
        variables: Its environment.
    """

    def __init__(self, name: str, words: Sequence[str], variables: dict[str, str]) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process lives
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=variables
        )

    def ask(self, word: str) -> dict[str, Any]:
        """Send a word, wait for the answer; ``""`` only waits.

        Raises:
            RuntimeError: It ended; with what it last said.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if word:
            self._process.stdin.write(word + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("FOUND "):
                return json.loads(line.removeprefix("FOUND "))
        self._log.seek(0)
        raise RuntimeError(f"{self.name} stopped\n{self._log.read()[-1500:]}")

    def close(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def answer(child: Any) -> None:
    """Serve a :class:`Peer`'s words: ``"name a b"`` is ``child.name("a", "b")``, which returns a dictionary."""
    print("FOUND {}", flush=True)
    for line in sys.stdin:
        name, *arguments = line.split()
        print("FOUND " + json.dumps(getattr(child, name)(*arguments)), flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How bitsandbytes is found."""
    parser.add_argument("--peer", help="interpreter that has bitsandbytes; left out without --peer-path: no comparison")
    parser.add_argument("--peer-path", help="folder that has bitsandbytes, for this interpreter")


def environment(args: argparse.Namespace, *, foreign: bool) -> dict[str, str]:
    """Environment of a process; ``foreign`` with bitsandbytes."""
    variables = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    if foreign and args.peer_path:
        variables["PYTHONPATH"] = f"{args.peer_path}{os.pathsep}{variables.get('PYTHONPATH', '')}"
    return variables
