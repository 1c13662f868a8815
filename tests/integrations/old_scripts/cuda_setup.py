"""Asking for the CUDA set-up of that time."""
# error: hint: use `python -m bitsandbytes`, which runs halfbyte's doctor

import bitsandbytes as bnb
import torch

assert torch.cuda.is_available() == bnb.COMPILED_WITH_CUDA
from bitsandbytes.cextension import COMPILED_WITH_CUDA  # noqa: E402

assert torch.cuda.is_available() == COMPILED_WITH_CUDA
from bitsandbytes.cuda_setup.main import CUDASetup  # noqa: E402

CUDASetup.get_instance().print_log_stack()
