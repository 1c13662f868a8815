"""Who installs packages here, so that every fix is a command of the tool that the user has."""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.doctor import fixes
from halfbyte.doctor.host import Host
from halfbyte.doctor.model import Fix
from halfbyte.doctor.registry import fact

__all__ = ["Installer", "installer"]


@dataclass(frozen=True)
class Installer:
    """Makes fixes for this environment.

    Attributes:
        tool: Of :func:`halfbyte.doctor.fixes.detect_tool`.
        distribution: Family of the Linux distribution; empty where unknown.
        python: ``"3.11"``.
    """

    tool: fixes.Tool = "pip"
    distribution: str = ""
    python: str = "3.11"

    def install(
        self, title: str, requirement: str, *, index_url: str | None = None, upgrade: bool = False, force: bool = False
    ) -> Fix:
        """A fix that installs one requirement."""
        command = fixes.install_command(self.tool, requirement, index_url=index_url, upgrade=upgrade, force=force)
        after = fixes.after_install(self.tool)
        return Fix(f"{title}, then restart the runtime" if after else title, command)

    def system(self, what: str, title: str) -> tuple[Fix, ...]:
        """A fix that an administrator types; empty where the distribution is unknown."""
        command = fixes.system_command("compiler" if what == "compiler" else "headers", self.distribution, self.python)
        return (Fix(title, command),) if command else ()


@fact
def installer(host: Host) -> Installer:
    """The installer and distribution."""
    tool = fixes.detect_tool(host.environ, host.prefix, host.cwd)
    distribution = fixes.detect_distribution(host.read("/etc/os-release"))
    return Installer(tool, distribution, f"{host.python[0]}.{host.python[1]}")
