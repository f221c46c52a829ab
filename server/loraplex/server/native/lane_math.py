"""What a softmax does with sixteen float32 at once, and the transposition that brings rows into lanes."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from loraplex.server.native.intrinsics import cgutils, instruction, types
from loraplex.server.native.simd import LANES, lanes_type

_FLOAT, _WORD, _LONG = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FLOATS, _WORDS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_WORD, LANES)

# Cephes' polynomial for e**r, highest power first, after r**2.
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4
_EXP_MIN = -87.0


def _constant(number: float) -> Any:
    return ir.Constant(_FLOATS, [number] * LANES)


def _call(builder: Any, name: str, arguments: list[Any]) -> Any:
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * len(arguments))
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{LANES}f32")
    return builder.call(function, arguments)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, "fmuladd", [a, b, c])


@instruction
def maximum(typing_context: Any, a: Any, b: Any) -> Any:
    """Return the larger of each lane's two numbers; `b` where `a` is NaN."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", args[0], args[1]), args[0], args[1])

    return lanes_type(lanes_type, lanes_type), generate


@instruction
def times(typing_context: Any, a: Any, b: Any) -> Any:
    """Return a * b."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fmul(args[0], args[1])

    return lanes_type(lanes_type, lanes_type), generate


@instruction
def keep_between(typing_context: Any, value: Any, low: Any, x: Any, high: Any, other: Any) -> Any:
    """Return `value` in the lanes where low <= x <= high, the float32 `other` elsewhere."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, low, x, high, other = args
        inside = builder.and_(builder.fcmp_ordered("<=", low, x), builder.fcmp_ordered("<=", x, high))
        one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), other, _WORD(0))
        return builder.select(inside, value, builder.shuffle_vector(one, one, ir.Constant(_WORDS, [0] * LANES)))

    return lanes_type(*[lanes_type] * 4, types.float32), generate


@instruction
def exp_of_difference(typing_context: Any, a: Any, b: Any) -> Any:
    """Return e**(a - b) by Cephes' polynomial; for `vector.exp_lanes`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x = builder.fsub(args[0], args[1])
        vanishes = builder.fcmp_ordered("<", x, _constant(_EXP_MIN))
        z = builder.select(vanishes, _constant(_EXP_MIN), x)
        n = _call(builder, "rint", [builder.fmul(z, _constant(_LOG2_E))])
        r = _fma(builder, n, _constant(-_LN2_HIGH), z)
        r = _fma(builder, n, _constant(-_LN2_LOW), r)
        p = _constant(_EXP[0])
        for coefficient in _EXP[1:]:
            p = _fma(builder, p, r, _constant(coefficient))
        p = builder.fadd(_fma(builder, builder.fmul(p, r), r, r), _constant(1.0))
        exponent = builder.add(builder.fptosi(n, _WORDS), ir.Constant(_WORDS, [127] * LANES))
        power = builder.bitcast(builder.shl(exponent, ir.Constant(_WORDS, [23] * LANES)), _FLOATS)
        return builder.select(vanishes, _constant(0.0), builder.fmul(p, power))

    return lanes_type(lanes_type, lanes_type), generate


@instruction
def transpose(typing_context: Any, x: Any, at: Any, stride: Any, to: Any, to_at: Any, to_stride: Any) -> Any:
    """Set to[to_at + i * to_stride + j] = x[at + j * stride + i] for 16 by 16 float32 numbers."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, at, stride, to, to_at, to_stride = args

        def address(pointer: Any, first: Any, step: Any, row: int) -> Any:
            index = builder.add(first, builder.mul(step, _LONG(row)))
            return builder.bitcast(builder.gep(pointer, [index]), _FLOATS.as_pointer())

        rows = [builder.load(address(x, at, stride, row), align=4) for row in range(LANES)]
        size = LANES // 2
        while size:
            # Of each pair of rows, `size` apart, exchange the right part of the first and the left part of the second.
            low = ir.Constant(_WORDS, [k + LANES - size if k & size else k for k in range(LANES)])
            high = ir.Constant(_WORDS, [k + LANES if k & size else k + size for k in range(LANES)])
            for row in range(LANES):
                if not row & size:
                    a, b = rows[row], rows[row + size]
                    rows[row], rows[row + size] = builder.shuffle_vector(a, b, low), builder.shuffle_vector(a, b, high)
            size //= 2
        for row, value in enumerate(rows):
            builder.store(value, address(to, to_at, to_stride, row), align=4)
        return context.get_dummy_value()

    long = types.int64
    return types.void(x, long, long, to, long, long), generate
