"""What transformers writes: with the base and the adapter apart, through PEFT, and with the merged model, without it.

Both in float32 and greedily, the former over the very weights that a quantizing server computes with. A process of its
own (`python -m loraplex.cli.demo_reference`): a job as one line of JSON in and the texts as one line out, then the
merged folder as one line in and its texts out. It gives way to the server beside it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main() -> None:
    """Do one job: `model`, `adapter` (folders), `quantization`, `prompts`, `max_tokens`."""
    os.nice(10)
    # Whatever the libraries print, the texts alone go to the reader.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    job = json.loads(sys.stdin.readline())
    texts = unmerged_texts(job["model"], job["adapter"], job["quantization"], job["prompts"], job["max_tokens"])
    print(json.dumps(texts), file=out, flush=True)
    merged = sys.stdin.readline().strip()
    if merged:
        print(json.dumps(merged_texts(merged, job["prompts"], job["max_tokens"])), file=out, flush=True)


def unmerged_texts(model: str, adapter: str, quantization: str, prompts: Sequence[str], max_tokens: int) -> list[str]:
    """Return what `model`, quantized and dequantized, writes with `adapter` beside it; both are folders."""
    from loraplex.adapters.reference import adapted_model

    return _answers(adapted_model(Path(model), Path(adapter), quantization), model, prompts, max_tokens)


def merged_texts(folder: str, prompts: Sequence[str], max_tokens: int) -> list[str]:
    """Return what the merged model in `folder` writes."""
    from loraplex.adapters.reference import plain_model

    return _answers(plain_model(Path(folder)), folder, prompts, max_tokens)


def _answers(model: Any, folder: str | Path, prompts: Sequence[str], max_tokens: int) -> list[str]:
    import torch
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
    texts: list[str] = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


if __name__ == "__main__":
    main()
