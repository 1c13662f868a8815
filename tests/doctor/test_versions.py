"""The table of versions that belong together, and what is asked of it."""

from __future__ import annotations

import datetime
import json
import re
from importlib.resources import files

import pytest

from halfbyte.doctor import versions

TABLE = json.loads(files("halfbyte.doctor").joinpath("versions.json").read_text(encoding="utf-8"))
ROWS = [(name, row) for name, rows in TABLE.items() if name != "about" for row in rows]
COLUMNS = {
    "driver_floor": {"cuda_major", "driver"},
    "driver_branch": {"driver", "cuda"},
    "torch": {"torch", "pypi_cuda", "triton", "python", "arches_x86_64"},
    "bitsandbytes": {"bitsandbytes", "cuda", "rocm", "nearest"},
}


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_a_row_has_its_columns_a_source_and_a_day(name: str, row: dict):
    assert set(row) - {"arches_aarch64"} == COLUMNS[name] | {"source", "checked"}
    assert row["source"]
    datetime.date.fromisoformat(row["checked"])


@pytest.mark.parametrize(
    ("name", "key"), [("driver_branch", "driver"), ("torch", "torch"), ("bitsandbytes", "bitsandbytes")]
)
def test_rows_go_from_old_to_new(name: str, key: str):
    order = [versions.number(row[key], 3) for row in TABLE[name]]
    assert order == sorted(set(order))


def test_a_newer_driver_branch_knows_a_newer_cuda():
    order = [versions.number(row["cuda"]) for row in TABLE["driver_branch"]]
    assert order == sorted(set(order))


@pytest.mark.parametrize("row", TABLE["driver_branch"], ids=lambda row: row["driver"])
def test_every_branch_runs_the_cuda_that_it_knows(row: dict):
    assert versions.driver_runs(row["driver"], row["cuda"]) is True


@pytest.mark.parametrize("row", TABLE["torch"], ids=lambda row: row["torch"])
def test_the_package_index_default_is_one_of_the_wheels(row: dict):
    assert [wheel.default for wheel in versions.wheels_for(row["torch"])].count(True) == 1


@pytest.mark.parametrize("row", TABLE["torch"], ids=lambda row: row["torch"])
def test_every_wheel_has_architectures_and_a_known_driver(row: dict):
    for wheel in versions.wheels_for(row["torch"]):
        assert len(versions.arches(wheel.torch, wheel.cuda)) >= 6
        assert versions.driver_needed(wheel.cuda)
        assert re.fullmatch(r"https://download\.pytorch\.org/whl/cu1[123]\d", wheel.index_url)


@pytest.mark.parametrize(
    ("driver", "capability", "torch", "cuda"),
    [
        ("580.95.05", (9, 0), "2.15", "13.2"),
        ("580.95.05", (7, 5), "2.15", "13.2"),
        ("570.86.10", (9, 0), "2.14", "12.6"),
        ("570.86.10", (12, 0), "2.11", "12.8"),
        ("525.60.13", (8, 0), "2.14", "12.6"),
        ("610.43.02", (6, 1), "2.14", "12.6"),
        ("610.43.02", (7, 0), "2.14", "12.6"),
        (None, (12, 1), "2.15", "13.2"),
    ],
)
def test_driver_and_gpu_decide_the_newest_torch(driver: str | None, capability: tuple[int, int], torch: str, cuda: str):
    wheel = versions.newest_torch_for(driver=driver, capability=capability)
    assert (wheel.torch, wheel.cuda) == (torch, cuda)


@pytest.mark.parametrize(("driver", "capability"), [("470.42.01", (8, 6)), (None, (3, 7))])
def test_where_no_build_fits_the_answer_is_none(driver: str | None, capability: tuple[int, int]):
    assert versions.newest_torch_for(driver=driver, capability=capability) is None


def test_an_old_python_gets_an_older_torch():
    assert versions.newest_torch_for(python=(3, 10)).torch == "2.14"
    assert versions.newest_torch_for(python=(3, 11)).torch == "2.15"


def test_arm_servers_have_their_own_architectures():
    assert versions.newest_torch_for(capability=(11, 0), machine="aarch64").cuda == "13.2"
    assert versions.newest_torch_for(capability=(7, 5), machine="aarch64") is None


def test_a_jetson_is_not_served_by_code_for_servers():
    assert not versions.runs_on([(8, 0), (8, 6)], (8, 7))


@pytest.mark.parametrize(("value", "cuda"), [(11080, "11.8"), (12040, "12.4"), (13020, "13.2")])
def test_the_number_of_the_driver_api_is_a_cuda_version(value: int, cuda: str):
    assert versions.cuda_from_number(value) == cuda


@pytest.mark.parametrize("version", ["", "unknown", "abc"])
def test_a_version_without_a_number_is_no_version(version: str):
    assert versions.number(version) == ()
    assert versions.driver_runs(version, "13.0") is None
    assert versions.cuda_for_driver(version) is None


def test_unknown_versions_get_empty_answers():
    assert versions.wheels_for("1.13") == ()
    assert versions.arches("9.9", "13.0") == ()
    assert versions.driver_needed("99.0") is None
    assert versions.bitsandbytes_binaries("0.41.0") == ()


def test_a_patch_release_between_two_rows_has_the_older_rows_binaries():
    assert versions.bitsandbytes_binaries("0.48.2") == versions.bitsandbytes_binaries("0.48.0")


@pytest.mark.parametrize(
    ("cuda", "version", "picked"),
    [
        ("13.1", "0.50.2", "13.0"),
        ("13.4", "0.50.2", "13.2"),
        ("12.0", "0.50.2", "12.1"),
        ("12.9", "0.50.2", "12.8"),
        ("14.0", "0.50.2", None),
        ("13.1", "0.49.2", None),
        ("12.9", "0.46.0", None),
        ("12.9", "0.46.1", "12.9"),
    ],
)
def test_bitsandbytes_picks_the_binary_that_it_would(cuda: str, version: str, picked: str | None):
    assert versions.bitsandbytes_pick(versions.bitsandbytes_binaries(version), cuda, version) == picked


def test_the_table_tells_its_day():
    assert versions.table_date() == max(row["checked"] for _, row in ROWS)
