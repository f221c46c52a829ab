"""Products of 16-bit integers for CPUs with AVX512-VNNI: a few rows of activations times sixteen outputs, in registers.

VPDPWSSD multiplies 32 pairs and adds them up two by two into sixteen 32-bit sums: as many products a cycle as bfloat16
has, without rounding anything. Weights are widened to 16 bits on the way from memory, each kind in its own manner, and
the rows' numbers come as broadcast memory operands, so that sixteen rows of sums and everything else fit in the 32
registers. Sums of integers are exact, so a row's result cannot depend on which rows it shares a tile with.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from loraplex.server.native.intrinsics import CACHE_LINE, cgutils, instruction, prefetch_line, types

OUTPUTS = 16  # of a tile: the lanes of a register of 32-bit sums
GROUPS = 4  # pairs of inputs that one step of the loop takes
STEP_INPUTS = 2 * GROUPS
TILE_ROWS = (1, 2, 4, 8, 12, 16)
# Bytes of weights that are asked for before they are needed: panels lie one after the other.
_AHEAD = 4096
# VPDPWSSD takes four or five cycles, so that many sums must be under way at once.
_SUMS_UNDER_WAY = 8

_WORD, _LONG, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_SUMS = ir.VectorType(_WORD, OUTPUTS)
_FLOATS = ir.VectorType(_FLOAT, OUTPUTS)
_PAIRS = ir.VectorType(ir.IntType(16), 2 * OUTPUTS)
_BYTES = ir.VectorType(ir.IntType(8), 2 * OUTPUTS)


def _load(builder: Any, address: Any, kind: Any, offset: int = 0) -> Any:
    """Build a load of `kind` from an integer address, aligned to its elements."""
    pointer = builder.inttoptr(builder.add(address, _LONG(offset)), kind.as_pointer())
    element = kind.element if isinstance(kind, ir.VectorType) else kind
    return builder.load(pointer, align=4 if element is _FLOAT else element.width // 8)


def _splat(builder: Any, value: Any, kind: Any) -> Any:
    """Build a vector with `value` in all lanes."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _WORD(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_WORD, kind.count), [0] * kind.count))


