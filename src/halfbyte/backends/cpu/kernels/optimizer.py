"""Optimizer steps over blocks of values: decode the states, apply the rule in registers, encode the states again.

The rule is the same Python function as everywhere (``halfbyte/rules``): with ``xp`` bound to :class:`Lanes`, calling it
on registers writes its instructions.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from halfbyte.backends.cpu.kernels.emitter import Emitter
from halfbyte.backends.cpu.kernels.levels import Level
from halfbyte.backends.cpu.kernels.quantize import TINY, Blocks
from halfbyte.backends.cpu.kernels.ssa import F32, I8, I32, Type, Value
from halfbyte.backends.cpu.kernels.values import ITEMSIZE, load_float, round_to, store_float
from halfbyte.rules import FIELDS, Rule, bind, rule_named

__all__ = ["ARGUMENTS_8BIT", "ARGUMENTS_32BIT", "emit_8bit", "emit_32bit"]

ARGUMENTS_32BIT = ("param", "grad", "state0", "state1", "state2", "hyper", "seed", "first", "blocks", "blocks_a_piece")
"""``hyper``: address of the fp32 numbers; ``first``: number of the first element, for random rounding."""

ARGUMENTS_8BIT = (
    *ARGUMENTS_32BIT,
    *(f"{what}{number}" for number in range(3) for what in ("absmax", "code", "ranks", "shift")),
)
"""``ranks``: one i32 for each run of fp32 bit patterns, ``shift``: see ``formats/ranks.py``."""

INFINITY = 0x7F800000


class Lanes:
    """Registers as the namespace of a rule."""

    def __init__(self, e: Emitter) -> None:
        self._e = e

    def sqrt(self, x: Value) -> Value:
        return self._e.call(f"llvm.sqrt.{x.type.suffix}", x.type, [x])

    def where(self, condition: Value, yes: Any, no: Any) -> Value:
        single = condition.type.of("float")
        return self._e.select(condition, self._e.as_value(single, yes), self._e.as_value(single, no))

    def maximum(self, x: Value, y: Any) -> Value:
        return self.where(x > y, x, y)

    def minimum(self, x: Value, y: Any) -> Value:
        return self.where(x < y, x, y)


class Step:
    """One register of elements: the rule and what surrounds it, as the reference has it."""

    def __init__(self, e: Emitter, level: Level, rule: Rule, hyper: Value, skip_zeros: bool) -> None:
        self._e, self._level, self._rule, self._skip = e, level, rule, skip_zeros
        self._function: Callable[..., Any] = bind(rule.function, Lanes(e))
        self._h = SimpleNamespace(
            **{name: e.splat(e.load(F32, hyper + 4 * i), level.lanes) for i, name in enumerate(FIELDS)}
        )
        self._decays = self._h.weight_decay > 0.0

    def _finite(self, value: Value) -> Value:
        e = self._e
        return e.compare("ult", e.bits(value, value.type.of("i32")) & 0x7FFFFFFF, INFINITY)

    def __call__(self, p: Value, g: Value, states: list[Value]) -> tuple[Value, list[Value]]:
        """New parameter and states; the old ones where something is not finite, or a zero gradient is skipped."""
        e, h = self._e, self._h
        active = e.compare("une", g, 0.0) if self._skip else None
        g = g * h.grad_scale
        if self._rule.decay == "coupled":
            g = e.select(self._decays, g + h.weight_decay * p, g)
        update, *fresh = self._function(g, *states, h)
        update = update * h.update_scale
        decayed = p
        if self._rule.decay == "decoupled":
            decayed = e.select(self._decays, p - (h.lr * h.weight_decay) * p, p)
        stepped = decayed - h.lr * update
        ok = self._finite(update)
        for state in fresh:
            ok = ok & self._finite(state)
        if active is not None:
            ok = ok & active
        # Nearly always all are: then nothing is left to choose.
        kept = [e.variable(new.type, new) for new in (stepped, *fresh)]
        every = e.call(f"llvm.vector.reduce.and.{ok.type.suffix}", Type("i1"), [ok])
        with e.when(e.compare("eq", every, 0)):
            for new, old in zip(kept, (p, *states), strict=True):
                new.set(e.select(ok, new.get(), old))
        return kept[0].get(), [state.get() for state in kept[1:]]


def _random(e: Emitter, element: Value, seed: Value, lanes: int) -> Value:
    """16 random bits a lane, as in the reference's ``random_bits``."""
    word = Type("i32", lanes)
    x = e.splat(e.convert("trunc", element, "i32"), lanes) + e.const(word, list(range(lanes)))
    x = x + e.splat(e.convert("trunc", seed, "i32") * 0x9E3779B9, lanes)
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return (x ^ (x >> 16)) & 0xFFFF


def _store(e: Emitter, level: Level, value: Value, address: Value, dtype: str, random: Value | None) -> None:
    if random is None and dtype == "f32":
        e.store(value, address, volatile=True)
        return
    if random is None:
        store_float(e, level, value, address, dtype)
        return
    bits = e.bits(value, value.type.of("i32"))
    finite = e.compare("ult", bits & 0x7FFFFFFF, INFINITY)
    rounded = e.select(finite, (bits + random) >> 16, round_to(e, level, value, dtype))
    e.store(e.convert("trunc", rounded, "i16"), address)


