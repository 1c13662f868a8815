"""The distribution metadata under which halfbyte stands in for bitsandbytes."""

from __future__ import annotations

import os
from importlib.metadata import Distribution

from halfbyte.integrations.bitsandbytes.names import VERSION

__all__ = ["StandInDistribution"]


class StandInDistribution(Distribution):
    """Answers ``importlib.metadata.version("bitsandbytes")``.

    >>> StandInDistribution().version
    '0.50.2+halfbyte'
    """

    def read_text(self, filename: str) -> str | None:
        """METADATA and top_level.txt; None for any other file."""
        if filename == "METADATA":
            return (
                "Metadata-Version: 2.1\n"
                "Name: bitsandbytes\n"
                f"Version: {VERSION}\n"
                "Summary: halfbyte under the name of bitsandbytes, in this process only\n"
            )
        return "bitsandbytes\n" if filename == "top_level.txt" else None

    def locate_file(self, path: str | os.PathLike[str]) -> os.PathLike[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """There are no files.

        Raises:
            FileNotFoundError: Always.
        """
        raise FileNotFoundError(f"{os.fspath(path)}: halfbyte stands in for bitsandbytes in memory, without files")
