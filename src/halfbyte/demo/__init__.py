"""The demo: a small real model in bf16 and in 4 bits, side by side."""
