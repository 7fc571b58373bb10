"""Calibration images: reading them from files and loaders, batches, checks, memory limits."""