def _call(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _widened(builder: Any, weights: Any, at: Any, table: Any) -> list[Any]:
    """Build the loads of one step's weights as 16-bit integers, a register for each pair of inputs.

    The element type of the pointer `weights` tells what is stored: int16 as they are, int8, or in uint8 two 4-bit codes
    for the numbers of `table`.
    """
    if weights == types.int16:
        return [_load(builder, at, _PAIRS, 64 * g) for g in range(GROUPS)]
    if weights == types.int8:
        return [builder.sext(_load(builder, at, _BYTES, 32 * g), _PAIRS) for g in range(GROUPS)]
    codes = _load(builder, at, _PAIRS)
    shifts = [ir.Constant(_PAIRS, [4 * g] * _PAIRS.count) for g in range(GROUPS)]
    # VPERMW looks at the low five bits of a code; the table says everything twice, so that the fifth does not matter.
    indices = [builder.lshr(codes, shift) for shift in shifts]
    return [_call(builder, "llvm.x86.avx512.permvar.hi.512", _PAIRS, [table, index]) for index in indices]


def step_bytes(weights: Any) -> int:
    """Return the bytes of weights in one step: `STEP_INPUTS` inputs of `OUTPUTS` outputs."""
    bits = 4 if weights == types.uint8 else weights.bitwidth
    return STEP_INPUTS * OUTPUTS * bits // 8


class _TileCode:
    """Builds the code of one tile."""

    def __init__(self, builder: Any, rows: int, weights: Any) -> None:
        self._builder = builder
        self._rows = rows
        self._weights = weights
        self._chains = max(1, min(GROUPS, _SUMS_UNDER_WAY // rows))

    def sums(self, at: Any, table: Any, x: Any, steps: Any) -> list[Any]:
        """Build the loop over inputs; return the sums of each row."""
        builder = self._builder
        table = _load(builder, table, _PAIRS) if self._weights == types.uint8 else None
        before = builder.block
        loop, after = builder.append_basic_block("tile"), builder.append_basic_block("tile.end")
        builder.branch(loop)
        builder.position_at_end(loop)
        step = builder.phi(_LONG)
        sums = [builder.phi(_SUMS) for _ in range(self._rows * self._chains)]
        added = self._step(
            builder.add(at, builder.mul(step, _LONG(step_bytes(self._weights)))),
            table,
            builder.add(x, builder.mul(step, _LONG(4 * GROUPS * self._rows))),
            list(sums),
        )
        following = builder.add(step, _LONG(1))
        step.add_incoming(_LONG(0), before)
        step.add_incoming(following, loop)
        for phi, value in zip(sums, added, strict=True):
            phi.add_incoming(ir.Constant(_SUMS, [0] * OUTPUTS), before)
            phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following, steps), loop, after)
        builder.position_at_end(after)
        return [self._together(added[row :: self._rows]) for row in range(self._rows)]

    def _step(self, at: Any, table: Any, x: Any, sums: list[Any]) -> list[Any]:
        builder = self._builder
        for line in range(0, step_bytes(self._weights), CACHE_LINE):
            prefetch_line(builder, builder.add(at, _LONG(_AHEAD + line)))
        for group, weights in enumerate(_widened(builder, self._weights, at, table)):
            for row in range(self._rows):
                pair = _load(builder, x, _WORD, 4 * (group * self._rows + row))
                numbers = builder.bitcast(_splat(builder, pair, _SUMS), _PAIRS)
                index = group % self._chains * self._rows + row
                sums[index] = _call(builder, "llvm.x86.avx512.vpdpwssd.512", _SUMS, [sums[index], weights, numbers])
        return sums

    def _together(self, sums: list[Any]) -> Any:
        total = sums[0]
        for one in sums[1:]:
            total = self._builder.add(total, one)
        return total

    def add(self, sums: list[Any], weight_scales: Any, x_scales: Any, out: Any) -> None:
        """Build the addition of the scaled sums to the float32 rows at `out`."""
        builder = self._builder
        scales = _load(builder, weight_scales, _FLOATS)
        for row, total in enumerate(sums):
            factor = _splat(builder, _load(builder, x_scales, _FLOAT, 4 * row), _FLOATS)
            value = builder.sitofp(total, _FLOATS)
            before = _load(builder, out, _FLOATS, 4 * OUTPUTS * row)
            after = _call(builder, f"llvm.fma.v{OUTPUTS}f32", _FLOATS, [value, builder.fmul(scales, factor), before])
            pointer = builder.inttoptr(builder.add(out, _LONG(4 * OUTPUTS * row)), _FLOATS.as_pointer())
            builder.store(after, pointer, align=4)


def _tile(rows: int) -> Any:
    """Return the intrinsic for `rows` rows.

    Semantics: out[r, n] += weight_scales[n] * x_scales[r] * sum over k of w[n, k] * x[r, k].

    Shape:
        weights: pointer whose element type tells how `steps` * STEP_INPUTS inputs of OUTPUTS outputs are stored:
            for each step GROUPS times (OUTPUTS, 2), one after the other or, 4-bit codes, from the low end of each word.
        table: address of 32 int16, the 16 numbers of the codes twice; not read for other weights.
        x: address of int16 (steps * GROUPS, rows, 2).
        weight_scales, x_scales, out: addresses of float32 (OUTPUTS,), (rows,), (rows, OUTPUTS).
    """

    @instruction
    def tile(
        typing_context: Any, weights: Any, table: Any, x: Any, steps: Any, weight_scales: Any, x_scales: Any, out: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            code = _TileCode(builder, rows, weights.dtype)
            sums = code.sums(builder.ptrtoint(args[0], _LONG), args[1], args[2], args[3])
            code.add(sums, args[4], args[5], args[6])
            return context.get_dummy_value()

        return types.void(weights, *[types.int64] * 6), generate

    return tile


tile1, tile2, tile4, tile8, tile12, tile16 = (_tile(rows) for rows in TILE_ROWS)


@instruction
def widen_step(typing_context: Any, weights: Any, table: Any, to: Any) -> Any:
    """Store one step's weights at the address `to` as int16, in the order in which tiles read those."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        numbers = _load(builder, args[1], _PAIRS) if weights.dtype == types.uint8 else None
        at = builder.ptrtoint(args[0], _LONG)
        for group, value in enumerate(_widened(builder, weights.dtype, at, numbers)):
            pointer = builder.inttoptr(builder.add(args[2], _LONG(64 * group)), _PAIRS.as_pointer())
            builder.store(value, pointer, align=2)
        return context.get_dummy_value()

    return types.void(weights, types.int64, types.int64), generate


@instruction
def store_rounded(typing_context: Any, x: Any, index: Any, factor: Any, to: Any, stride: Any) -> Any:
    """Store x[index:index + 16] * factor, rounded to int16, pair by pair: at `to`, then `stride` bytes apart."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = _load(builder, builder.ptrtoint(builder.gep(args[0], [args[1]]), _LONG), _FLOATS)
        scaled = builder.fmul(values, _splat(builder, args[2], _FLOATS))
        rounded = _call(builder, f"llvm.rint.v{OUTPUTS}f32", _FLOATS, [scaled])
        half = ir.VectorType(ir.IntType(16), OUTPUTS)
        integers = builder.trunc(builder.fptosi(rounded, _SUMS), half)
        pairs = builder.bitcast(integers, ir.VectorType(_WORD, OUTPUTS // 2))
        at = args[3]
        for pair in range(OUTPUTS // 2):
            builder.store(
                builder.extract_element(pairs, _WORD(pair)), builder.inttoptr(at, _WORD.as_pointer()), align=4
            )
            at = builder.add(at, args[4])
        return context.get_dummy_value()

    return types.void(x, types.int64, types.float32, types.int64, types.int64), generate
