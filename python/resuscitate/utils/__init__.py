"""Helpers that know nothing of networks: files, progress, digests, nested tensors, interrupts, checks of arguments."""
