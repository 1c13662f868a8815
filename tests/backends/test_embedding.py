"""Rows looked up in a packed table are those of the whole table dequantized, from every backend that runs here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from halfbyte.backends import explain
from halfbyte.backends.cpu import embedding as cpu
from halfbyte.backends.cpu import four_bit as cpu_four_bit
from halfbyte.backends.reference import embedding as reference
from halfbyte.backends.reference import four_bit
from halfbyte.errors import ArgumentError
from tests.backends.cpu.nesting import nest
from tests.support.hard_inputs import DTYPES, weights

ops = torch.ops.halfbyte
ROWS = 300

BACKENDS: dict[str, Callable[..., Tensor]] = {"reference": reference.embedding_4bit, "cpu": cpu.embedding_4bit}


def table(columns: int, blocksize: int, nested: bool) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Codes, absmax and what else double quantization needs, of a table of 300 rows."""
    packed, absmax = four_bit.quantize_4bit(weights(ROWS * columns).view(ROWS, columns), blocksize, "nf4", torch.uint8)
    if not nested:
        return packed, absmax, [None, None, None]
    first, *rest = nest(absmax)
    return packed, first, list(rest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("columns", [64, 128, 576])
@pytest.mark.parametrize("name", BACKENDS)
def test_rows_are_those_of_the_dequantized_table(name: str, columns: int, nested: bool, dtype: torch.dtype) -> None:
    packed, absmax, rest = table(columns, 64, nested)
    whole = four_bit.dequantize_4bit(packed, absmax, 64, "nf4", (ROWS, columns), dtype, *rest)
    for indices in (torch.randint(0, ROWS, (2, 7)), torch.tensor([0, ROWS - 1, 0], dtype=torch.int32)):
        found = BACKENDS[name](indices, packed, [ROWS, columns], absmax, 64, "nf4", dtype, *rest)
        assert found.dtype == dtype
        assert torch.equal(found, whole[indices.long()])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("columns", "blocksize"), [(1, 32), (63, 64), (65, 64), (100, 64), (48, 4096)])
def test_rows_that_share_blocks_or_bytes_are_looked_up_too(columns: int, blocksize: int, nested: bool) -> None:
    packed, absmax, rest = table(columns, blocksize, nested)
    shape, indices = [ROWS, columns], torch.tensor([[0, 1, 2], [ROWS - 1, 17, 0]])
    whole = four_bit.dequantize_4bit(packed, absmax, blocksize, "nf4", shape, torch.float32, *rest)
    arguments = (indices, packed, shape, absmax, blocksize, "nf4", torch.float32, *rest)
    assert torch.equal(ops.embedding_4bit(*arguments), whole[indices])
    (verdict,) = (v for v in explain("embedding_4bit", *arguments) if v.backend == "cpu")
    assert verdict.reason is not None
    assert "share blocks" in verdict.reason


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", BACKENDS)
def test_any_storage_dtype_is_read_as_bytes(name: str, storage: torch.dtype) -> None:
    packed, absmax, rest = table(64, 64, False)
    whole = four_bit.dequantize_4bit(packed, absmax, 64, "nf4", (ROWS, 64), torch.float32)
    found = BACKENDS[name](
        torch.tensor([5]), packed.view(-1).view(storage), [ROWS, 64], absmax, 64, "nf4", torch.float32, *rest
    )
    assert torch.equal(found, whole[[5]])


@pytest.mark.parametrize("bad", [-1, ROWS])
@pytest.mark.parametrize("name", BACKENDS)
def test_an_index_outside_the_table_is_an_error_on_the_cpu(name: str, bad: int) -> None:
    packed, absmax, _ = table(64, 64, False)
    with pytest.raises(ArgumentError, match=rf"index {bad} into a table of 300 rows; expected 0 to 299"):
        BACKENDS[name](torch.tensor([3, bad]), packed, [ROWS, 64], absmax, 64, "nf4", torch.float32)


@pytest.mark.parametrize("name", BACKENDS)
def test_no_indices_give_no_rows(name: str) -> None:
    packed, absmax, _ = table(64, 64, False)
    empty = torch.empty(0, 3, dtype=torch.long)
    assert BACKENDS[name](empty, packed, [ROWS, 64], absmax, 64, "nf4", torch.float32).shape == (0, 3, 64)


def test_only_the_codes_of_the_rows_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode = cpu_four_bit.decode

    def counting(*args: object, end: int, **named: object) -> None:
        decoded.append(end)
        decode(*args, end=end, **named)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(cpu, "decode", counting)
    packed, absmax, _ = table(128, 64, False)
    ops.embedding_4bit(torch.tensor([1, 299]), packed, [ROWS, 128], absmax, 64, "nf4", torch.float32)
    assert decoded == [2 * 128]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": torch.tensor([0.5])}, r"indices are torch.float32; expected int64 or int32"),
        ({"shapeB": [ROWS * 64]}, r"the table's shape is \(19200,\); expected two dimensions"),
        ({"shapeB": [ROWS, 128]}, r"packed weight holds 9600 bytes; expected 19200"),
        ({"dtype": torch.float64}, r"output dtype is torch.float64"),
    ],
    ids=["indices", "shape", "other table", "dtype"],
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    packed, absmax, _ = table(64, 64, False)
    given: dict[str, object] = {"indices": torch.tensor([0]), "shapeB": [ROWS, 64], "dtype": torch.float32, **change}
    with pytest.raises(ArgumentError, match=message):
        ops.embedding_4bit(given["indices"], packed, given["shapeB"], absmax, 64, "nf4", given["dtype"])
