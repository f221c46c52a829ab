"""A decode step of transformers with PEFT's `adapter_names`: as many rows and adapters, in bfloat16."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from loraplex.bench.gpu.random_model import config_values
from loraplex.bench.gpu.step_model import ALL_LINEAR, DecoderShape


@torch.inference_mode()
def peft_step_ms(shape: DecoderShape, device: torch.device, rows: int, context: int, repeat: int) -> float:
    """Return the median milliseconds of a decode step of `rows` rows, each with a rank-16 adapter of its own.

    The base is in bfloat16: transformers' NF4 needs bitsandbytes, and is not faster than bfloat16 at many rows.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    family = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}[shape.architecture]
    config = AutoConfig.for_model(family, **config_values(shape, context + 64))
    with torch.device(device):
        make: Any = AutoModelForCausalLM.from_config
        base = make(config, dtype=torch.bfloat16).eval()
        lora = LoraConfig(r=16, target_modules=[f"{name}_proj" for name in ALL_LINEAR])
        model: Any = get_peft_model(base, lora, adapter_name="a0")
        for number in range(1, rows):
            model.add_adapter(f"a{number}", lora)
    model.to(torch.bfloat16).eval()  # PEFT would keep the adapters in float32
    names = [f"a{number}" for number in range(rows)]
    prompt = torch.randint(0, shape.vocab, (rows, context), device=device)
    cache = model(input_ids=prompt, use_cache=True, logits_to_keep=1, adapter_names=names).past_key_values
    times = []
    for _ in range(repeat + 1):
        started = time.perf_counter()
        tokens = torch.randint(0, shape.vocab, (rows, 1), device=device)
        out = model(input_ids=tokens, past_key_values=cache, use_cache=True, adapter_names=names)
        out.logits[:, -1].argmax(-1).tolist()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[1:])