def emit_32bit(
    e: Emitter, level: Level, *, rule: str, dtype: str, grad: str, blocksize: int, skip_zeros: bool, random: bool
) -> None:
    """Write the step over fp32 states; ``blocksize`` is how many elements a piece is counted in."""
    args = {name: e.argument(name) for name in ARGUMENTS_32BIT}
    algorithm = rule_named(rule)
    step = Step(e, level, algorithm, args["hyper"], skip_zeros)
    states = [args[f"state{number}"] for number in range(len(algorithm.signed))]
    with e.pieces() as piece:
        start = piece * args["blocks_a_piece"]
        stop = start + args["blocks_a_piece"]
        stop = e.least(stop, args["blocks"])
        with e.loop(start * blocksize, stop * blocksize, level.lanes) as element:
            at = args["param"] + element * ITEMSIZE[dtype]
            p = load_float(e, level, at, dtype, level.lanes)
            g = load_float(e, level, args["grad"] + element * ITEMSIZE[grad], grad, level.lanes)
            places = [state + (element << 2) for state in states]
            p, fresh = step(p, g, [e.load(Type("float", level.lanes), place) for place in places])
            bits = _random(e, element + args["first"], args["seed"], level.lanes) if random else None
            _store(e, level, p, at, dtype, bits)
            for value, place in zip(fresh, places, strict=True):
                e.store(value, place, volatile=True)


def gathers(level: Level) -> bool:
    """Whether tables are read by gathers."""
    return level.lanes == 16


class _Codes:
    """One 8-bit state: its arguments, blocks of it in fp32 on the stack, the absmax of one so far.

    Tables are read by gathers with AVX-512: Intel inserts and extracts lanes on one port. With AVX2 (Zen 3) a gather is
    slower than one load after the other; then keys and entries of a block go through the stack.
    """

    def __init__(
        self, e: Emitter, level: Level, args: dict[str, Value], number: int, blocksize: int, signed: bool, slots: int
    ) -> None:
        self._e, self._level, self._lanes, self._signed = e, level, level.lanes, signed
        self._state, self._absmax, self._code, self._ranks, shift = (
            args[f"{what}{number}"] for what in ("state", "absmax", "code", "ranks", "shift")
        )
        self._shift = e.splat(e.convert("trunc", shift, "i32"), level.lanes)
        self._mask = (e.const(self._shift.type, 1) << self._shift) - 1
        self._values, self._slots = e.buffer(F32, slots * blocksize), slots
        self._gathers, self._blocksize = gathers(level), blocksize
        self._keys = e.buffer(I32, 0 if self._gathers else blocksize)
        self._largest = e.variable(Type("i32", level.lanes), 0)

    def _at(self, block: Value) -> Value:
        """Where the block's values are kept."""
        if self._slots == 1:
            return self._values
        return self._values + (block & (self._slots - 1)) * (4 * self._blocksize)

    def begin(self, block: Value) -> None:
        self._scale = self._e.splat(self._e.load(F32, self._absmax + (block << 2)), self._lanes)
        self._largest.set(0)
        self._kept = self._at(block)

    def decode(self, element: Value) -> Value:
        e, found = self._e, self._e.undef(Type("float", self._lanes))
        if self._gathers:
            index = e.convert("zext", e.load(Type("i8", self._lanes), self._state + element), "i32")
            return e.bits(self._level.gather(e, self._code, index), found.type) * self._scale
        for lane in range(self._lanes):
            index = e.convert("zext", e.load(I8, self._state + element + lane), "i64")
            found = e.insert(found, e.load(F32, self._code + (index << 2)), lane)
        return found * self._scale

    def keep(self, value: Value, place: Value) -> None:
        e = self._e
        e.store(value, self._kept + (place << 2))
        self._largest.set(e.maximum(self._largest.get(), e.bits(value, self._largest.type) & 0x7FFFFFFF))

    def scale(self, block: Value, walk: Blocks) -> Value:
        """Store the kept block's absmax; returns what its values, as they now are, are multiplied with for a code."""
        e = self._e
        absmax = e.bits(e.largest(self._largest.get()), F32)
        e.store(absmax, self._absmax + (block << 2))
        boost, reciprocal = walk.factors(absmax)
        with e.when(e.compare("ult", absmax, TINY)), e.loop(0, self._blocksize, self._lanes) as place:
            at = self._at(block) + (place << 2)
            e.store(e.load(boost.type, at) * boost, at)
        return reciprocal

    def _key(self, at: Value, factor: Value) -> tuple[Value, Value]:
        """Key of each value, and its bits below."""
        e = self._e
        bits = e.bits(e.load(factor.type, at) * factor, self._shift.type)
        rest = bits ^ e.shift_sign(bits, 31) if self._signed else bits
        return bits >> self._shift, rest & self._mask

    def _store(self, entry: Value, rest: Value, element: Value) -> None:
        e = self._e
        e.store(e.convert("trunc", (entry + rest) >> self._shift, "i8"), self._state + element)

    def encode_some(self, block: Value, place: Value, factor: Value) -> None:
        """Store one register of the block's codes; by gathers."""
        key, rest = self._key(self._at(block) + (place << 2), factor)
        self._store(self._level.gather(self._e, self._ranks, key), rest, block * self._blocksize + place)

    def encode(self, block: Value, factor: Value) -> None:
        """Store all of the block's codes."""
        e, word, begin = self._e, self._shift.type, block * self._blocksize
        if self._gathers:
            with e.loop(0, self._blocksize, self._lanes) as place:
                self.encode_some(block, place, factor)
            return
        with e.loop(0, self._blocksize, self._lanes) as place:
            key, rest = self._key(self._values + (place << 2), factor)
            e.store(key, self._keys + (place << 2))
            e.store(rest, self._values + (place << 2))
        with e.loop(0, self._blocksize, UNROLLED) as place:
            for i in range(UNROLLED):
                at = self._keys + ((place + i) << 2)
                e.store(e.load(I32, self._ranks + (e.convert("zext", e.load(I32, at), "i64") << 2)), at)
        with e.loop(0, self._blocksize, self._lanes) as place:
            entry, rest = e.load(word, self._keys + (place << 2)), e.load(word, self._values + (place << 2))
            self._store(entry, rest, begin + place)


