"""Sixteen float32 at once, as a value that compiled code can hold in a variable.

LLVM's own vectoriser handles long loops well, but attention's rows of 64 numbers are over before its unrolled loops and
checks for overlap have paid for themselves. LLVM maps the sixteen lanes to whatever the machine has: one register of
AVX-512, two of AVX2, four of NEON; the order of sums is the same everywhere.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types as numba_types
from numba.extending import models, register_model

from loraplex.server.native.intrinsics import cgutils, instruction, narrow_bits, types, widen_bits

LANES = 16

_FLOAT = ir.FloatType()
_LANES_TYPE = ir.VectorType(_FLOAT, LANES)
_INDEX = ir.IntType(32)


class _Lanes(numba_types.Type):
    """Numba's type of sixteen float32."""

    def __init__(self) -> None:
        super().__init__(name="Float32x16")


lanes_type = _Lanes()


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    """Held as one LLVM vector."""

    def __init__(self, manager: Any, kind: Any) -> None:
        initialize: Any = super().__init__
        initialize(manager, kind, _LANES_TYPE)


def _shuffle(builder: Any, a: Any, b: Any, order: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INDEX, len(order)), order))


@instruction
def load(typing_context: Any, pointer: Any, index: Any) -> Any:
    """Return pointer[index:index + 16] as float32; the pointer is to float32 or to the bits of bfloat16."""
    half = pointer.dtype == types.uint16

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element = ir.IntType(16) if half else _FLOAT
        vector = ir.VectorType(element, LANES)
        address = builder.bitcast(builder.gep(args[0], [args[1]]), vector.as_pointer())
        loaded = builder.load(address, align=2 if half else 4)
        return widen_bits(builder, loaded) if half else loaded

    return lanes_type(pointer, types.int64), generate


def _first(builder: Any, count: Any, lanes: int) -> Any:
    """Build the mask of the first `count` of so many lanes."""
    numbers = ir.Constant(ir.VectorType(ir.IntType(64), lanes), list(range(lanes)))
    one = builder.insert_element(ir.Constant(numbers.type, ir.Undefined), count, _INDEX(0))
    return builder.icmp_signed("<", numbers, _shuffle(builder, one, one, [0] * lanes))


def _masked_load(builder: Any, pointer: Any, mask: Any, kind: Any) -> Any:
    address = builder.bitcast(pointer, kind.as_pointer())
    arguments = [address, _INDEX(2 if kind.element == ir.IntType(16) else 4), mask, ir.Constant(kind, None)]
    name = f"llvm.masked.load.v{kind.count}{'i16' if kind.element == ir.IntType(16) else 'f32'}.p0"
    signature = ir.FunctionType(kind, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), arguments)


def _two(context: Any, builder: Any, signature: Any, values: list[Any]) -> Any:
    return context.make_tuple(builder, signature.return_type, values)


def _split_bits(builder: Any, halves: Any) -> list[Any]:
    """Build the even and the odd ones of 32 bfloat16: two instructions, where 16 in their order take two each."""
    words = builder.bitcast(halves, ir.VectorType(_INDEX, LANES))
    even = builder.shl(words, ir.Constant(words.type, [16] * LANES))
    odd = builder.and_(words, ir.Constant(words.type, [0xFFFF0000] * LANES))
    return [builder.bitcast(word, _LANES_TYPE) for word in (even, odd)]


@instruction
def load_two(typing_context: Any, pointer: Any, index: Any) -> Any:
    """Return pointer[index:index + 32] as float32: of bfloat16 the even and the odd ones, of float32 both halves."""
    half = pointer.dtype == types.uint16

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = builder.gep(args[0], [args[1]])
        if half:
            kind = ir.VectorType(ir.IntType(16), 2 * LANES)
            values = _split_bits(builder, builder.load(builder.bitcast(address, kind.as_pointer()), align=2))
        else:
            places = [address, builder.gep(address, [_INDEX(LANES)])]
            values = [builder.load(builder.bitcast(place, _LANES_TYPE.as_pointer()), align=4) for place in places]
        return _two(context, builder, signature, values)

    return types.UniTuple(lanes_type, 2)(pointer, types.int64), generate


@instruction
def load_two_of(typing_context: Any, pointer: Any, index: Any, count: Any) -> Any:
    """As `load_two`, reading only the first `count` numbers; the others are zeros."""
    half = pointer.dtype == types.uint16

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, mask = builder.gep(args[0], [args[1]]), _first(builder, args[2], 2 * LANES)
        kind = ir.VectorType(ir.IntType(16) if half else _FLOAT, 2 * LANES)
        loaded = _masked_load(builder, address, mask, kind)
        low, high = list(range(LANES)), list(range(LANES, 2 * LANES))
        values = (
            _split_bits(builder, loaded)
            if half
            else [_shuffle(builder, loaded, loaded, order) for order in (low, high)]
        )
        return _two(context, builder, signature, values)

    return types.UniTuple(lanes_type, 2)(pointer, types.int64, types.int64), generate


