"""Remedies that name a torch build: which one, is looked up in the table of versions.

The build is one for the oldest Python that halfbyte supports, so that the command works for every reader.
"""

from __future__ import annotations

from halfbyte.doctor import versions
from halfbyte.doctor.catalogue.entry import Remedy

__all__ = ["torch_for_capability", "torch_for_cuda", "torch_for_driver"]

_PYTHON = (3, 10)


def _remedy(title: str, wheel: versions.Wheel | None) -> tuple[Remedy, ...]:
    if wheel is None:
        return ()
    return (Remedy(title, install=wheel.requirement, index_url=wheel.index_url, force=True),)


def torch_for_driver(driver: str, when: str) -> tuple[Remedy, ...]:
    """The newest torch that a driver of at least this branch runs.

    >>> torch_for_driver("525", "driver 525 to 579")[0].install
    'torch==2.14.*'
    """
    wheel = versions.newest_torch_for(driver=driver, python=_PYTHON)
    return _remedy(f"{when}: install torch for CUDA {wheel.cuda}" if wheel else "", wheel)


def torch_for_cuda(cuda: str) -> tuple[Remedy, ...]:
    """The newest torch for a driver that supports CUDA up to this version.

    >>> torch_for_cuda("12.4")[0].index_url
    'https://download.pytorch.org/whl/cu126'
    """
    driver = versions.driver_needed(cuda)
    wheel = versions.newest_torch_for(driver=driver, python=_PYTHON) if driver else None
    return _remedy(f"keep the driver, install the last torch for CUDA {wheel.cuda}" if wheel else "", wheel)


def torch_for_capability(capability: tuple[int, int]) -> tuple[Remedy, ...]:
    """The newest torch with code for a GPU.

    >>> torch_for_capability((6, 0))[0].install, torch_for_capability((3, 7))
    ('torch==2.14.*', ())
    """
    wheel = versions.newest_torch_for(capability=capability, python=_PYTHON)
    major, minor = capability
    return _remedy(f"install a torch build with code for sm_{major}{minor}", wheel)
