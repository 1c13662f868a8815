"""``explain`` names the right failure class first, for a bare message, inside a log, and before its consequences."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from halfbyte.doctor import catalogue
from halfbyte.doctor.explain import LIMIT, explain, is_code
from halfbyte.doctor.fixes import TOOLS

TEXTS = Path(__file__).parent / "texts"
EXACT: dict[str, list[str]] = json.loads((TEXTS / "exact.json").read_text(encoding="utf-8"))
PAIRS = [(name, text) for name, texts in EXACT.items() for text in texts]
FRAMES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((TEXTS / "frames").glob("*.txt"))}

each_text = pytest.mark.parametrize(("name", "text"), PAIRS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(PAIRS)])


def names(text: str) -> list[str]:
    return [match.entry.id for match in explain(text)]


def logs(folder: str) -> list[Path]:
    return sorted((TEXTS / folder).glob("*.txt"))


def outranked(name: str, frame: str) -> bool:
    """Whether the frame's own messages are rightly named before this class."""
    entry = catalogue.get(name)
    own = [catalogue.get(other) for other in names(frame.replace("{text}", ""))]
    if set(entry.follows) & {other.id for other in own}:
        return True
    if entry.kind == "notice":
        return any(other.kind != "notice" for other in own)
    return entry.kind == "symptom" and any(other.kind == "cause" for other in own)


@each_text
def test_an_exact_text_is_named(name: str, text: str):
    assert names(text)[0] == name


@pytest.mark.parametrize("frame", FRAMES)
@each_text
def test_a_text_inside_a_log_is_named_first(name: str, text: str, frame: str):
    if outranked(name, FRAMES[frame]):
        assert name in names(FRAMES[frame].replace("{text}", text))
    else:
        assert names(FRAMES[frame].replace("{text}", text))[0] == name


def test_every_text_is_first_in_at_least_two_frames():
    for name in EXACT:
        assert sum(not outranked(name, frame) for frame in FRAMES.values()) >= 2, name


def test_the_frames_end_in_misleading_messages():
    assert {"D6", "E1", "C4"} <= set(names(FRAMES["loading"]))
    assert {"A3", "D9"} <= set(names(FRAMES["torchrun"]))


@pytest.mark.parametrize("path", logs("whole"), ids=lambda path: path.stem)
def test_a_whole_log_has_its_root_cause_first(path: Path):
    assert names(path.read_text(encoding="utf-8"))[0] == path.stem.split("_")[0]


