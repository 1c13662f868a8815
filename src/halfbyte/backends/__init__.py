"""How ops are computed: one folder a backend, mirrored on ``ops/``; the registry picks.

Importing this package defines the ops and binds them to the registry; the backend folders are imported at first use.
"""

from halfbyte.backends.registry import Backend, Verdict, backends, explain, implements, register, unregister

__all__ = ["Backend", "Verdict", "backends", "explain", "implements", "register", "unregister"]
