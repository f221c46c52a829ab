"""Raw memory for Numba kernels: typed pointers from addresses, bfloat16 as bits, atomic counters.

Numba knows neither bfloat16 nor atomics on a CPU. Everything here becomes a few LLVM instructions, so loops over it
vectorise as loops over float32 arrays do. Nothing is bounds-checked: callers check shapes before they pass addresses.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types as numba_types
from numba.core import cgutils as numba_cgutils
from numba.extending import intrinsic

# Numba is typed in part only; these parts are not.
types: Any = numba_types
cgutils: Any = numba_cgutils

CACHE_LINE = 64

_WORD = ir.IntType(32)
_HALF = ir.IntType(16)


def instruction(function: Callable[..., Any]) -> Any:
    """Make a Numba intrinsic of a function from argument types to a signature and a generator of LLVM code."""
    return intrinsic(function)


def _pointer_to(element: Any) -> Any:
    """Return an intrinsic that takes an int64 address as a pointer to `element`: `p[i]` then loads and stores."""

    @instruction
    def pointer(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), generate

    return pointer


f32_at = _pointer_to(types.float32)
f64_at = _pointer_to(types.float64)
i32_at = _pointer_to(types.int32)
i64_at = _pointer_to(types.int64)
u16_at = _pointer_to(types.uint16)


@instruction
def pointer_like(typing_context: Any, address: Any, like: Any) -> Any:
    """Return the int64 address as a pointer to elements of the type of `like`, whose value does not matter."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(types.int64, like), generate


@instruction
def item_bytes(typing_context: Any, pointer: Any) -> Any:
    """Return the bytes of what the pointer points to, a constant."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(ir.IntType(64), pointer.dtype.bitwidth // 8)

    return types.int64(pointer), generate


def _like(value: Any, element: Any) -> Any:
    """Return the LLVM type `element`, as a vector if `value` is one."""
    return ir.VectorType(element, value.type.count) if isinstance(value.type, ir.VectorType) else element


def _constant(value: Any, number: int) -> Any:
    """Return `number` as a constant of the type of `value`, in all lanes."""
    many = isinstance(value.type, ir.VectorType)
    return ir.Constant(value.type, [number] * value.type.count if many else number)


def widen_bits(builder: Any, value: Any) -> Any:
    """Build the float32 of bfloat16 bits, for an LLVM i16 or a vector of them."""
    wide = builder.zext(value, _like(value, _WORD))
    return builder.bitcast(builder.shl(wide, _constant(wide, 16)), _like(value, ir.FloatType()))


def narrow_bits(builder: Any, value: Any) -> Any:
    """Build the bits of the nearest bfloat16, ties to even as in torch, for an LLVM float or a vector of them."""
    bits = builder.bitcast(value, _like(value, _WORD))
    odd = builder.and_(builder.lshr(bits, _constant(bits, 16)), _constant(bits, 1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, _constant(bits, 0x7FFF))), _constant(bits, 16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, _constant(bits, 0x7FC0), rounded), _like(value, _HALF))


@instruction
def widen(typing_context: Any, value: Any) -> Any:
    """Return as float32 a value loaded from memory: a float32, or the uint16 bits of a bfloat16. Exact."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0] if value == types.float32 else widen_bits(builder, args[0])

    return (types.float32(value), generate) if value in (types.float32, types.uint16) else None


@instruction
def narrow(typing_context: Any, value: Any, like: Any) -> Any:
    """Return a float32 in the type of `like`, ready to be stored: as it is, or rounded to the bits of a bfloat16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0] if like == types.float32 else narrow_bits(builder, args[0])

    if value != types.float32 or like not in (types.float32, types.uint16):
        return None
    return like(value, like), generate


@instruction
def bits_to_f32(typing_context: Any, bits: Any) -> Any:
    """Return the float32 whose bit pattern is the low half of an int64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.trunc(args[0], _WORD), ir.FloatType())

    return types.float32(types.int64), generate


def prefetch_line(builder: Any, address: Any) -> None:
    """Build a request for the cache line at `address`, an LLVM i64."""
    byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, keep_in_all_caches, data = word(0), word(3), word(1)
    builder.call(function, [builder.inttoptr(address, byte), read, keep_in_all_caches, data])


@instruction
def prefetch(typing_context: Any, address: Any) -> Any:
    """Ask for the cache line at `address`, which need not be valid, without waiting for it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        prefetch_line(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@instruction
def atomic_add(typing_context: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at `address` and return what was there before; sequentially consistent."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.PointerType(ir.IntType(64)))
        return builder.atomic_rmw("add", pointer, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@instruction
def atomic_load(typing_context: Any, address: Any) -> Any:
    """Return the int64 at `address`, with everything written before it was stored visible."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.PointerType(ir.IntType(64)))
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), generate


@instruction
def call_at(typing_context: Any, function: Any, argument: Any) -> Any:
    """Call the compiled function of one int64 that lies at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@instruction
def spin(typing_context: Any) -> Any:
    """Tell an x86 processor that this is a loop that waits for another thread; nothing elsewhere."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if platform.machine() in ("x86_64", "AMD64"):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), generate