@pytest.mark.parametrize("path", logs("healthy") + logs("unknown"), ids=lambda path: path.stem)
def test_nothing_is_found_where_nothing_is_known(path: Path):
    assert names(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("name", ["A2", "A4", "A9", "A12", "B1", "B3", "C4", "D1", "E3", "E7", "E8"])
def test_a_sentence_broken_anywhere_by_the_terminal_is_named(name: str):
    for text in EXACT[name]:
        assert names(text.replace(" ", "\n\u2502   "))[0] == name


def test_a_cause_that_stands_after_its_consequence_is_named_first():
    assert names("0 active drivers ([])\nThe NVIDIA driver on your system is too old") == ["A2", "D6"]


def test_of_two_causes_the_first_in_the_text_is_named_first():
    first, second = EXACT["D2"][0], EXACT["C9"][0]
    assert names(f"{first}\n{second}") == ["D2", "C9"]
    assert names(f"{second}\n{first}") == ["C9", "D2"]


def test_a_mere_symptom_comes_after_any_cause():
    assert names(f"{EXACT['C4'][0]}\n{EXACT['D2'][0]}") == ["D2", "C4"]


def test_a_harmless_notice_comes_last():
    assert names(f"{EXACT['E9'][0]}\n{EXACT['E1'][1]}") == ["E1", "E9"]


def test_a_match_says_what_it_follows_from():
    matches = explain("The NVIDIA driver on your system is too old\n0 active drivers ([])")
    assert [match.behind for match in matches] == [(), ("A2",)]


def test_line_and_excerpt_point_into_the_text():
    match = explain("one\ntwo\n  RuntimeError: 0 active drivers ([]). There should only be one.\nfour")[0]
    assert (match.line, match.excerpt) == (3, "RuntimeError: 0 active drivers ([]). There should only be one.")


def test_colour_codes_do_not_hide_a_text():
    assert names("\x1b[31mTorch not compiled \x1b[1mwith CUDA enabled\x1b[0m") == ["A1"]


def test_colour_codes_of_a_notebooks_file_do_not_hide_a_text():
    assert names(r"\u001b[0;31mTorch not compiled \u001b[38;5;241mwith CUDA enabled\u001b[0m\n") == ["A1"]


def test_the_number_of_a_driver_message_is_read_and_answered():
    match = explain(EXACT["A2"][1])[0]
    assert "12.4" in match.note
    assert match.remedies[0].fix("pip").command == (
        'python -m pip install --force-reinstall "torch==2.14.*" --index-url https://download.pytorch.org/whl/cu126'
    )


@pytest.mark.parametrize(
    ("text", "requirement", "index"),
    [
        (
            "GeForce GTX 1080 with CUDA capability sm_61 is not compatible with the current PyTorch installation",
            "torch==2.14.*",
            "cu126",
        ),
        (
            "Tesla V100 which is of cuda capability 7.0. Minimum and Maximum cuda capability supported",
            "torch==2.14.*",
            "cu126",
        ),
        (
            "GB10 with CUDA capability sm_121 is not compatible with the current PyTorch installation",
            "torch==2.14.*",
            "cu130",
        ),
    ],
)
def test_the_gpu_in_a_message_decides_the_torch_build(text: str, requirement: str, index: str):
    remedy = explain(text)[0].remedies[0]
    assert remedy.install == requirement
    assert remedy.index_url.endswith(f"/{index}")


def test_a_gpu_that_no_build_serves_is_told_so():
    match = explain("Tesla K80 with CUDA capability sm_37 is not compatible with the current PyTorch installation")[0]
    assert "no torch build" in match.note


@pytest.mark.parametrize(
    ("digits", "requirement"),
    [("129", "bitsandbytes>=0.46.1"), ("130", "bitsandbytes>=0.48.0"), ("132", "bitsandbytes>=0.50.0")],
)
def test_the_binary_in_a_message_decides_the_bitsandbytes_version(digits: str, requirement: str):
    text = f"Configured CUDA binary not found at /x/libbitsandbytes_cuda{digits}.so"
    assert explain(text)[0].remedies[0].install == requirement


def test_a_binary_that_no_version_has_is_told_so():
    match = explain("No compatible CUDA binary found at /x/libbitsandbytes_cuda140.so")[0]
    assert "no bitsandbytes known here" in match.note
    assert match.remedies[0].install == ""


def test_the_numpy_limit_in_a_message_decides_the_version():
    assert explain("ImportError: Numba needs NumPy 2.2 or less. Got NumPy 2.3.")[0].remedies[0].install == "numpy<2.3"


def test_both_ends_of_an_enormous_log_are_read():
    noise = "step 1: loss 0.5\n" * (2 * LIMIT // 17)
    assert names(EXACT["D2"][0] + "\n" + noise + EXACT["C9"][0]) == ["D2", "C9"]


def test_an_empty_text_is_unknown():
    assert explain("") == ()


@pytest.mark.parametrize("tool", TOOLS)
def test_every_answer_has_a_command_for_every_installer(tool):
    for name, text in PAIRS:
        fixes = [remedy.fix(tool) for remedy in explain(text)[0].remedies]
        assert any(fix.command for fix in fixes), name


@pytest.mark.parametrize(
    ("text", "answer"), [("B12", True), ("triton101", True), ("A", False), ("A2 B3", False), ("log.txt", False)]
)
def test_a_code_is_told_from_a_text(text: str, answer: bool):
    assert is_code(text) is answer
