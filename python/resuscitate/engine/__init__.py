"""Measuring a network layer by layer, and correcting it on the way. It knows no method."""
