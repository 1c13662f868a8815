"""Nothing private passes the filter, and nothing else is lost in it."""

from __future__ import annotations

import pytest

from halfbyte.doctor.host import Host
from halfbyte.doctor.model import Fix, Result, Status
from halfbyte.doctor.privacy import Redactor, allowed

REDACTOR = Redactor("/home/wilhelmina", ("wilhelmina", "gandalf"), ("hunter2-hunter2",))

PRIVATE = (
    ("/home/wilhelmina/models", "~/models"),
    ("file '/home/wilhelmina'", "file '~'"),
    ("/home/otto/x and /Users/otto/y", "/home/<user>/x and /Users/<user>/y"),
    (r"C:\Users\otto\x", r"C:\Users\<user>\x"),
    ("wilhelmina@gandalf:~$", "<user>@<user>:~$"),
    ("PASSWORD=hunter2-hunter2", "PASSWORD=<secret>"),
    ("password: abcdef", "password: <secret>"),
    ("HF_TOKEN=hf_abcdefghijklmnop", "HF_TOKEN=<secret>"),
    ("hf_abcdefghijklmnop", "<token>"),
    ("sk-abcdefghijklmnop", "<token>"),
    ("ghp_abcdefghijklmnop1234", "<token>"),
    ("https://me:pw@host/simple", "https://<login>@host/simple"),
    ("https://tok3n@host/simple", "https://<login>@host/simple"),
    ("MIG-12345678-1234-1234-1234-123456789abc", "MIG-<uuid>"),
    ("mail ann@example.org", "mail <address>"),
)

HARMLESS = (
    "/usr/lib/x86_64-linux-gnu/libcuda.so.1",
    "torch 2.13.0+cu130",
    "python -m pip install 'torch==2.14.*' --index-url https://download.pytorch.org/whl/cu126",
    "/homework/wilhelm/x",
    "undefined symbol: __nvJitLinkComplete_12_4, version libnvJitLink.so.12",
)


@pytest.mark.parametrize(("text", "shown"), PRIVATE)
def test_private_text_is_taken_out(text: str, shown: str):
    assert REDACTOR.text(text) == shown


@pytest.mark.parametrize("text", HARMLESS)
def test_other_text_stays(text: str):
    assert REDACTOR.text(text) == text


def test_a_longer_name_is_not_cut():
    assert REDACTOR.text("gandalfs") == "gandalfs"


def test_every_text_of_a_result_is_filtered():
    fix = Fix("go to /home/wilhelmina", "cd /home/wilhelmina", safe=True)
    shown = REDACTOR.result(Result(Status.WARN, "wilhelmina", ("on gandalf",), (fix,)))
    assert (shown.summary, shown.evidence, shown.fixes) == ("<user>", ("on <user>",), (Fix("go to ~", "cd ~", True),))


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "HOME", "HOSTNAME", "PATH", "SSH_AUTH_SOCK"]
)
def test_variables_off_the_list_are_not_shown(name: str):
    assert not allowed(name)


@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "HALFBYTE_BACKEND", "TRITON_CACHE_DIR"])
def test_variables_on_the_list_are_shown(name: str):
    assert allowed(name)


def test_a_listed_prefix_does_not_let_a_secret_through():
    assert not allowed("PYTORCH_DOWNLOAD_TOKEN")


def test_values_of_secret_variables_are_known_to_the_filter():
    redactor = Redactor.of(Host(environ={"MY_API_KEY": "abcdef123", "PLAIN": "ghijkl456"}))
    assert redactor.text("abcdef123 ghijkl456") == "<secret> ghijkl456"


def test_ordinary_words_as_names_do_not_eat_the_report():
    redactor = Redactor.of(Host(names=("root", "localhost", "x")))
    assert redactor.text("the root cause on localhost x") == "the root cause on localhost x"
