"""Optimizers with 8-bit, 32-bit and paged states, under bitsandbytes' names and on its state dicts."""

from halfbyte.optim.adagrad import Adagrad, Adagrad8bit, Adagrad32bit
from halfbyte.optim.adam import Adam, Adam8bit, Adam32bit, PagedAdam, PagedAdam8bit, PagedAdam32bit
from halfbyte.optim.adamw import AdamW, AdamW8bit, AdamW32bit, PagedAdamW, PagedAdamW8bit, PagedAdamW32bit
from halfbyte.optim.ademamix import (
    AdEMAMix,
    AdEMAMix8bit,
    AdEMAMix32bit,
    PagedAdEMAMix,
    PagedAdEMAMix8bit,
    PagedAdEMAMix32bit,
)
from halfbyte.optim.adopt import ADOPT, ADOPT8bit, PagedADOPT8bit
from halfbyte.optim.base import Optimizer8bit
from halfbyte.optim.lamb import LAMB, LAMB8bit, LAMB32bit
from halfbyte.optim.lars import LARS, LARS8bit, LARS32bit, PytorchLARS
from halfbyte.optim.lion import Lion, Lion8bit, Lion32bit, PagedLion, PagedLion8bit, PagedLion32bit
from halfbyte.optim.manager import GlobalOptimManager, MockArgs
from halfbyte.optim.release import step_in_backward
from halfbyte.optim.rmsprop import RMSprop, RMSprop8bit, RMSprop32bit
from halfbyte.optim.sgd import SGD, SGD8bit, SGD32bit
from halfbyte.optim.states import Optimizer1State, Optimizer2State

__all__ = [
    "ADOPT",
    "LAMB",
    "LARS",
    "SGD",
    "ADOPT8bit",
    "AdEMAMix",
    "AdEMAMix8bit",
    "AdEMAMix32bit",
    "Adagrad",
    "Adagrad8bit",
    "Adagrad32bit",
    "Adam",
    "Adam8bit",
    "Adam32bit",
    "AdamW",
    "AdamW8bit",
    "AdamW32bit",
    "GlobalOptimManager",
    "LAMB8bit",
    "LAMB32bit",
    "LARS8bit",
    "LARS32bit",
    "Lion",
    "Lion8bit",
    "Lion32bit",
    "MockArgs",
    "Optimizer1State",
    "Optimizer2State",
    "Optimizer8bit",
    "PagedADOPT8bit",
    "PagedAdEMAMix",
    "PagedAdEMAMix8bit",
    "PagedAdEMAMix32bit",
    "PagedAdam",
    "PagedAdam8bit",
    "PagedAdam32bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "PagedLion",
    "PagedLion8bit",
    "PagedLion32bit",
    "PytorchLARS",
    "RMSprop",
    "RMSprop8bit",
    "RMSprop32bit",
    "SGD8bit",
    "SGD32bit",
    "step_in_backward",
]
