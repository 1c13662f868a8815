"""Actions after an import run once the module is whole, whoever imports it and however."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

FIRST = ["transformers.models.bloom.modeling_bloom", "transformers.quantizers.auto", "peft"]


@pytest.mark.parametrize("first", FIRST)
def test_any_module_may_be_the_first_that_is_imported(first: str) -> None:
    code = (
        f"import halfbyte; halfbyte.install_as_bitsandbytes(); import {first}; import transformers.quantizers.auto;"
        "from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer as found;"
        "assert 'halfbyte' in found._dequantize.__module__"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_an_action_for_a_module_under_way_waits_until_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "halfbyte_outer.py").write_text("import halfbyte_inner\nlate = 'here'\nimport halfbyte_after\n")
    (tmp_path / "halfbyte_inner.py").write_text(
        "import sys\nfrom halfbyte.integrations.post_import import after_import\nseen = []\n"
        "after_import('halfbyte_outer', lambda: seen.append(sys.modules['halfbyte_outer'].late))\n"
    )
    (tmp_path / "halfbyte_after.py").write_text("import halfbyte_inner\nassert halfbyte_inner.seen == []\n")
    (tmp_path / "halfbyte_next.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("halfbyte_outer")
    importlib.import_module("halfbyte_next")
    assert importlib.import_module("halfbyte_inner").seen == ["here"]
