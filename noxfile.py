"""What a change is checked with: lint, types, tests; gpu and docs by name. Uses the environment it runs in."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.error_on_missing_interpreters = True

SCRIPTS = Path(sys.executable).parent


def _tool(session: nox.Session, name: str, *arguments: str, **options: object) -> None:
    session.run(str(SCRIPTS / name), *arguments, external=True, **options)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, rules and the layer contracts."""
    _tool(session, "ruff", "format", "--check", ".")
    _tool(session, "ruff", "check", ".")
    _tool(session, "lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """pyright, strict."""
    path = os.pathsep.join([str(SCRIPTS), os.environ.get("PATH", "")])
    _tool(session, "pyright", env={"PATH": path})


@nox.session
def tests(session: nox.Session) -> None:
    """All tests and doctests, as many at a time as there are cores."""
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    session.run(sys.executable, "-m", "pytest", "-n", "auto", "--dist", "loadgroup", *session.posargs, env=threads)


@nox.session
def gpu(session: nox.Session) -> None:
    """The tests that need a GPU; says what was skipped and why."""
    session.run(sys.executable, "-m", "pytest", "-m", "gpu", "-rs", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation as HTML in docs/_build."""
    session.run(sys.executable, "-m", "sphinx", "-W", "-b", "html", "docs", "docs/_build")
