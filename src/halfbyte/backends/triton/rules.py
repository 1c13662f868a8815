"""Optimizer rules as Triton functions: the same source, with every number that a rule reads from ``h`` an argument."""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import textwrap
from typing import Any

import triton
import triton.language as tl

from halfbyte.backends.triton.kernels import arithmetic, arithmetic_ptx
from halfbyte.rules import FIELDS, rule_named

__all__ = ["function_of", "source_of"]


class _Numbers(ast.NodeTransformer):
    """``h.name`` becomes ``name``, and ``x / y`` a call, which GPUs answer in their own ways."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if isinstance(node.value, ast.Name) and node.value.id == "h":
            return ast.copy_location(ast.Name(node.attr, ast.Load()), node)
        return self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Div):
            return node
        divide = ast.Attribute(ast.Name("xp", ast.Load()), "divide", ast.Load())
        return ast.copy_location(ast.Call(divide, [node.left, node.right], []), node)


def source_of(name: str) -> str:
    """Source of a rule's Triton form: no annotations, no docstring, the numbers of FIELDS in place of ``h``.

    >>> print(source_of("adagrad").splitlines()[1])
        v = v + g * g
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(rule_named(name).function)))
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    states = [argument.arg for argument in function.args.args[1:-1]]
    function.decorator_list, function.returns = [], None
    function.args.args = [ast.arg(argument) for argument in ("g", *states, *FIELDS)]
    if ast.get_docstring(function) is not None:
        del function.body[0]
    return ast.unparse(ast.fix_missing_locations(_Numbers().visit(tree))) + "\n"


@functools.cache
def function_of(name: str, ptx: bool = False) -> Any:
    """``triton.jit`` function ``(g, *states, *FIELDS) -> (update, *states)`` of a rule; ``ptx``: for NVIDIA."""
    source, filename = source_of(name), f"halfbyte-rule-{name}.py"
    # Triton reads a function's source by its file name; without a time stamp the entry is never checked against a disk.
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    # Triton's interpreter wants to see its language by name.
    names: dict[str, Any] = {"xp": arithmetic_ptx if ptx else arithmetic, "tl": tl, "__name__": __name__}
    exec(compile(source, filename, "exec"), names)
    return triton.jit(names[rule_named(name).name])
