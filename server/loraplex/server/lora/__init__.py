"""LoRA at serve time: segments, slots and the operators."""