@instruction
def split_like(typing_context: Any, low: Any, high: Any, like: Any) -> Any:
    """Return 32 float32 in the order in which `load_two` returns what `like` points to."""
    half = like.dtype == types.uint16

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        even, odd = list(range(0, 2 * LANES, 2)), list(range(1, 2 * LANES, 2))
        values = [_shuffle(builder, args[0], args[1], order) for order in (even, odd)] if half else list(args[:2])
        return _two(context, builder, signature, values)

    return types.UniTuple(lanes_type, 2)(lanes_type, lanes_type, like), generate


@instruction
def join_like(typing_context: Any, first: Any, second: Any, like: Any) -> Any:
    """Return what `split_like` took, from what it returned."""
    half = like.dtype == types.uint16

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        orders = [[i // 2 + i % 2 * LANES for i in range(start, start + LANES)] for start in (0, LANES)]
        values = [_shuffle(builder, args[0], args[1], order) for order in orders] if half else list(args[:2])
        return _two(context, builder, signature, values)

    return types.UniTuple(lanes_type, 2)(lanes_type, lanes_type, like), generate


@instruction
def store(typing_context: Any, pointer: Any, index: Any, value: Any) -> Any:
    """Set pointer[index:index + 16]; rounds where the pointer is to the bits of bfloat16."""
    half = pointer.dtype == types.uint16

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        stored = narrow_bits(builder, args[2]) if half else args[2]
        address = builder.bitcast(builder.gep(args[0], [args[1]]), stored.type.as_pointer())
        builder.store(stored, address, align=2 if half else 4)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, lanes_type), generate


@instruction
def splat(typing_context: Any, value: Any) -> Any:
    """Return the float32 in all lanes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        one = builder.insert_element(ir.Constant(_LANES_TYPE, ir.Undefined), args[0], _INDEX(0))
        return _shuffle(builder, one, one, [0] * LANES)

    return lanes_type(types.float32), generate


@instruction
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c, rounded once where the machine can."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        signature_ir = ir.FunctionType(_LANES_TYPE, [_LANES_TYPE] * 3)
        function = cgutils.get_or_insert_function(builder.module, signature_ir, f"llvm.fmuladd.v{LANES}f32")
        return builder.call(function, args)

    return lanes_type(lanes_type, lanes_type, lanes_type), generate


@instruction
def add(typing_context: Any, a: Any, b: Any) -> Any:
    """Return a + b."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(args[0], args[1])

    return lanes_type(lanes_type, lanes_type), generate


@instruction
def total(typing_context: Any, value: Any) -> Any:
    """Return the sum of the lanes, added in pairs."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v, width = args[0], LANES
        while width > 1:
            width //= 2
            v = builder.fadd(
                _shuffle(builder, v, v, list(range(width))), _shuffle(builder, v, v, list(range(width, 2 * width)))
            )
        return builder.extract_element(v, _INDEX(0))

    return types.float32(lanes_type), generate


@instruction
def totals4(typing_context: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Return the four sums of lanes, each as `total` adds them; together they cost about half of four calls."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, b, c, d = args
        half, quarter = LANES // 2, LANES // 4
        # (8 of a, 8 of b), (8 of c, 8 of d)
        low, high = list(range(half)), list(range(half, LANES))
        ab, cd = (
            builder.fadd(
                _shuffle(builder, x, y, low + [LANES + i for i in low]),
                _shuffle(builder, x, y, high + [LANES + i for i in high]),
            )
            for x, y in ((a, b), (c, d))
        )
        # (4 of each)
        starts = [0, half, LANES, LANES + half]
        v = builder.fadd(
            _shuffle(builder, ab, cd, [s + i for s in starts for i in range(quarter)]),
            _shuffle(builder, ab, cd, [s + i + quarter for s in starts for i in range(quarter)]),
        )
        width = quarter
        while width > 1:
            width //= 2
            v = builder.fadd(
                _shuffle(builder, v, v, [2 * width * s + i for s in range(4) for i in range(width)]),
                _shuffle(builder, v, v, [2 * width * s + i + width for s in range(4) for i in range(width)]),
            )
        items = [builder.extract_element(v, _INDEX(i)) for i in range(4)]
        return context.make_tuple(builder, signature.return_type, items)

    return types.UniTuple(types.float32, 4)(lanes_type, lanes_type, lanes_type, lanes_type), generate
