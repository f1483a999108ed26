"""Whether a model still computes the same after a hop, and where and why it does not."""
