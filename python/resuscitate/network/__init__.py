"""One network: its layers, wiring and masks, its forward pass, and snapshots to restore it from."""
