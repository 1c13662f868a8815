"""A backend that returns slightly wrong values is caught by the numbers, and named by taking it away."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.environments import Environment, add_distribution, make_environment

BACKEND = """
from halfbyte.backends import Backend, register


def add():
    register(Backend("planted", frozenset({"cpu"}), 1000, __name__ + "_ops"))
"""
OPS = """
from halfbyte.backends import implements
from halfbyte.backends.reference import four_bit


@implements("planted", "gemm_4bit")
def gemm_4bit(*arguments, **named):
    return four_bit.gemm_4bit(*arguments, **named) * FACTOR
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return make_environment(tmp_path_factory.mktemp("planted"), real_torch=True)


def plant(folder: Path, factor: float) -> str:
    folder.mkdir()
    (folder / "planted_backend.py").write_text(BACKEND)
    (folder / "planted_backend_ops.py").write_text(OPS.replace("FACTOR", str(factor)))
    add_distribution(folder, "planted", "1.0", entry_points="[halfbyte.backends]\nplanted = planted_backend:add\n")
    return str(folder)


def test_a_product_wrong_by_one_percent_fails(environment: Environment, tmp_path: Path):
    run = environment.run("--only", "NUM105", PYTHONPATH=plant(tmp_path / "planted", 1.01))
    check = run.check("NUM105")
    assert (run.code, check["status"], check["classes"]) == (2, "fail", ["B9"])
    wrong = [each for each in check["measurements"] if not each["ok"]]
    assert all(0.009 < each["value"] < 0.011 for each in wrong)
    assert "wrong numbers on cpu" in run.json["verdict"]
    assert "unset PYTHONPATH" in [fix["command"] for fix in check["fixes"]]


def test_the_same_backend_with_right_values_passes(environment: Environment, tmp_path: Path):
    run = environment.run("--only", "NUM105", PYTHONPATH=plant(tmp_path / "planted", 1.0))
    check = run.check("NUM105")
    assert check["status"] == "pass"
    assert any("computed by planted" in line for line in check["evidence"])
