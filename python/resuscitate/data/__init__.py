"""Calibration images: where they come from, batches of them, checks of them."""
