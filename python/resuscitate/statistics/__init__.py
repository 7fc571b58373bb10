"""Computations on measured moments alone, without a network."""
