"""The serving process: RPC, engine, models, LoRA operators."""
