"""The ``halfbyte`` command: one thin module a command (parse, call, render)."""
