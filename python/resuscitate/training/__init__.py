"""Training that prepares a network for pruning."""
