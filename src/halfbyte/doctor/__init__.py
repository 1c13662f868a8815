"""The doctor: facts, checks, fixes and reports about the environment that halfbyte runs in."""
