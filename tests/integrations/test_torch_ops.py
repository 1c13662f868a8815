"""``torch.ops.bitsandbytes``: bitsandbytes' schemas to the letter, halfbyte's results, usable under every transform."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import halfbyte.functional as F
from halfbyte.integrations.bitsandbytes.ops import OPTIMIZER_OPS, SCHEMAS
from tests.support.python import python_code

ours = torch.ops.halfbyte

# As torch prints them, from bitsandbytes 0.50.2 itself.
PRINTED = {
    "gemm_4bit": "bitsandbytes::gemm_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, "
    "str quant_type, Tensor? bias=None, Tensor? absmax_8bit=None, Tensor? absmax_code=None, "
    "Tensor? absmax_offset=None) -> Tensor",
    "quantize_4bit": "bitsandbytes::quantize_4bit(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) "
    "-> (Tensor, Tensor)",
}


def calls() -> dict[str, tuple[Any, ...]]:
    """Arguments for every op."""
    torch.manual_seed(0)
    w, x = torch.randn(32, 64), torch.randn(3, 64)
    packed, state = F.quantize_4bit(w, quant_type="nf4")
    codes, state8 = F.quantize_blockwise(x, blocksize=64)
    CA, SCA, columns = F.int8_vectorwise_quant(x, 2.0)
    CB, SCB, _ = F.int8_vectorwise_quant(w)
    sums = F.int8_linear_matmul(CA, CB)
    code16 = F.get_4bit_type("nf4", "cpu")
    p, g, m, v = torch.randn(300), torch.randn(300), torch.zeros(300), torch.zeros(300)
    maps = F.create_dynamic_map(True), F.create_dynamic_map(False)
    m8, v8 = (torch.zeros(300, dtype=torch.uint8) for _ in range(2))
    return {
        "int8_mixed_scaled_mm": (x, CA, CB, SCA, SCB, columns, None),
        "int8_scaled_mm": (CA, CB, SCA, SCB, None, torch.float32),
        "int8_linear_matmul": (CA, CB),
        "int8_linear_matmul.out": (CA, CB, torch.empty(3, 32, dtype=torch.int32)),
        "int8_vectorwise_quant": (x, 2.0),
        "int8_vectorwise_dequant": (CA, SCA),
        "int8_mm_dequant": (sums, SCA, SCB, torch.float32, None),
        "int8_double_quant": (x, 2.0),
        "dequantize_4bit": (packed, state.absmax, 64, "nf4", (32, 64), torch.float32),
        "dequantize_4bit.out": (packed, state.absmax, 64, "nf4", (32, 64), torch.float32, torch.empty(32, 64)),
        "quantize_4bit": (w, 64, "nf4", torch.uint8),
        "gemm_4bit": (x, packed, (32, 64), state.absmax, 64, "nf4", torch.ones(32)),
        "dequantize_blockwise": (codes, state8.absmax, state8.code, 64, torch.float32),
        "dequantize_blockwise.out": (codes, state8.absmax, state8.code, 64, torch.float32, torch.empty(3, 64)),
        "quantize_blockwise": (x, state8.code, 64),
        "gemv_4bit": (x[:1], packed, (32, 64), state.absmax, code16, 64),
        "gemv_4bit.out": (x[:1], packed, (32, 64), state.absmax, code16, 64, torch.empty(1, 32)),
        "optimizer_update_32bit": (
            "adam", g, p, m, v, None, 0.0, 0.0, 0.9, 0.99, 0.0, 0.0, 1e-8, 0.01, 1, 0.1, 1.0,
        ),
        "optimizer_update_8bit_blockwise": (
            "adam", g, p, m8, v8, 0.9, 0.99, 0.0, 0.0, 1e-8, 1, 0.1, maps[0], maps[1],
            torch.zeros(2), torch.zeros(2), 0.01, 1.0,
        ),
    }  # fmt: skip


def op_of(namespace: Any, name: str) -> Any:
    op, _, overload = name.partition(".")
    return getattr(getattr(namespace, op), overload or "default")


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_op_is_there_under_the_stand_in(name: str, bnb: Any) -> None:
    assert bnb.__version__
    schema = str(op_of(torch.ops.bitsandbytes, name)._schema)
    assert schema.startswith(f"bitsandbytes::{name}(")
    if name in PRINTED:
        assert schema == PRINTED[name]


@pytest.mark.peer
def test_schemas_are_those_of_bitsandbytes(peer_python: str) -> None:
    import subprocess

    code = (
        "import bitsandbytes, torch, json\n"
        f"names = {list(SCHEMAS)!r}\n"
        "packet = lambda n: getattr(torch.ops.bitsandbytes, n.partition('.')[0])\n"
        "op = lambda n: getattr(packet(n), n.partition('.')[2] or 'default')\n"
        "print('\\n'.join(str(op(n)._schema) for n in names))\n"
    )
    done = subprocess.run([peer_python, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-len(SCHEMAS) :] == [
        str(op_of(torch.ops.bitsandbytes, name)._schema) for name in SCHEMAS
    ]


@pytest.mark.parametrize("name", [name for name in SCHEMAS if name not in OPTIMIZER_OPS])
def test_the_op_gives_what_halfbytes_gives(name: str) -> None:
    args, again = calls()[name], calls()[name]
    found = op_of(torch.ops.bitsandbytes, name)(*args)
    if name.endswith(".out"):
        op_of(ours, name)(*again[:-1], out=again[-1])
        assert found is None
        found, expected = args[-1], again[-1]
    else:
        expected = op_of(ours, name)(*again)
    for one, other in zip(*(v if isinstance(v, tuple) else (v,) for v in (found, expected)), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("name", OPTIMIZER_OPS)
def test_an_optimizer_step_changes_parameter_and_states_in_place(name: str) -> None:
    args, again = calls()[name], calls()[name]
    before = [t.clone() for t in args if isinstance(t, torch.Tensor)]
    assert op_of(torch.ops.bitsandbytes, name)(*args) is None
    if name.endswith("32bit"):
        optimizer, g, p, m, v, _, _, _, b1, b2, b3, alpha, eps, decay, step, lr, scale = again
        F.optimizer_update_32bit(optimizer, g, p, m, b1, eps, step, lr, v, b2, b3, alpha, decay, scale)
    else:
        F.optimizer_update_8bit_blockwise(*again)
    after, expected = ([t for t in values if isinstance(t, torch.Tensor)] for values in (args, again))
    assert all(torch.equal(one, other) for one, other in zip(after, expected, strict=True))
    assert not torch.equal(after[1], before[1])


@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck(name: str) -> None:
    # Which columns hold outliers is data: torch compares fakes of unknown sizes with difficulty, not these ops alone.
    utils = ["test_schema", "test_autograd_registration"]
    if name not in {"int8_vectorwise_quant", "int8_double_quant"}:
        utils += ["test_faketensor"]
    torch.library.opcheck(op_of(torch.ops.bitsandbytes, name), calls()[name], test_utils=utils)


@pytest.mark.parametrize("name", ["gemm_4bit", "dequantize_4bit", "quantize_blockwise", "int8_scaled_mm"])
def test_the_op_compiles_whole(name: str) -> None:
    op, args = op_of(torch.ops.bitsandbytes, name), calls()[name]
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
    for one, other in zip(*(v if isinstance(v, tuple) else (v,) for v in (compiled(*args), op(*args))), strict=True):
        assert torch.equal(one, other)


def test_meta_tensors_get_shapes() -> None:
    w = torch.empty(32, 64, device="meta", dtype=torch.bfloat16)
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit(w, 64, "nf4", torch.uint8)
    assert (packed.shape, absmax.shape, packed.device.type) == ((1024, 1), (32,), "meta")


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="blocksize"):
        torch.ops.bitsandbytes.quantize_4bit(torch.zeros(64), 48, "nf4", torch.uint8)


def test_they_are_defined_only_where_the_stand_in_is_imported_and_whatever_comes_first() -> None:
    there = "print(hasattr(torch.ops.bitsandbytes, 'gemm_4bit'))\n"
    install = "import halfbyte; halfbyte.install_as_bitsandbytes()\n"
    assert python_code("import torch, halfbyte.functional\n" + there) == "False\n"
    assert python_code(install + "import torch\n" + there) == "False\n"
    assert python_code(install + "import torch, bitsandbytes\n" + there) == "True\n"
    assert python_code(install + "import bitsandbytes, torch\n" + there) == "True\n"
    assert (
        python_code(install + "from bitsandbytes.functional import quantize_4bit\nimport torch\n" + there) == "True\n"
    )


def test_ops_of_a_real_bitsandbytes_stay_as_they_are() -> None:
    code = (
        "import torch\n"
        "library = torch.library.Library('bitsandbytes', 'DEF')\n"
        "library.define('quantize_4bit(Tensor A) -> Tensor')\n"
        "library.impl('quantize_4bit', lambda A: A + 1, 'CompositeExplicitAutograd')\n"
        "import halfbyte; halfbyte.install_as_bitsandbytes()\n"
        "import bitsandbytes\n"
        "print(torch.ops.bitsandbytes.quantize_4bit(torch.zeros(1)).item())\n"
    )
    assert python_code(code) == "1.0\n"
