"""A failing probe is run again without each suspect, and the one that makes the difference is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from halfbyte.doctor.children import Outcome, Request
from halfbyte.doctor.differential import Culprit, find_culprit, suspects
from halfbyte.doctor.host import Host

REQUEST = Request("anything")


def host_where(works: Callable[[Request, dict[str, str]], bool], **environ: str) -> Host:
    """A host whose probes work when ``works`` says so of the request and the environment that is left."""

    def probe(host: Host, request: Request) -> Outcome:
        left = {name: value for name, value in host.environ.items() if name not in request.without}
        return Outcome() if works(request, {**left, **request.changed}) else Outcome(ended="exit status 1")

    return Host(environ=environ, probe=probe, cwd=Path("/project"), search_path=("/project", "/site"))


def culprit_of(host: Host) -> Culprit | None:
    return find_culprit(host, REQUEST, lambda outcome: outcome.ok)[0]


def test_the_variable_is_named():
    host = host_where(lambda _, env: "LD_PRELOAD" not in env, LD_PRELOAD="/x.so", LD_LIBRARY_PATH="/a")
    assert culprit_of(host) == Culprit("LD_PRELOAD", "", "/x.so")


def test_the_one_folder_of_a_library_path_is_named():
    host = host_where(lambda _, env: "/bad" not in env.get("LD_LIBRARY_PATH", ""), LD_LIBRARY_PATH="/a:/bad:/c")
    found = culprit_of(host)
    assert found is not None
    assert (found.name, found.part) == ("LD_LIBRARY_PATH", "/bad")
    assert found.remedy == "export LD_LIBRARY_PATH=/a:/c"


def test_two_bad_folders_blame_the_variable_as_a_whole():
    host = host_where(lambda _, env: "bad" not in env.get("LD_LIBRARY_PATH", ""), LD_LIBRARY_PATH="/bad1:/bad2")
    found = culprit_of(host)
    assert found is not None
    assert found.part == ""
    assert found.remedy == "unset LD_LIBRARY_PATH"


def test_the_working_folder_is_a_suspect():
    found = culprit_of(host_where(lambda request, _: "cwd" in request.without))
    assert found is not None
    assert (found.name, found.remedy) == ("cwd", "cd ~")


def test_nobody_is_blamed_where_nothing_helps():
    assert culprit_of(host_where(lambda *_: False, LD_LIBRARY_PATH="/a", PYTHONPATH="/b")) is None


def test_only_what_is_there_is_suspected():
    assert suspects(Host(search_path=("/site",), cwd=Path("/project"))) == ()
    assert suspects(Host(environ={"PYTHONPATH": "/x"}, search_path=("/site",), cwd=Path("/project"))) == ("PYTHONPATH",)


def test_user_site_packages_are_a_suspect_where_they_are_searched():
    host = Host(
        home=Path("/home/me"), search_path=("/home/me/.local/lib/python3.11/site-packages",), cwd=Path("/project")
    )
    assert suspects(host) == ("user site-packages",)
