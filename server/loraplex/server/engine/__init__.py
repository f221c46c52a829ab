"""Continuous batching: sequences, scheduler, KV blocks, model runner, sampler, and the loop that ties them."""