UNROLLED = 8
"""Table entries that are read in a row."""

AHEAD = 2048
"""Bytes that fp32 parameters and gradients are fetched ahead: hardware stops at the end of a page."""


class _Walk:
    """Steps and encodes blocks, of which the caller says which."""

    def __init__(
        self, e: Emitter, level: Level, args: dict[str, Value], step: Step, states: list[_Codes], **variant: Any
    ) -> None:
        self._e, self._level, self._args, self._step, self._states = e, level, args, step, states
        self._dtype, self._grad, self._blocksize, self._random = (
            variant[name] for name in ("dtype", "grad", "blocksize", "random")
        )
        self._blocks = Blocks(e, level, "f32")

    def _load(self, name: str, element: Value, dtype: str) -> tuple[Value, Value]:
        at = self._args[name] + element * ITEMSIZE[dtype]
        if dtype == "f32":
            self._e.prefetch(at + AHEAD)
        return at, load_float(self._e, self._level, at, dtype, self._level.lanes)

    def _some(self, block: Value, place: Value) -> None:
        e, level = self._e, self._level
        element = block * self._blocksize + place
        at, p = self._load("param", element, self._dtype)
        _, g = self._load("grad", element, self._grad)
        p, fresh = self._step(p, g, [state.decode(element) for state in self._states])
        bits = _random(e, element + self._args["first"], self._args["seed"], level.lanes) if self._random else None
        _store(e, level, p, at, self._dtype, bits)
        for state, value in zip(self._states, fresh, strict=True):
            state.keep(value, place)

    def step(self, block: Value, behind: list[Value] | None = None) -> None:
        """Step the block; with the factors of the one before it, encode that one meanwhile."""
        for state in self._states:
            state.begin(block)
        with self._e.loop(0, self._blocksize, self._level.lanes) as place:
            self._some(block, place)
            for state, factor in zip(self._states if behind else [], behind or [], strict=True):
                state.encode_some(block - 1, place, factor)

    def scale(self, block: Value) -> list[Value]:
        """Store the scales of the block that was stepped last; returns the factors to encode it with."""
        return [state.scale(block, self._blocks) for state in self._states]

    def encode(self, block: Value, factors: list[Value]) -> None:
        """Store the block's codes."""
        for state, factor in zip(self._states, factors, strict=True):
            state.encode(block, factor)


def emit_8bit(
    e: Emitter,
    level: Level,
    *,
    rule: str,
    dtype: str,
    grad: str,
    blocksize: int,
    skip_zeros: bool,
    random: bool,
    signs: str,
) -> None:
    """Write the step over 8-bit states in whole blocks of ``blocksize``; ``signs``: s or u for each state's map."""
    args = {name: e.argument(name) for name in ARGUMENTS_8BIT}
    step = Step(e, level, rule_named(rule), args["hyper"], skip_zeros)
    slots = 2 if gathers(level) else 1
    states = [_Codes(e, level, args, number, blocksize, sign == "s", slots) for number, sign in enumerate(signs)]
    walk = _Walk(e, level, args, step, states, dtype=dtype, grad=grad, blocksize=blocksize, random=random)
    with e.pieces() as piece:
        start = piece * args["blocks_a_piece"]
        stop = e.least(start + args["blocks_a_piece"], args["blocks"])
        if slots == 1:
            with e.loop(start, stop) as block:
                walk.step(block)
                walk.encode(block, walk.scale(block))
            return
        # A block is encoded while the next is stepped: roots and quotients keep other units busy than tables do.
        walk.step(start)
        with e.loop(start + 1, stop) as block:
            walk.step(block, walk.scale(block - 1))
        walk.encode(stop - 1, walk.scale(stop - 1))
