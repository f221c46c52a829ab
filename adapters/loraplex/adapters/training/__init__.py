"""Making adapters: the configuration of a training run, the run itself, and what is told about it."""
