"""bitsandbytes, as halfbyte does it."""

from halfbyte.integrations.bitsandbytes.shim import __dir__ as __dir__
from halfbyte.integrations.bitsandbytes.shim import __getattr__ as __getattr__
from halfbyte.integrations.bitsandbytes.shim import __version__ as __version__
from halfbyte.integrations.bitsandbytes.shim import features as features
from halfbyte.integrations.bitsandbytes.shim import supported_torch_devices as supported_torch_devices
