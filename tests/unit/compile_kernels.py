"""Compiles every Triton kernel for an H100 on whatever machine this is, and prints what came of it, a line each.

Run as a process of its own, without the interpreter: Triton decides which when the kernels are imported. Says nothing
of speed; but a kernel that does not compile, needs more shared memory than there is, or loads weights number by number
where it should load 16 bytes at a time shows here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loraplex.server.lora.ops import triton_kernel as lora
from loraplex.server.lora.ops.triton_plan import TILE_SHAPES

H100 = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True)
class Variant:
    """A kernel as it is launched. `aligned` arguments are known to be multiples of 16, as Triton finds out itself."""

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, object]
    aligned: tuple[str, ...]
    warps: int
    stages: int

    def compile(self) -> dict[str, object]:
        names = self.kernel.arg_names
        source = ASTSource(
            self.kernel,
            {name: "constexpr" if name in self.constants else self.types[name] for name in names},
            {(names.index(name),): value for name, value in self.constants.items()},
            {(names.index(name),): [["tt.divisibility", 16]] for name in self.aligned},
        )
        options = {"num_warps": self.warps, "num_stages": self.stages}
        compiled = triton.compile(source, target=H100, options=options)
        ptx = compiled.asm["ptx"]
        return {
            "name": self.name,
            "shared": compiled.metadata.shared,
            "wide_loads": len(re.findall(r"cp\.async\.cg\.shared\.global|ld\.global[\w.]*\.v4\.b32", ptx)),
            "narrow_loads": len(re.findall(r"ld\.global[\w.]*\.b16", ptx)),
            "matrix_products": len(re.findall(r"mma[\w.]*sync", ptx)),
            "spills": len(re.findall(r"(?:ld|st)\.local", ptx)),
            "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
        }


def lora_variants() -> Iterator[Variant]:
    types = {
        **{"x": "*bf16", "y": "*bf16", "hidden": "*fp32", "tiles": "*i64", "units": "*i64"},
        **dict.fromkeys(("x_stride", "y_stride", "hidden_size", "site", "in_features", "out_features"), "i32"),
    }
    for kind, shape in zip(("short", "long"), TILE_SHAPES, strict=True):
        sizes = {"BLOCK_T": shape.tokens, "BLOCK_R": shape.ranks, "WEIGHTS": tl.bfloat16}
        shrink, expand = shape.warps
        splits, chunk = shape.splits(4096)
        yield Variant(
            f"lora shrink, {kind}",
            lora.shrink_kernel,
            types,
            {"CHUNK": chunk, "BLOCK_K": shape.inner, **sizes},
            ("x", "x_stride", "tiles", "hidden", "in_features"),
            shrink,
            shape.stages,
        )
        yield Variant(
            f"lora expand, {kind}",
            lora.expand_kernel,
            types,
            {"SPLITS": splits, "BLOCK_N": shape.columns, "ALIGNED": True, **sizes},
            ("y", "y_stride", "tiles", "hidden", "out_features"),
            expand,
            1,
        )


def main() -> None:
    for variant in lora_variants():
        print(json.dumps(variant.compile()), flush=True)


if __name__ == "__main__":
    main()
