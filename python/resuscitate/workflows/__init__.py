"""The public functions that measure or change a whole network."""
