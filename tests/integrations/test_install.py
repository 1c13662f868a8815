"""The name ``bitsandbytes``: found, versioned, refused and replaced, each in a fresh process."""

from __future__ import annotations

import importlib
import operator
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

import halfbyte.autograd
import halfbyte.functional
import halfbyte.nn
from halfbyte.errors import UnsupportedError
from halfbyte.integrations.bitsandbytes.names import FEATURES, MODULES, SUPPORTED_DEVICES, VERSION, is_there, lookup
from tests.support.python import python, python_code

INSTALL = "import halfbyte; halfbyte.install_as_bitsandbytes()\n"


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder with an installed package named bitsandbytes that is not ours."""
    package = tmp_path / "bitsandbytes"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '0.50.2'\nfrom . import nn\n")
    (package / "nn.py").write_text("class Linear4bit: pass\n")
    info = tmp_path / "bitsandbytes-0.50.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 0.50.2\n")
    return tmp_path


def test_install_imports_neither_torch_nor_bitsandbytes() -> None:
    code = INSTALL + "import sys; print([m for m in ('torch', 'numba', 'triton', 'bitsandbytes') if m in sys.modules])"
    assert python_code(code) == "[]\n"


def test_importing_bitsandbytes_loads_no_torch_until_a_module_is_used() -> None:
    code = INSTALL + "import sys, bitsandbytes as b; print('torch' in sys.modules); b.nn.Linear4bit\n"
    assert python_code(code + "print('torch' in sys.modules)") == "False\nTrue\n"


def test_metadata_names_and_versions_the_distribution() -> None:
    code = INSTALL + (
        "import importlib.metadata as m\n"
        "print(m.version('bitsandbytes'), m.metadata('bitsandbytes')['Name'], m.version('BitsAndBytes'))\n"
        "print(m.packages_distributions()['bitsandbytes'])\n"
        "print([d.version for d in m.distributions() if d.metadata['Name'] == 'bitsandbytes'])\n"
    )
    assert python_code(code) == f"{VERSION} bitsandbytes {VERSION}\n['bitsandbytes']\n['{VERSION}']\n"


def test_the_version_passes_every_known_check() -> None:
    for minimum in ("0.37.2", "0.39.0", "0.43.2", "0.43.3", "0.45.1", "0.46.1", "0.48"):
        assert Version(VERSION) >= Version(minimum)
    # vLLM's loader compares text.
    assert not VERSION < "0.46.1"


def test_find_spec_and_the_module_have_a_spec() -> None:
    code = INSTALL + (
        "import importlib.util as u\n"
        "print(u.find_spec('bitsandbytes').name, u.find_spec('bitsandbytes.nn.modules').name)\n"
        "import bitsandbytes\n"
        "print(bitsandbytes.__spec__.name, bitsandbytes.__version__, u.find_spec('bitsandbytes') is not None)\n"
    )
    assert python_code(code) == f"bitsandbytes bitsandbytes.nn.modules\nbitsandbytes {VERSION} True\n"


def test_features_and_devices_are_what_accelerate_and_transformers_ask_for() -> None:
    code = INSTALL + "import bitsandbytes as b; print('multi_backend' in b.features, sorted(b.supported_torch_devices))"
    assert python_code(code) == f"True {sorted(SUPPORTED_DEVICES)}\n"
    assert "multi_backend" in FEATURES


def test_a_class_is_one_and_the_same_by_every_path(bnb: Any) -> None:
    from bitsandbytes.nn import Params4bit as by_package  # pyright: ignore[reportMissingImports]
    from bitsandbytes.nn.modules import Params4bit as by_module  # pyright: ignore[reportMissingImports]

    pickled = pickle.loads(b"cbitsandbytes.nn.modules\nParams4bit\n.")
    attributes = (bnb.nn.Params4bit, bnb.nn.modules.Params4bit, bnb.modules.Params4bit)
    assert all(found is halfbyte.nn.Params4bit for found in (by_package, by_module, pickled, *attributes))
    assert bnb.functional.QuantState is halfbyte.functional.QuantState
    assert bnb.matmul_4bit is bnb.autograd._functions.matmul_4bit is halfbyte.autograd.matmul_4bit


def test_halfbyte_itself_gains_no_names_from_being_stood_in() -> None:
    importlib.import_module("bitsandbytes.nn.modules")
    assert not hasattr(halfbyte.nn, "modules")
    assert halfbyte.nn.__name__ == halfbyte.nn.__spec__.name == "halfbyte.nn"


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name not in {"", "__main__"} and is_there(name)))
def test_every_module_of_the_table_imports_and_has_the_names_it_lists(module: str) -> None:
    found = importlib.import_module(f"bitsandbytes.{module}")
    assert found is operator.attrgetter(module)(importlib.import_module("bitsandbytes"))
    assert dir(found)
    assert all(getattr(found, name) is not None for name in dir(found))


def test_a_second_call_does_nothing() -> None:
    code = INSTALL + INSTALL + "import sys; print(sum(type(f).__name__ == 'Finder' for f in sys.meta_path))"
    assert python_code(code) == "1\n"


def test_a_missing_name_says_what_is_missing_and_what_to_do() -> None:
    with pytest.raises(AttributeError, match=r"offers no bitsandbytes\.nn\.NoSuchLayer\nhint: "):
        lookup("nn", "NoSuchLayer")
    with pytest.raises(ImportError, match=r"cannot import name 'NoSuchLayer' from 'bitsandbytes\.nn'"):
        exec("from bitsandbytes.nn import NoSuchLayer")


def test_a_module_that_is_not_there_says_what_to_use_where_that_is_known() -> None:
    done = python(["-c", INSTALL + "import bitsandbytes.cuda_setup.main"])
    assert done.stderr.endswith("hint: use `python -m bitsandbytes`, which runs halfbyte's doctor\n")
    done = python(["-c", INSTALL + "import bitsandbytes.colours"])
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'bitsandbytes.colours'\n")


def test_the_real_one_is_not_replaced_unasked(foreign: Path) -> None:
    code = (
        "import halfbyte, sys\n"
        "try:\n    halfbyte.install_as_bitsandbytes()\n"
        "except halfbyte.errors.EnvironmentConflictError as error:\n    print(error)\n"
        "import bitsandbytes; print(bitsandbytes.__version__)\n"
    )
    out = python_code(code, path=[foreign])
    assert "bitsandbytes 0.50.2 is installed here" in out
    assert re.search(r"hint: `pip uninstall bitsandbytes`, or install_as_bitsandbytes\(replace=True\)", out)
    assert out.endswith("\n0.50.2\n")


def test_an_imported_real_one_is_not_replaced_unasked(foreign: Path) -> None:
    done = python(["-c", "import bitsandbytes\n" + INSTALL], path=[foreign])
    assert "halfbyte.errors.EnvironmentConflictError: bitsandbytes 0.50.2 is installed here" in done.stderr


def test_halfbyte_run_refuses_and_replaces(foreign: Path, tmp_path: Path) -> None:
    script = tmp_path / "show.py"
    script.write_text("import bitsandbytes; print(bitsandbytes.__version__)")
    refused = python(["-m", "halfbyte", "run", script], path=[foreign])
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "`halfbyte run --replace`" in refused.stderr
    assert python(["-m", "halfbyte", "run", "--replace", script], path=[foreign]).stdout == f"{VERSION}\n"


@pytest.mark.parametrize("before", ["", "import bitsandbytes, bitsandbytes.nn\n"], ids=["early", "after its import"])
def test_replace_goes_before_the_real_one(foreign: Path, before: str) -> None:
    code = before + (
        "import halfbyte; halfbyte.install_as_bitsandbytes(replace=True)\n"
        "import bitsandbytes.nn, importlib.metadata, halfbyte.nn\n"
        "print(bitsandbytes.nn.Linear4bit is halfbyte.nn.Linear4bit, importlib.metadata.version('bitsandbytes'))\n"
    )
    assert python_code(code, path=[foreign]) == f"True {VERSION}\n"


def test_a_bare_folder_of_that_name_is_not_the_real_one(tmp_path: Path) -> None:
    (tmp_path / "bitsandbytes").mkdir()
    code = INSTALL + "import bitsandbytes; print(bitsandbytes.__version__)"
    assert python_code(code, path=[tmp_path]) == f"{VERSION}\n"
    assert python_code(code, cwd=tmp_path) == f"{VERSION}\n"


def test_native_symbols_are_refused_with_the_way_out(bnb: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"lib\.cadam32bit_grad_fp32: halfbyte has no") as caught:
        bnb.cextension.lib.cadam32bit_grad_fp32()
    assert "hint: `python -m halfbyte`" in str(caught.value)


def test_a_4bit_layer_that_bitsandbytes_pickled_whole_loads_and_computes() -> None:
    file = Path(__file__).parents[1] / "golden" / "hf" / "pickled_layer.pt"
    layer, inputs, expected = torch.load(file, weights_only=False)
    assert type(layer[0]) is halfbyte.nn.LinearNF4
    torch.testing.assert_close(layer(inputs), expected)
    assert type(layer[0].weight) is halfbyte.nn.Params4bit
    assert halfbyte.nn.receipt(layer, show=False).formats == {"nf4, double quant": 2048}
