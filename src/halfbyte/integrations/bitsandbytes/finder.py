"""How Python finds ``bitsandbytes`` and its submodules: an import finder that also answers for its metadata."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

from halfbyte.integrations.bitsandbytes import names
from halfbyte.integrations.bitsandbytes.retired import advice_for_module
from halfbyte.integrations.post_import import after_import

if TYPE_CHECKING:
    from importlib.metadata import Distribution, DistributionFinder

__all__ = ["Finder", "Loader", "attribute", "define_ops", "find_installed", "put_first", "top_level"]

NAME = "bitsandbytes"

_MAIN = "import sys\nfrom halfbyte.cli.main import main\nif __name__ == '__main__':\n    sys.exit(main(sys.argv[1:]))\n"


class Loader:
    """Makes modules whose every attribute is looked up in halfbyte when it is asked for."""

    def __init__(self, module: str) -> None:
        self.module = module

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """None, for Python's own kind of module.

        Raises:
            ImportError: This part of bitsandbytes is not there (yet).
        """
        if not names.is_there(self.module):
            raise ImportError(names.missing(self.module), name=spec.name)
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its lookup; nothing is imported by it."""
        if self.module == "__main__":
            exec(self.get_code(module.__name__), vars(module))
            return
        module.__file__ = names.__file__
        module.__dict__["__getattr__"] = partial(attribute, self.module)
        module.__dict__["__dir__"] = partial(names.public_names, self.module)
        if not self.module:
            module.__dict__.update(top_level())
            define_ops()

    def get_code(self, fullname: str) -> CodeType:
        """What ``python -m bitsandbytes`` runs: halfbyte's doctor."""
        return compile(_MAIN if self.module == "__main__" else "", f"<halfbyte as {fullname}>", "exec")


def attribute(module: str, name: str) -> Any:
    """``bitsandbytes.<module>.<name>``, the list of names included."""
    return names.public_names(module) if name == "__all__" else names.lookup(module, name)


def top_level() -> dict[str, Any]:
    """The names of ``bitsandbytes`` itself that are plain values."""
    return {
        "__version__": names.VERSION,
        "features": set(names.FEATURES),
        "supported_torch_devices": set(names.SUPPORTED_DEVICES),
    }


def define_ops() -> None:
    """Define ``torch.ops.bitsandbytes``, now or as soon as torch is loaded, and log where bitsandbytes would."""
    # Levels and handlers that a script sets on "bitsandbytes" hold for what stands in its place.
    logging.getLogger("halfbyte").parent = logging.getLogger(NAME)
    after_import("torch", _define_ops)


def _define_ops() -> None:
    importlib.import_module("halfbyte.integrations.bitsandbytes.ops").define()


class Finder:
    """An entry of ``sys.meta_path``.

    Args:
        whole: Answer for ``bitsandbytes`` itself and its metadata too, not only for its submodules (which is enough
            where a distribution of that name brings the module).
    """

    def __init__(self, whole: bool) -> None:
        self.whole = whole

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Spec of ``bitsandbytes`` or one of its submodules, else None."""
        del path, target
        root, _, module = fullname.partition(".")
        known = module in names.MODULES or advice_for_module(module) is not None
        if root != NAME or not known or (not module and not self.whole):
            return None
        package = not module or any(other.startswith(f"{module}.") for other in names.MODULES)
        return ModuleSpec(fullname, Loader(module), origin="halfbyte", is_package=package)  # pyright: ignore[reportArgumentType]

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterator[Distribution]:
        """The metadata that ``importlib.metadata.version("bitsandbytes")`` reads."""
        if self.whole and (context is None or context.name is None or context.name.lower() == NAME):
            from halfbyte.integrations.bitsandbytes.distribution import StandInDistribution

            yield StandInDistribution()

    def invalidate_caches(self) -> None:
        """There are none."""


def find_installed() -> Finder | None:
    """The finder that is in place, if any."""
    return next((entry for entry in sys.meta_path if isinstance(entry, Finder)), None)


def put_first(whole: bool) -> None:
    """Put a finder first on ``sys.meta_path``, unless one is there that answers for as much."""
    there = find_installed()
    if there is not None and (there.whole or not whole):
        return
    if there is not None:
        there.whole = True
        return
    sys.meta_path.insert(0, Finder(whole))  # pyright: ignore[reportArgumentType]
