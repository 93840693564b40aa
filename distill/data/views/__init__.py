"""How a sample is shown: pure functions of a seed, an epoch and an index."""
