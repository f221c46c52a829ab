"""Small matrix products in registers: a few rows of numbers times 48 lanes, summed over many steps.

Rows come as single numbers broadcast from memory and lanes as whole registers, so neither side need be packed for the
other: what is contiguous along the lanes is read where it lies, bfloat16 widened on the way. Sums are float32 and each
is added up step by step, so a lane's result depends on no other lane.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from loraplex.server.native.intrinsics import cgutils, instruction, types, widen_bits
from loraplex.server.native.simd import LANES

ROWS = 8
VECTORS = 3  # 24 sums, 3 registers of lanes and a broadcast number fit in the 32 registers of AVX-512
WIDTH = VECTORS * LANES

_FLOAT, _HALF, _LONG, _INDEX = ir.FloatType(), ir.IntType(16), ir.IntType(64), ir.IntType(32)
_FLOATS = ir.VectorType(_FLOAT, LANES)


def _load(builder: Any, pointer: Any, element: Any, index: Any) -> Any:
    """Build the load of sixteen numbers as float32."""
    half = element == types.uint16
    kind = ir.VectorType(_HALF if half else _FLOAT, LANES)
    address = builder.bitcast(builder.gep(pointer, [index]), kind.as_pointer())
    loaded = builder.load(address, align=2 if half else 4)
    return widen_bits(builder, loaded) if half else loaded


def _broadcast(builder: Any, pointer: Any, element: Any, index: Any) -> Any:
    """Build the load of one number as float32 into all lanes."""
    number = builder.load(builder.gep(pointer, [index]))
    if element == types.uint16:
        number = widen_bits(builder, number)
    one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), number, _INDEX(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_INDEX, LANES), [0] * LANES))


class _ProductCode:
    """Builds the code of one product."""

    def __init__(self, builder: Any, elements: tuple[Any, Any]) -> None:
        self._builder = builder
        self._elements = elements

    def places(self, at: Any, stride: Any) -> list[Any]:
        """Return the index of each register of the result."""
        builder, indices = self._builder, []
        for row in range(ROWS):
            first = builder.add(at, builder.mul(stride, _LONG(row)))
            indices += [builder.add(first, _LONG(LANES * vector)) for vector in range(VECTORS)]
        return indices

    def sums(self, args: Any, start: list[Any]) -> list[Any]:
        """Build the loop over steps; return the sums, each added to what it starts with."""
        builder = self._builder
        w, w_at, row_stride, step_stride, x, x_at, x_stride, steps = args
        rows = [builder.gep(w, [builder.add(w_at, builder.mul(row_stride, _LONG(row)))]) for row in range(ROWS)]
        before = builder.block
        loop, after = builder.append_basic_block("product"), builder.append_basic_block("product.end")
        builder.cbranch(builder.icmp_signed(">", steps, _LONG(0)), loop, after)
        builder.position_at_end(loop)
        step = builder.phi(_LONG)
        sums = [builder.phi(_FLOATS) for _ in start]
        at = builder.add(x_at, builder.mul(step, x_stride))
        lanes = [_load(builder, x, self._elements[1], builder.add(at, _LONG(LANES * v))) for v in range(VECTORS)]
        added = []
        for row, pointer in enumerate(rows):
            number = _broadcast(builder, pointer, self._elements[0], builder.mul(step, step_stride))
            added += [self._fma(number, lanes[v], sums[row * VECTORS + v]) for v in range(VECTORS)]
        following = builder.add(step, _LONG(1))
        step.add_incoming(_LONG(0), before)
        step.add_incoming(following, loop)
        for phi, first, value in zip(sums, start, added, strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following, steps), loop, after)
        builder.position_at_end(after)
        return [self._either(first, before, value, loop) for first, value in zip(start, added, strict=True)]

    def _fma(self, a: Any, b: Any, c: Any) -> Any:
        kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
        function = cgutils.get_or_insert_function(self._builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
        return self._builder.call(function, [a, b, c])

    def _either(self, first: Any, before: Any, value: Any, loop: Any) -> Any:
        phi = self._builder.phi(_FLOATS)
        phi.add_incoming(first, before)
        phi.add_incoming(value, loop)
        return phi


def _product(*, add: bool) -> Any:
    """Return the intrinsic that sets the result, or adds to it.

    Semantics: out[r, :WIDTH] = (out[r, :WIDTH] +) sum over s < steps of w[r, s] * x[s, :WIDTH], for ROWS rows r.

    Shape:
        w: pointer to float32 or the bits of bfloat16; w[r, s] is w[w_at + r * row_stride + s * step_stride].
        x: pointer to float32 or the bits of bfloat16; x[s, i] is x[x_at + s * x_stride + i].
        out: pointer to float32; out[r, i] is out[out_at + r * out_stride + i].
    """

    @instruction
    def product(
        typing_context: Any,
        w: Any,
        w_at: Any,
        row_stride: Any,
        step_stride: Any,
        x: Any,
        x_at: Any,
        x_stride: Any,
        steps: Any,
        out: Any,
        out_at: Any,
        out_stride: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            code = _ProductCode(builder, (w.dtype, x.dtype))
            places = code.places(args[9], args[10])
            zero = ir.Constant(_FLOATS, [0.0] * LANES)
            start = [_load(builder, args[8], types.float32, at) if add else zero for at in places]
            for at, value in zip(places, code.sums(args[:8], start), strict=True):
                pointer = builder.bitcast(builder.gep(args[8], [at]), _FLOATS.as_pointer())
                builder.store(value, pointer, align=4)
            return context.get_dummy_value()

        long = types.int64
        return types.void(w, long, long, long, x, long, long, long, out, long, long), generate

    return product


set_product, add_product = _product(add=False), _product(add=True)
