"""halfbyte: k-bit quantization for PyTorch in pure Python, under bitsandbytes' names and on its bytes.

Importing this package loads neither torch, triton nor numba; every name is resolved at first use (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from halfbyte._version import __version__

if TYPE_CHECKING:
    from halfbyte.integrations.bitsandbytes import install_as_bitsandbytes
    from halfbyte.nn.receipt import receipt

_HOME = {
    "autograd": "halfbyte.autograd",
    "backends": "halfbyte.backends",
    "checkpoint": "halfbyte.checkpoint",
    "errors": "halfbyte.errors",
    "formats": "halfbyte.formats",
    "functional": "halfbyte.functional",
    "install_as_bitsandbytes": "halfbyte.integrations.bitsandbytes",
    "MatmulLtState": "halfbyte.autograd",
    "matmul": "halfbyte.autograd",
    "matmul_4bit": "halfbyte.autograd",
    "nn": "halfbyte.nn",
    "optim": "halfbyte.optim",
    "receipt": "halfbyte.nn.receipt",
}
"""Public name -> the module it is, or is found in."""

__all__ = ["__version__", "install_as_bitsandbytes", "receipt"]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'halfbyte' has no attribute {name!r}")
    module = importlib.import_module(home)
    # halfbyte.backends also has a function of its own name.
    value = module if home == f"{__name__}.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
