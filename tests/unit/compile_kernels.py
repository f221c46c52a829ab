"""Compiles every Triton kernel for an H100 on whatever machine this is, and prints what came of it, a line each.

Run as a process of its own, without the interpreter: Triton decides which when the kernels are imported. Says nothing
of speed; but a kernel that does not compile, needs more shared memory than there is, or loads weights number by number
where it should load 16 bytes at a time shows here.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loraplex.server.attention import triton_kernel as attention
from loraplex.server.attention.triton import MAX_PARTS, PART
from loraplex.server.lora.ops import triton_kernel as lora
from loraplex.server.lora.ops.triton_plan import TILE_SHAPES
from loraplex.server.models import triton_four_bit_kernel as four_bit
from loraplex.server.models.triton_four_bit import HALF, OUTPUTS

H100 = GPUTarget("cuda", 90, 32)
# What changes from step to step. Compiled anew for a 1, or a multiple of 16, all requests of a step would wait for it.
CHANGING = ("tiles", "units", "hidden_size", "site", "table_stride", "parts", "first_row", "tokens", "size")


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
            **_resources(compiled.asm["cubin"]),
            "specialized": [p.name for p in self.kernel.params if p.name in CHANGING and self._specializes(p)],
            "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
        }

    def _specializes(self, parameter: Any) -> bool:
        """Whether Triton compiles the kernel again for other values of a parameter."""
        pointer = self.types[parameter.name].startswith("*")
        return not (parameter.do_not_specialize or (pointer and parameter.do_not_specialize_on_alignment))


def _resources(cubin: bytes) -> dict[str, int]:
    """Return what NVIDIA's own tool, which comes with Triton, says of the machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", shown)
    assert found, shown
    return {"registers": int(found[1]), "stack": int(found[2])}


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
            ("x", "x_stride", "hidden", "in_features"),
            shrink,
            shape.stages,
        )
        yield Variant(
            f"lora expand, {kind}",
            lora.expand_kernel,
            types,
            {"SPLITS": splits, "BLOCK_N": shape.columns, "ALIGNED": True, **sizes},
            ("y", "y_stride", "hidden", "out_features"),
            expand,
            1,
        )


def attention_variants() -> Iterator[Variant]:
    types = {
        **dict.fromkeys(("q", "k", "v", "k_cache", "v_cache", "out"), "*bf16"),
        **dict.fromkeys(("sums", "weights"), "*fp32"),
        **dict.fromkeys(("tables", "contexts", "starts"), "*i32"),
        **dict.fromkeys(("q_stride", "k_stride", "v_stride", "table_stride", "window", "parts", "first_row"), "i32"),
        **{"slots": "*i64", "scale": "fp32", "softcap": "fp32"},
    }
    aligned = ("q", "q_stride", "k", "k_stride", "v", "v_stride", "k_cache", "v_cache", "out", "sums", "tables")
    # Llama-3.1-8B; Gemma-2-9B, with everything.
    for name, group, kv_heads, head_dim, keys, extras in (("8B", 4, 8, 128, 64, False), ("gemma", 2, 8, 256, 32, True)):
        head = {"HEAD_DIM": head_dim, "BLOCK_D": head_dim}
        parts = {"PART": PART, "MAX_PARTS": MAX_PARTS}
        queries = {"GROUP": group, "BLOCK_N": keys, "PAGE": 16, "CAPPED": extras, "WINDOWED": extras, **head}
        for kernel, constants, stages in (
            (attention.write_kernel, {"HEADS": kv_heads, "BLOCK_H": kv_heads, "PAGE": 16, **head}, 1),
            (attention.decode_kernel, {"BLOCK_M": 16, **queries, **parts}, 2),
            (attention.reduce_kernel, {"WINDOWED": extras, **head, **parts}, 1),
            (attention.prompt_kernel, {"BLOCK_M": 64, **queries}, 2),
        ):
            names = kernel.arg_names
            yield Variant(
                f"attention {kernel.__name__}, {name}",
                *(kernel, types, constants, tuple(name for name in aligned if name in names), 4, stages),
            )


def four_bit_variants() -> Iterator[Variant]:
    types = {
        **{"x": "*bf16", "codes": "*u8", "scales": "*fp32", "values": "*fp32", "out": "*fp32", "parts_of": "*fp32"},
        **dict.fromkeys(("x_stride", "out_stride", "part_size", "tokens", "in_features", "out_features"), "i32"),
        **dict.fromkeys(("padded_out", "chunks", "chunks_each", "size", "parts"), "i32"),
    }
    aligned = ("x", "x_stride", "codes", "scales", "values", "out", "out_stride", "in_features", "out_features")
    for tokens in (16, 32, 64):
        constants = {"OUTPUTS": OUTPUTS, "HALF": HALF, "BLOCK_T": tokens}
        yield Variant(f"4-bit product, {tokens}", four_bit.four_bit_kernel, types, constants, aligned, 4, 3)
    yield Variant(
        "4-bit add_parts_kernel", four_bit.add_parts_kernel, types, {"BLOCK": 1024}, ("parts_of", "size", "out"), 4, 1
    )


def main() -> None:
    for variant in (*lora_variants(), *attention_variants(), *four_bit_variants()):
        print(json.dumps(variant.compile()), flush=True)


if __name__ == "__main__":
    main()
