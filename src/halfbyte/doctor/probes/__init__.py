"""Programs that run in child processes: each has ``run(arguments, emit)`` and may import anything, or die trying."""
