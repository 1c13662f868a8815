"""Checkpoints: reading, checking and atomically writing safetensors files with 4-bit weights."""

from halfbyte.checkpoint.keys import group_by_weight
from halfbyte.checkpoint.module import load, save
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.writer import write

__all__ = ["Checkpoint", "group_by_weight", "load", "save", "write"]
