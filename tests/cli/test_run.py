"""``halfbyte run`` differs from ``python`` in one thing only: bitsandbytes is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.python import python

SCRIPT = """\
import pickle, sys

class Thing:
    pass

def fail():
    return 1 / 0

print(sys.argv, sys.path[0], __name__, __file__, __package__, __spec__, type(__loader__).__name__)
print(type(pickle.loads(pickle.dumps(Thing()))), sys.modules["__main__"].Thing is Thing)
if sys.argv[1:] == ["error"]:
    fail()
if sys.argv[1:2] == ["exit"]:
    sys.exit(int(sys.argv[2]) if sys.argv[2].isdigit() else sys.argv[2])
"""

CASES = [
    ["script.py", "one", "--two", "-m"],
    ["folder/../script.py"],
    ["script.py", "error"],
    ["script.py", "exit", "7"],
    ["script.py", "exit", "goodbye"],
    ["script.py", "exit", "0"],
    ["-m", "package", "one"],
    ["-m", "package.module", "--flag"],
    ["broken.py"],
    ["interrupted.py"],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    for name in ("script.py", "package/__main__.py", "package/module.py", "folder/__main__.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(SCRIPT)
    (folder / "package" / "__init__.py").touch()
    (folder / "broken.py").write_text("x = (\n")
    (folder / "interrupted.py").write_text("raise SystemExit\n")
    (folder / "asks.py").write_text("import bitsandbytes, sys; print(bitsandbytes.__version__, 'torch' in sys.modules)")
    return folder


def without_addresses(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+", "0x", text)


@pytest.mark.parametrize("words", CASES, ids=" ".join)
def test_output_traceback_and_exit_code_are_those_of_python(folder: Path, words: list[str]) -> None:
    plain = python(words, cwd=folder)
    ours = python(["-m", "halfbyte", "run", *words], cwd=folder)
    assert ours.returncode == plain.returncode
    assert without_addresses(ours.stdout) == without_addresses(plain.stdout)
    assert ours.stderr == plain.stderr


def test_a_traceback_from_a_module_starts_at_the_module(folder: Path) -> None:
    done = python(["-m", "halfbyte", "run", "-m", "package.module", "error"], cwd=folder)
    assert done.returncode == 1
    assert done.stderr.splitlines()[1].strip() == f'File "{folder / "package" / "module.py"}", line 12, in <module>'


def test_a_folder_with_a_main_runs(folder: Path) -> None:
    plain = python(["folder", "exit", "3"], cwd=folder)
    ours = python(["-m", "halfbyte", "run", "folder", "exit", "3"], cwd=folder)
    assert plain.returncode == ours.returncode == 3
    assert f" {folder / 'folder'} __main__ " in ours.stdout


def test_a_safe_path_stays_without_the_scripts_folder(folder: Path) -> None:
    code = "import sys; print(sys.path)"
    (folder / "path.py").write_text(code)
    variables = {"PYTHONSAFEPATH": "1"}
    plain = python(["path.py"], cwd=folder, **variables)
    assert python(["-m", "halfbyte", "run", "path.py"], cwd=folder, **variables).stdout == plain.stdout


def test_the_script_finds_halfbyte_as_bitsandbytes_without_loading_torch(folder: Path) -> None:
    assert python(["-m", "halfbyte", "run", "asks.py"], cwd=folder).stdout == "0.50.2+halfbyte False\n"


def test_a_missing_script_is_one_line_and_a_hint(folder: Path) -> None:
    done = python(["-m", "halfbyte", "run", "train.py"], cwd=folder)
    assert done.returncode == 2
    assert done.stderr == "halfbyte run: there is no file train.py\nhint: for a module: `halfbyte run -m train.py`\n"


def test_a_missing_module_is_one_line(folder: Path) -> None:
    done = python(["-m", "halfbyte", "run", "-m", "no_such_module"], cwd=folder)
    assert (done.returncode, done.stderr) == (1, "halfbyte run: No module named no_such_module\n")


@pytest.mark.parametrize("words", [[], ["-m"], ["--unknown", "script.py"]], ids=str)
def test_a_wrong_command_line_shows_the_usage(folder: Path, words: list[str]) -> None:
    done = python(["-m", "halfbyte", "run", *words], cwd=folder)
    assert done.returncode == 2
    assert "usage: halfbyte run" in done.stderr
