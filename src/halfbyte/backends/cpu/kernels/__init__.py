"""The CPU kernels as descriptions that write LLVM IR; one description each, whatever the CPU."""
