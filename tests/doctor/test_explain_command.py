"""``halfbyte explain`` from the outside: what it reads, prints and returns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.doctor import catalogue

TEXTS = Path(__file__).parent / "texts"
DRIVER = "RuntimeError: The NVIDIA driver on your system is too old (found version 12040)."


def run(
    *words: str, given: str | bytes = b"", environ: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, since it reads standard input."""
    done = subprocess.run(
        [sys.executable, "-m", "halfbyte", "explain", *words],
        input=given.encode() if isinstance(given, str) else given,
        capture_output=True,
        env={**os.environ, "COLUMNS": "80", **(environ or {})},
        check=False,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_a_file_is_explained(tmp_path: Path):
    path = tmp_path / "error.log"
    path.write_text(f"one\n{DRIVER}\n", encoding="utf-8")
    done = run(str(path))
    assert done.returncode == 0
    assert done.stdout.startswith("A2  Driver too old")
    assert "line 2: RuntimeError: The NVIDIA driver" in done.stdout
    assert "CUDA up to 12.4" in " ".join(done.stdout.split())


@pytest.mark.parametrize("words", [(), ("-",)])
def test_standard_input_is_explained(words: tuple[str, ...]):
    done = run(*words, given=DRIVER)
    assert done.returncode == 0
    assert done.stdout.startswith("A2  ")


def test_a_text_on_the_command_line_is_explained():
    assert run("Torch not compiled with CUDA enabled").stdout.startswith("A1  ")


def test_a_log_of_powershell_is_read():
    assert run("-", given=DRIVER.encode("utf-16")).stdout.startswith("A2  ")


def test_bytes_that_are_no_text_do_not_stop_it():
    assert run("-", given=b"\xff\x00\xfe " + DRIVER.encode()).stdout.startswith("A2  ")


def test_other_matches_are_named_with_what_they_follow_from():
    done = run("-", given=f"{DRIVER}\n0 active drivers ([])")
    assert "D6" in done.stdout
    assert "follows from A2" in " ".join(done.stdout.split())


def test_verbose_shows_every_match_in_full():
    done = run("-", "-v", given=f"{DRIVER}\n0 active drivers ([])")
    assert done.stdout.count("  cause:") == 2


@pytest.mark.parametrize("word", ["A2", "a2"])
def test_a_class_has_a_page(word: str):
    done = run(word)
    assert done.returncode == 0
    assert done.stdout.startswith("A2  ")
    assert "source: https://" in done.stdout


@pytest.mark.parametrize("word", ["GPU101", "gpu101"])
def test_a_check_has_a_page(word: str):
    done = run(word)
    assert done.returncode == 0
    assert done.stdout.startswith("GPU101  ")
    assert "How to fix" in done.stdout


def test_an_unknown_text_says_so_and_how_to_report():
    done = run("-", given="KeyError: 'model'")
    assert done.returncode == 1
    assert "Nothing is known" in done.stdout
    assert "python -m halfbyte --markdown" in done.stdout


@pytest.mark.parametrize("word", ["Z99", "GPU999"])
def test_an_unknown_code_says_where_the_known_ones_are(word: str):
    done = run(word)
    assert done.returncode == 1
    assert "--list" in done.stdout


@pytest.mark.parametrize("words", [("missing.log",), ("--no-such-option",), ("A2", "B1")])
def test_a_wrong_command_line_returns_2(words: tuple[str, ...]):
    done = run(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr


def test_help_returns_0():
    assert run("--help").returncode == 0


def test_the_list_has_every_class():
    done = run("--list")
    assert all(f"  {entry.id} " in done.stdout for entry in catalogue.CLASSES)


def test_json_has_match_place_and_commands():
    data = json.loads(run("-", "--json", "--tool", "uv", given=f"x\n{DRIVER}").stdout)
    first = data["matches"][0]
    assert (data["schema"], data["explained"]) == ("halfbyte.explain/1", True)
    assert (first["id"], first["kind"], first["seen"]["line"]) == ("A2", "cause", 2)
    assert first["fixes"][0]["command"].startswith("uv pip install --reinstall")


def test_json_of_an_unknown_text_is_empty():
    done = run("-", "--json", given="KeyError")
    assert done.returncode == 1
    assert json.loads(done.stdout) == {"schema": "halfbyte.explain/1", "explained": False, "matches": []}


def test_json_of_a_check_has_its_page_and_classes():
    data = json.loads(run("GPU101", "--json").stdout)
    assert data["check"]["code"] == "GPU101"
    assert [match["id"] for match in data["matches"]] == data["check"]["classes"]


@pytest.mark.parametrize("tool", ["pip", "uv", "uv-project", "conda", "poetry", "notebook", "system-pip"])
def test_commands_are_in_the_words_of_the_installer_asked_for(tool: str):
    from halfbyte.doctor.fixes import install_command

    assert install_command(tool, "bitsandbytes>=0.45.2", upgrade=True) in run("D10", "--tool", tool).stdout


def test_sentences_fit_80_columns():
    for name in ("A1", "C4", "D2", "E1", "G2"):
        lines = run(name).stdout.splitlines()
        sentences = [line for line in lines if not line.startswith("            ") and "https://" not in line]
        assert max(map(len, sentences)) <= 80


def test_what_is_shown_of_a_text_hides_home_and_secrets(tmp_path: Path):
    text = f"{tmp_path}/x.so: undefined symbol: __nvJitLinkCreate token=hf_abcdefghijklmnop"
    done = run("-", given=text, environ={"HOME": str(tmp_path), "MY_SECRET": "__nvJitLinkCreate"})
    assert done.stdout.startswith("C6  ")
    assert str(tmp_path) not in done.stdout
    assert "hf_abcdefghijklmnop" not in done.stdout
    assert "nvJitLinkCreate" not in done.stdout


def test_a_reader_that_stops_early_is_no_error():
    command = f"{sys.executable} -m halfbyte explain --list | head -1"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Is a GPU")
    assert done.stderr == ""


def test_it_explains_without_torch_rich_or_numpy(tmp_path: Path):
    for name in ("torch", "rich", "numpy", "numba", "triton", "psutil"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('broken')\n", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = run("-", given=DRIVER, environ={"PYTHONPATH": path})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("A2  ")
