"""Which weights are pruned: patterns, allocation over layers, coupled channels, regrowth."""
