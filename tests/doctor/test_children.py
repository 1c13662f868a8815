"""A child process may raise, crash, hang or talk nonsense: the parent learns which, and what came before."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from halfbyte.doctor.children import Outcome, Request, run_probe
from halfbyte.doctor.host import Host
from tests.support.environments import SOURCE


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A host whose search path has a halfbyte of its own, to plant probes in."""
    probes = tmp_path / "halfbyte" / "doctor" / "probes"
    probes.mkdir(parents=True)
    for folder in (probes, probes.parent, probes.parent.parent):
        (folder / "__init__.py").write_text("")
    return replace(Host.here(), search_path=(str(tmp_path), *sys.path), cwd=tmp_path, timeout=20.0)


def run(host: Host, body: str, **request: object) -> Outcome:
    source = "def run(arguments, emit):\n" + "".join(f"    {line}\n" for line in body.splitlines())
    (Path(host.search_path[0]) / "halfbyte/doctor/probes/planted.py").write_text(source)
    return run_probe(host, replace(Request("planted"), **request))


def test_events_arrive_in_order_among_other_output(host: Host):
    outcome = run(host, "emit('a', x=1)\nprint('noise', end='')\nemit('b', y=[2, 'z'])")
    assert outcome.ok
    assert [event["event"] for event in outcome.events] == ["a", "b", "done"]
    assert outcome.event("b")["y"] == [2, "z"]


def test_an_exception_is_reported_with_its_text(host: Host):
    outcome = run(host, "emit('before')\nraise ValueError('no good')")
    assert not outcome.ok
    assert outcome.event("before")
    assert outcome.error_text == "ValueError: no good"


def test_leaving_by_system_exit_is_an_error(host: Host):
    assert run(host, "import sys\nsys.exit(0)").error_text == "SystemExit: 0"


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_signal_is_named_and_what_came_before_is_kept(host: Host):
    outcome = run(host, "emit('before')\nimport os\nos.kill(os.getpid(), 11)")
    assert outcome.ended == "killed by SIGSEGV"
    assert outcome.event("before")
    assert any("planted.py" in line for line in outcome.telling_lines)


def test_an_abort_shows_the_fatal_line(host: Host):
    outcome = run(host, "import os\nos.abort()")
    assert outcome.error_text == "Fatal Python error: Aborted"


def test_a_hang_is_ended_at_the_timeout(host: Host):
    start = time.monotonic()
    outcome = run(replace(host, timeout=0.7), "emit('before')\nimport time\ntime.sleep(60)")
    assert outcome.ended == "no answer in 0.7 s"
    assert outcome.event("before")
    assert time.monotonic() - start < 30


@pytest.mark.skipif(os.name != "posix", reason="process groups of POSIX")
def test_a_hanging_grandchild_is_ended_too(host: Host):
    body = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "emit('grandchild', pid=child.pid)\n"
        "time.sleep(60)"
    )
    pid = run(replace(host, timeout=1.5), body).event("grandchild")["pid"]
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split(") ")[1].startswith("Z"):
            return
        time.sleep(0.05)
    pytest.fail("the grandchild still runs")


def test_a_missing_interpreter_is_a_finding(host: Host):
    assert "did not start" in run(replace(host, executable="/nowhere/python"), "pass").ended
    assert "did not start" in run(replace(host, executable=""), "pass").ended


def test_a_variable_can_be_taken_away(host: Host):
    host = replace(host, environ={**host.environ, "LD_LIBRARY_PATH": "/nowhere"})
    body = "import os\nemit('seen', value=os.environ.get('LD_LIBRARY_PATH'))"
    assert run(host, body).event("seen")["value"] == "/nowhere"
    assert run(host, body, without=("LD_LIBRARY_PATH",)).event("seen")["value"] is None


def test_pythonpath_is_taken_from_the_search_path_too(host: Host, tmp_path: Path):
    extra = tmp_path / "extra"
    extra.mkdir()
    host = replace(
        host,
        environ={**host.environ, "PYTHONPATH": str(extra)},
        search_path=(host.search_path[0], str(extra), *sys.path),
    )
    body = "import sys\nemit('path', entries=sys.path)"
    assert str(extra) in run(host, body).event("path")["entries"]
    assert str(extra) not in run(host, body, without=("PYTHONPATH",)).event("path")["entries"]


def test_halfbyte_stays_importable_without_pythonpath(host: Host):
    host = replace(
        host, environ={**host.environ, "PYTHONPATH": str(SOURCE)}, search_path=(host.search_path[0], *sys.path)
    )
    outcome = run(host, "import sys\nemit('path', entries=sys.path)", without=("PYTHONPATH",))
    assert outcome.event("path")["entries"][-1] == str(SOURCE)


def test_the_probes_folder_does_not_stand_before_the_standard_library(host: Host):
    entries = run(host, "import sys\nemit('path', entries=sys.path)").event("path")["entries"]
    assert not any(entry.rstrip("/").endswith("probes") for entry in entries)
