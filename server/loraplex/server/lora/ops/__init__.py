"""The LoRA operator in several implementations of one signature."""
