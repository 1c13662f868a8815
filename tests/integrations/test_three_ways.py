"""The user's own code, unchanged, by each of the three ways to put halfbyte in bitsandbytes' place."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from halfbyte.integrations.bitsandbytes.names import VERSION
from tests.support.python import python

SNIPPET = """\
bnb_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(path, quantization_config=bnb_config)
"""

SCRIPT = f"""\
import sys, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
path = sys.argv[1]
{SNIPPET}
import bitsandbytes as bnb
import bitsandbytes.nn.modules
layer = model.model.layers[0].mlp.up_proj
print(bnb.__version__, type(layer) is bitsandbytes.nn.modules.Linear4bit is bnb.nn.Linear4bit)
print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False).shape)
model.save_pretrained(sys.argv[2])
AutoModelForCausalLM.from_pretrained(sys.argv[2]).save_pretrained(sys.argv[2] + "/again")
"""

WAYS = ["import", "run", "shim"]


def by(way: str, script: str, words: list[str | Path], folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Run a script by one of the three ways."""
    prefix = "import halfbyte; halfbyte.install_as_bitsandbytes()\n" if way == "import" else ""
    (folder / "script.py").write_text(prefix + script)
    command = ["-m", "halfbyte", "run", "script.py"] if way == "run" else ["script.py"]
    return python([*command, *words], cwd=folder, path=[site] if way == "shim" else [])


@pytest.mark.parametrize("way", WAYS)
def test_the_snippet_loads_generates_saves_and_saves_again(
    way: str, llama_dir: Path, tmp_path: Path, shim_site: Path
) -> None:
    done = by(way, SCRIPT, [llama_dir, tmp_path / "out"], tmp_path, shim_site)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{VERSION} True", "torch.Size([1, 7])"]
    assert (tmp_path / "out" / "again" / "model.safetensors").is_file()
    # The first model, the reloaded one: by the shim, bitsandbytes is first imported in the midst of the first loading.
    receipts = re.findall(r"^halfbyte: .* k weights in nf4; .* computes in bfloat16$", done.stderr, re.M)
    assert len(receipts) == 2


@pytest.mark.parametrize("way", WAYS)
def test_nothing_of_the_original_is_there(way: str, tmp_path: Path, shim_site: Path) -> None:
    script = (
        "import importlib.metadata as m; print(m.version('bitsandbytes'))\nimport bitsandbytes; print(bitsandbytes)\n"
    )
    done = by(way, script, [], tmp_path, shim_site)
    assert done.stdout.splitlines()[0] == VERSION


def test_python_m_bitsandbytes_is_the_doctor(shim_site: Path, tmp_path: Path) -> None:
    done = python(["-m", "bitsandbytes"], path=[shim_site], cwd=tmp_path)
    assert done.stdout.startswith("halfbyte "), done.stderr
    script = tmp_path / "fake_doctor.py"
    script.write_text(
        "import runpy, halfbyte.cli.main as m; m.main = print; runpy.run_module('bitsandbytes', None, '__main__')"
    )
    assert python(["-m", "halfbyte", "run", script], cwd=tmp_path).stdout == "[]\n"


def test_install_under_the_shim_is_welcome_and_does_nothing(tmp_path: Path, shim_site: Path) -> None:
    script = "import halfbyte; halfbyte.install_as_bitsandbytes(); import bitsandbytes as b; print(b.__file__)"
    done = by("shim", script, [], tmp_path, shim_site)
    assert done.stdout.strip() == str(shim_site / "bitsandbytes" / "__init__.py")


def test_processes_that_the_script_starts_have_it_by_the_shim(tmp_path: Path, shim_site: Path) -> None:
    script = (
        "import subprocess, sys\n"
        "print(subprocess.run([sys.executable, '-c', 'import bitsandbytes as b; print(b.__version__)'],"
        " capture_output=True, text=True).stdout)\n"
    )
    assert by("shim", script, [], tmp_path, shim_site).stdout.strip() == VERSION


def test_the_shim_is_metadata_and_imports_only() -> None:
    folder = Path(__file__).parents[2] / "shim"
    project = (folder / "pyproject.toml").read_text()
    for line in ('name = "bitsandbytes"', f'version = "{VERSION}"', 'dependencies = ["halfbyte"]'):
        assert line in project.splitlines()
    code = [line for line in (folder / "bitsandbytes" / "__init__.py").read_text().splitlines()[1:] if line]
    assert all(line.startswith("from halfbyte.integrations.bitsandbytes.shim import ") for line in code)
    assert [path.name for path in (folder / "bitsandbytes").glob("*.py")] == ["__init__.py"]


GENERATE = f"""\
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
path = sys.argv[1]
{SNIPPET}
tokenizer = AutoTokenizer.from_pretrained(path)
question = [{{"role": "user", "content": "What is the capital of France?"}}]
ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1]:]
print(tokenizer.decode(answer, skip_special_tokens=True))
"""


@pytest.mark.model
@pytest.mark.parametrize("way", WAYS)
def test_smollm2_answers_sensibly(way: str, smollm2_dir: Path, tmp_path: Path, shim_site: Path) -> None:
    done = by(way, GENERATE, [smollm2_dir], tmp_path, shim_site)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert re.search(r"^halfbyte: 78\.9% of 134\.5 M weights in nf4; ", done.stderr, re.MULTILINE)
