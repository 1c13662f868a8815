"""``halfbyte demo`` from the outside, on the real model: it works, and it fails where 4-bit products are wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.cli import demo

PLANTED = """
import sys, torch
from halfbyte import backends
from halfbyte.cli.main import main

backends.register(backends.Backend("wrong", frozenset(), 1000, "sys"))

@backends.implements("wrong", "gemm_4bit")
def gemm_4bit(A, B, shapeB, *rest, **named):
    return torch.randn(*A.shape[:-1], shapeB[0]).to(A)

sys.exit(main(sys.argv[1:]))
"""


def run(code: str, model: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, "demo", "--model", str(model), "--windows", "1", "--tokens", "8"]
    environment = {**os.environ, "COLUMNS": "80", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=800)


@pytest.mark.model
@pytest.mark.slow
def test_the_demo_shows_receipt_answers_and_figures_of_both(smollm2_dir: Path, sotu_text: str) -> None:
    done = run("import sys; from halfbyte.cli.main import main; sys.exit(main(sys.argv[1:]))", smollm2_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "106.2 M of 134.5 M weights (78.9%)" in done.stdout
    for row in ("weights", "load", "generate", "perplexity (1 x 512 tokens)", "answer", "Paris"):
        assert row in done.stdout
    assert "The 4-bit model works" in done.stdout.splitlines()[-2] + done.stdout.splitlines()[-1]


@pytest.mark.model
@pytest.mark.slow
def test_wrong_products_make_the_demo_fail(smollm2_dir: Path, sotu_text: str) -> None:
    done = run(PLANTED, smollm2_dir)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN: its perplexity is" in done.stderr


def test_perplexity_that_is_no_number_counts_as_broken() -> None:
    reason = demo.broken(20.0, float("nan"), "Paris", 0.8)
    assert reason is not None
    assert "perplexity" in reason


def test_an_answer_without_words_counts_as_broken() -> None:
    assert demo.broken(20.0, 21.0, "!!!", 0.8) == "its answer is '!!!'"


def test_nothing_quantized_counts_as_broken() -> None:
    assert demo.broken(20.0, 20.0, "Paris", 0.0) == "no weight is quantized"
