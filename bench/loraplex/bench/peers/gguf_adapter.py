"""Writes a LoRA adapter of a Llama model in the form that llama.cpp reads. Needs gguf, numpy and safetensors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NAME = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(.+)\.lora_([AB])\.weight")


def write_gguf_adapter(folder: Path, model: Path, output: Path) -> Path:
    """Convert the adapter in `folder`, of the model in `model`, to `output`; return that.

    llama.cpp keeps the rows of q and k in another order, with the two halves of each head's rotation interleaved; the
    rows of B follow (as in llama.cpp's own conversion).

    Raises:
        ValueError: for a tensor that is not LoRA of a linear layer.
    """
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    shape = json.loads((model / "config.json").read_text(encoding="utf-8"))
    heads = {"self_attn.q_proj": shape["num_attention_heads"], "self_attn.k_proj": shape["num_key_value_heads"]}
    writer = gguf.GGUFWriter(output, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(config["lora_alpha"]))
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        found = _NAME.fullmatch(name)
        if found is None or found[2] not in MODULES:
            raise ValueError(f"cannot convert {name}")
        layer, module, side = found.groups()
        if side == "B" and module in heads:
            tensor = interleave_halves(tensor, heads[module])
        writer.add_tensor(f"blk.{layer}.{MODULES[module]}.weight.lora_{side.lower()}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return output


def interleave_halves(rows: Any, heads: int) -> Any:
    """Return `rows` (heads * size, n) with the rows of each head's two halves taken in turn."""
    size = rows.shape[0] // heads
    return rows.reshape(heads, 2, size // 2, -1).swapaxes(1, 2).reshape(rows.shape)
