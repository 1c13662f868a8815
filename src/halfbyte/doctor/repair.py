"""``--fix``: carries out what is reversible and within the user's own files: an environment file, a cache folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from halfbyte.doctor.model import Fix, Status
from halfbyte.doctor.run import Finding

__all__ = ["Plan", "carry_out", "environment_file", "plan"]


@dataclass(frozen=True)
class Plan:
    """What would be done.

    Attributes:
        file: Environment file that is written.
        exports: Its new lines, ``export NAME=VALUE``.
        folders: Folders that are made.
    """

    file: Path
    exports: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.exports or self.folders)

    @property
    def lines(self) -> tuple[str, ...]:
        """The plan in words."""
        made = tuple(f"make the folder {folder}" for folder in self.folders)
        return made + tuple(f"write to {self.file}: {line}" for line in self.exports)


def environment_file(home: Path) -> Path:
    """Where variables are put; removing it undoes everything."""
    return home / ".config" / "halfbyte" / "environment.sh"


def plan(findings: Iterable[Finding], home: Path) -> Plan:
    """The safe fixes of everything that is not well: the first one of each finding."""
    exports: list[str] = []
    folders: list[Path] = []
    for fix in _safe(findings):
        for step in fix.command.split(" && "):
            if re.fullmatch(r"export [A-Z_]+=[^\n;|`]*", step):
                exports.append(step)
            elif match := re.fullmatch(r"mkdir -p (~?[\w./-]+)", step):
                folders.append(home / match[1].removeprefix("~/") if match[1].startswith("~") else Path(match[1]))
    return Plan(environment_file(home), tuple(dict.fromkeys(exports)), tuple(dict.fromkeys(folders)))


def _safe(findings: Iterable[Finding]) -> Sequence[Fix]:
    unwell = [each.result for each in findings if each.result.status in {Status.WARN, Status.FAIL}]
    return [safe[0] for result in unwell if (safe := [fix for fix in result.fixes if fix.safe])]


def carry_out(chosen: Plan) -> None:
    """Make the folders and write the environment file, keeping variables that it sets already.

    Raises:
        OSError: A folder or the file cannot be written.
    """
    for folder in chosen.folders:
        folder.mkdir(parents=True, exist_ok=True)
    if not chosen.exports:
        return
    chosen.file.parent.mkdir(parents=True, exist_ok=True)
    old = chosen.file.read_text().splitlines() if chosen.file.exists() else ["# Written by halfbyte doctor --fix"]
    new = {line.split("=", 1)[0] for line in chosen.exports}
    kept = [line for line in old if line.split("=", 1)[0] not in new]
    chosen.file.write_text("\n".join([*kept, *chosen.exports]) + "\n")
