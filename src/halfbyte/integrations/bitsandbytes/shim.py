"""What the separate distribution named ``bitsandbytes`` imports: importing this puts the submodules in place."""

from __future__ import annotations

from functools import partial

from halfbyte.integrations.bitsandbytes import names
from halfbyte.integrations.bitsandbytes.finder import put_first
from halfbyte.integrations.libraries import watch

__all__ = ["__dir__", "__getattr__", "__version__", "features", "supported_torch_devices"]

__version__ = names.VERSION
features = set(names.FEATURES)
supported_torch_devices = set(names.SUPPORTED_DEVICES)
__getattr__ = partial(names.lookup, "")
__dir__ = partial(names.public_names, "")

put_first(whole=False)
watch()
