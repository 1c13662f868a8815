"""What importing may do: little, quickly, and never touch a GPU or the network."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
HEAVY = ("torch", "triton", "numba", "numpy", "transformers", "rich", "safetensors")

PROBE = """
import json, socket, sys, time
class NoNetwork(socket.socket):
    def connect(self, *args): raise AssertionError(f"an import connects to {{args}}")
    connect_ex = connect
socket.socket = NoNetwork
start = time.perf_counter()
import {module}
seconds = time.perf_counter() - start
torch = sys.modules.get("torch")
print(json.dumps({{
    "heavy": [name for name in {heavy!r} if name in sys.modules],
    "seconds": seconds,
    "cuda": torch is not None and torch.cuda.is_initialized(),
    "dynamo": "torch._dynamo" in sys.modules,
}}))
"""


def imported(module: str) -> dict[str, object]:
    """What a fresh interpreter says after importing ``module`` from the source tree."""
    code = f"import sys; sys.path.insert(0, {str(SOURCE)!r})\n" + PROBE.format(module=module, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_the_package_loads_nothing_heavy(record_property: pytest.FixtureRequest) -> None:
    found = imported("halfbyte")
    record_property("import halfbyte, seconds", found["seconds"])
    assert found["heavy"] == []


@pytest.mark.parametrize("module", ["halfbyte.cli.main", "halfbyte.errors", "halfbyte._env"])
def test_the_command_line_starts_without_torch(module: str) -> None:
    heavy = imported(module)["heavy"]
    assert isinstance(heavy, list)
    assert "torch" not in heavy


@pytest.mark.parametrize("module", ["halfbyte.nn", "halfbyte.functional", "halfbyte.backends", "halfbyte.checkpoint"])
def test_importing_modules_neither_starts_cuda_nor_loads_compilers(module: str) -> None:
    found = imported(module)
    assert found["cuda"] is False
    assert found["dynamo"] is False
    assert isinstance(found["heavy"], list)
    assert not {"triton", "numba", "transformers"} & set(found["heavy"])


def test_formats_need_no_torch() -> None:
    heavy = imported("halfbyte.formats")["heavy"]
    assert isinstance(heavy, list)
    assert "torch" not in heavy
