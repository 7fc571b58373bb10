"""A network as it is: its layers, its wiring, its masks, how to run it, and how to put it back."""
