"""Runs the selected checks in order, first broken layer first, and draws the verdict."""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from halfbyte.doctor import registry
from halfbyte.doctor.host import Host
from halfbyte.doctor.model import Result, Status
from halfbyte.doctor.registry import Check

__all__ = ["Facts", "Finding", "run_checks"]


@dataclass(frozen=True)
class Finding:
    """A check and what it said. ``asked`` is False for one that ran only because another requires it."""

    check: Check
    result: Result
    asked: bool = True


@dataclass
class Facts:
    """Facts by name, each gathered once, at first use. ``given`` ones are taken as they are."""

    host: Host
    given: Mapping[str, Any] = field(default_factory=dict[str, Any])
    _values: dict[str, Any] = field(default_factory=dict[str, Any])
    _errors: dict[str, Exception] = field(default_factory=dict[str, Exception])
    _locks: dict[str, threading.Lock] = field(default_factory=dict[str, threading.Lock])
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def __getitem__(self, name: str) -> Any:
        if name == "host":
            return self.host
        if name in self.given:
            return self.given[name]
        with self._guard:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            if name not in self._values and name not in self._errors:
                self._gather(name)
        if name in self._errors:
            raise self._errors[name]
        return self._values[name]

    def _gather(self, name: str) -> None:
        rule = registry.facts()[name]
        try:
            self._values[name] = rule.function(**{part: self[part] for part in rule.wants})
        except Exception as error:  # kept, so that every check that wants it reports the same crash
            self._errors[name] = error

    def prefetch(self, names: Sequence[str]) -> None:
        """Gather facts side by side; what fails is reported by the checks that want it."""
        missing = [name for name in names if name not in self.given]
        if missing:
            with ThreadPoolExecutor(len(missing)) as pool:
                for future in [pool.submit(self._quietly, name) for name in missing]:
                    future.result()

    def _quietly(self, name: str) -> None:
        with contextlib.suppress(Exception):  # kept in _errors by _gather, and raised again to each check
            self[name]


def run_checks(facts: Facts, checks: Sequence[Check], asked: frozenset[str]) -> list[Finding]:
    """Run ``checks`` (as :func:`registry.select` orders them): those that read files first, then those that compute.

    Returns:
        One finding a check, in the given order.
    """
    results: dict[str, Result] = {}
    slow = {name for name, rule in registry.facts().items() if rule.slow}
    later: list[Check] = []
    held: set[str] = set()
    ordered = _by_requirement(checks)
    for check in ordered:
        if registry.closure(check.wants) & slow or held & set(check.requires):
            later.append(check)
            held.add(check.code)
        else:
            results[check.code] = _run(check, facts, results)
    wanted: set[str] = set()
    for check in later:
        if all(_holds(results.get(code)) for code in check.requires):
            wanted |= registry.closure(check.wants) & slow
    facts.prefetch(sorted(wanted))
    for check in later:
        results[check.code] = _run(check, facts, results)
    _weigh_proofs(ordered, results)
    return [Finding(check, results[check.code], check.code in asked) for check in checks]


def _holds(result: Result | None) -> bool:
    """Whether what requires this check is reached; None (not run yet) may still hold."""
    return result is None or (result.status in {Status.PASS, Status.WARN} and not result.blocking)


def _by_requirement(checks: Sequence[Check]) -> list[Check]:
    """``checks`` with every prerequisite before what requires it."""
    codes = {check.code for check in checks}
    waiting = list(checks)
    ordered: list[Check] = []
    done: set[str] = set()
    while waiting:
        ready = [check for check in waiting if not (set(check.requires) & codes) - done] or waiting
        ordered.extend(ready)
        done |= {check.code for check in ready}
        waiting = [check for check in waiting if check.code not in done]
    return ordered


def _weigh_proofs(checks: Sequence[Check], results: dict[str, Result]) -> None:
    """Let what was tried decide over what was read; see :attr:`Check.proof`."""
    for check in checks:
        read, tried = results[check.code], results.get(check.proof)
        if read.status is not Status.FAIL or tried is None:
            continue
        if tried.status is Status.PASS:
            note = f"yet {check.proof} passes: it works all the same"
            results[check.code] = replace(read, status=Status.WARN, evidence=(*read.evidence, note))
        elif tried.status is Status.FAIL:
            evidence = (*read.evidence, *(line for line in tried.evidence if line not in read.evidence))
            results[check.code] = replace(read, evidence=evidence)
            results[check.proof] = Result(Status.BLOCKED, f"not reached: {check.code} comes first")


def _run(check: Check, facts: Facts, results: Mapping[str, Result]) -> Result:
    for code in check.requires:
        before = results[code]
        if before.status is Status.SKIP:
            return Result.skipped(before.summary)
        if before.status is Status.BLOCKED:
            return before
        if before.blocking or before.status in {Status.FAIL, Status.CRASH}:
            return Result(Status.BLOCKED, f"not reached: {code} comes first")
    try:
        return check.function(**{name: facts[name] for name in check.wants})
    except Exception as error:
        lines = traceback.format_exception(type(error), error, error.__traceback__)
        last = "".join(lines[-2:]).strip().splitlines()
        return Result(Status.CRASH, f"the check itself failed: {type(error).__name__}: {error}", tuple(last[-6:]))
