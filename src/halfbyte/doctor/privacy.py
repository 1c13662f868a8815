"""What a report may show: an allow-list of environment variables, and a last filter over every text that goes out."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from halfbyte.doctor.host import Host
from halfbyte.doctor.model import Fix, Result

__all__ = ["ALLOWED_PREFIXES", "ALLOWED_VARIABLES", "Redactor", "allowed"]

ALLOWED_PREFIXES = ("HALFBYTE_", "TRITON_", "NUMBA_", "OMP_", "MKL_", "PYTORCH_", "TORCH_CUDA_", "NCCL_", "BNB_")
ALLOWED_VARIABLES = frozenset(
    {
        "CC", "CONDA_DEFAULT_ENV", "CONDA_PREFIX", "CUDA_DEVICE_ORDER", "CUDA_HOME", "CUDA_LAUNCH_BLOCKING",
        "CUDA_MODULE_LOADING", "CUDA_PATH", "CUDA_VISIBLE_DEVICES", "CXX", "HF_HOME", "HF_HUB_CACHE",
        "HF_HUB_OFFLINE", "HIP_VISIBLE_DEVICES", "HSA_OVERRIDE_GFX_VERSION", "LD_LIBRARY_PATH", "LD_PRELOAD",
        "NVIDIA_DRIVER_CAPABILITIES", "NVIDIA_TF32_OVERRIDE", "NVIDIA_VISIBLE_DEVICES", "PYTHONHOME",
        "PYTHONNOUSERSITE", "PYTHONPATH", "ROCR_VISIBLE_DEVICES", "TRANSFORMERS_CACHE",
        "TRANSFORMERS_OFFLINE", "VIRTUAL_ENV", "XDG_CACHE_HOME", "ZE_AFFINITY_MASK",
    }
)  # fmt: skip

_SECRET_NAME = re.compile(
    r"TOKEN|SECRET|PASSW|APIKEY|API_KEY|ACCESS|CREDENTIAL|PRIVATE|AUTH|_KEY$|^KEY_", re.IGNORECASE
)
_UUID = re.compile(r"\b[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}\b")
_TOKENS = re.compile(
    r"\b(?:hf|api_org)_[A-Za-z0-9]{8,}|\bsk-[A-Za-z0-9_-]{8,}|\bgh[pousr]_[A-Za-z0-9]{8,}|\bgithub_pat_\w{8,}"
    r"|\bxox[abp]-[\w-]{8,}|\bAKIA[A-Z0-9]{12,}|\bey[A-Za-z0-9_-]{10,}\.[\w-]{10,}\.[\w-]*"
)
_LOGIN = re.compile(r"(?<=://)[^/\s:@]+(?::[^/\s@]*)?@")
_PAIR = re.compile(r"(?i)\b(\w*(?:token|secret|passw(?:or)?d|api_?key)\w*)(\s*[=:]\s*)[^\s,;]{4,}")
_ADDRESS = re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]+")
_OTHERS_HOME = re.compile(r"(?<![\w.~])(/home|/Users|[A-Za-z]:\\Users)([/\\])(?!<user>)([^/\\\s:'\"]+)")
_GENERIC = frozenset(
    {"root", "user", "ubuntu", "admin", "runner", "docker", "nobody", "jovyan", "localhost", "app", "vm"}
)
"""User and host names that identify nobody and are ordinary words."""


def allowed(name: str) -> bool:
    """Whether a report may show that environment variable.

    >>> allowed("LD_LIBRARY_PATH"), allowed("HF_TOKEN"), allowed("PYTORCH_API_TOKEN")
    (True, False, False)
    """
    listed = name in ALLOWED_VARIABLES or name.startswith(ALLOWED_PREFIXES)
    return listed and not _SECRET_NAME.search(name)


@dataclass(frozen=True)
class Redactor:
    """Takes private text out of what goes into a report.

    Attributes:
        home: The user's folder, shown as ``~``.
        names: User and host names.
        secrets: Values of environment variables whose names speak of secrets.
    """

    home: str
    names: tuple[str, ...]
    secrets: tuple[str, ...]

    @classmethod
    def of(cls, host: Host) -> Redactor:
        """The filter for that machine."""
        return cls(str(host.home), _names(host.names), _secrets(host.environ))

    def text(self, text: str) -> str:
        """``text`` without home path, names, UUIDs, logins and tokens.

        >>> redactor = Redactor("/home/ann", ("ann",), ("s3cr3t!",))
        >>> redactor.text("/home/ann/x: ann used s3cr3t! on GPU-12345678-1234-1234-1234-123456789012")
        '~/x: <user> used <secret> on GPU-<uuid>'
        """
        for secret in self.secrets:
            text = text.replace(secret, "<secret>")
        text = _TOKENS.sub("<token>", _UUID.sub("<uuid>", _LOGIN.sub("<login>@", text)))
        text = _PAIR.sub(r"\1\2<secret>", text)
        if len(self.home) > 1:
            text = re.sub(rf"{re.escape(self.home)}(?![\w.-])", "~", text)
        text = _OTHERS_HOME.sub(r"\1\2<user>", _ADDRESS.sub("<address>", text))
        for name in self.names:
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", "<user>", text)
        return text

    def result(self, result: Result) -> Result:
        """A result with every text filtered."""
        return replace(
            result,
            summary=self.text(result.summary),
            evidence=tuple(self.text(line) for line in result.evidence),
            fixes=tuple(Fix(self.text(fix.title), self.text(fix.command), fix.safe) for fix in result.fixes),
        )


def _names(names: tuple[str, ...]) -> tuple[str, ...]:
    parts = [part for name in names for part in (name, name.split(".")[0], name.rsplit("\\", 1)[-1])]
    kept = {part for part in parts if len(part) > 1 and part.lower() not in _GENERIC}
    return tuple(sorted(kept, key=len, reverse=True))


def _secrets(environ: Mapping[str, str]) -> tuple[str, ...]:
    found = {
        value
        for name, value in environ.items()
        if _SECRET_NAME.search(name) and len(value) >= 6 and not value.startswith((os.sep, "~"))
    }
    return tuple(sorted(found, key=len, reverse=True))
