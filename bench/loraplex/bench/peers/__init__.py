"""Other systems under the same workload.

A driver (`vllm`, `openvino`, `llama_cpp`, `transformers_peft`, `loraplex`, `oracle`) runs in its system's own
interpreter and imports nothing of ours but `driver`; everything else runs in ours and talks to it over its stdio.
"""
