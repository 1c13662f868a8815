"""bitsandbytes' module names for halfbyte: what stands where, how Python finds it, and how it is put in place."""

from halfbyte.integrations.bitsandbytes.install import install_as_bitsandbytes
from halfbyte.integrations.bitsandbytes.names import VERSION

__all__ = ["VERSION", "install_as_bitsandbytes"]
