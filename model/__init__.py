"""The policy: Qwen3 in Flax NNX, and every way it is laid out, stored, scored and sampled."""
