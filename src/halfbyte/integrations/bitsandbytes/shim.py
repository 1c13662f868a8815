"""What the separate distribution named ``bitsandbytes`` imports: importing this puts the submodules in place."""

from __future__ import annotations

from functools import partial

from halfbyte.integrations import libraries
from halfbyte.integrations.bitsandbytes import names
from halfbyte.integrations.bitsandbytes.finder import attribute, define_ops, put_first, top_level

__all__ = ["__dir__", "__getattr__", "__version__", "features", "supported_torch_devices"]

__getattr__ = partial(attribute, "")
__dir__ = partial(names.public_names, "")
__version__, features, supported_torch_devices = top_level().values()

put_first(whole=False)
define_ops()
libraries.watch()
