"""What is computed from measured values alone: moments and least squares on them."""
