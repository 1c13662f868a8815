"""torch.compile and torch.export of 4-bit layers: no graph break, the same numbers, one graph for every batch."""

from typing import Any

import pytest
import torch

from halfbyte.nn import Linear4bit
from tests.support.hard_inputs import weights
from tests.support.tolerances import TOLERANCES, close

BACKENDS = ["aot_eager", "inductor"]


class Block(torch.nn.Module):
    """Two 4-bit layers with something between, as a model has."""

    def __init__(self, nested: bool = True, **named: Any) -> None:
        super().__init__()
        named = {"compute_dtype": torch.float32, "quant_type": "nf4", "compress_statistics": nested, **named}
        self.up, self.down = Linear4bit(64, 96, **named), Linear4bit(96, 64, bias=False, **named)
        self.up.weight.data = weights(96 * 64, seed=1).view(96, 64)
        self.down.weight.data = weights(96 * 64, seed=2).view(64, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(x)))


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Compiled code of other tests must not count against the limit of recompilations."""
    torch.compiler.reset()


def same(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    close(name, actual, expected, TOLERANCES["compiled product fp32"], float(expected.detach().abs().max()))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward_compile_without_a_graph_break(backend: str, nested: bool) -> None:
    block = Block(nested).to("cpu")
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    results = []
    for run in (block, compiled):
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        block.zero_grad()
        y = run(x)
        y.pow(2).sum().backward()
        results.append((y.detach(), x.grad, block.up.bias.grad.clone()))
    for name, expected, actual in zip(("y", "dx", "dbias"), *results, strict=True):
        assert expected.abs().sum() > 0
        same(name, actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_compiles_without_a_graph_break(backend: str) -> None:
    block = Block().to("cpu").eval()
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    with torch.no_grad():
        x = torch.randn(2, 3, 64)
        same("y", compiled(x), block(x))


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_every_compute_dtype_compiles(compute_dtype: torch.dtype | None) -> None:
    layer = Linear4bit(64, 32, compute_dtype=compute_dtype, quant_type="nf4").to("cpu")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 64, dtype=dtype)
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_dynamic_graph_serves_every_batch(backend: str) -> None:
    block = Block().to("cpu")
    graphs = 0

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(block, backend=counting, fullgraph=True, dynamic=True)
    for batch in (3, 7, 31):
        x = torch.randn(batch, 64)
        same("y", compiled(x), block(x))
    assert graphs == 1


def test_quantizing_compiles() -> None:
    import halfbyte.functional as F

    def round_trip(A: torch.Tensor) -> torch.Tensor:
        packed, state = F.quantize_4bit(A, quant_type="nf4", compress_statistics=True)
        return F.dequantize_4bit(packed, state)

    A = weights(64 * 40).view(40, 64)
    assert torch.equal(torch.compile(round_trip, backend="aot_eager", fullgraph=True)(A), round_trip(A))


def test_a_layer_exports_and_computes_the_same() -> None:
    block = Block().to("cpu").eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(block, (torch.randn(5, 64),), dynamic_shapes=({0: batch},))
        x = torch.randn(9, 64)
        same("y", program.module()(x), block(x))
    assert any("gemm_4bit" in str(node.target) for node in program.graph.nodes)
