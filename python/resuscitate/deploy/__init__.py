"""What goes in and out of files: checkpoints, folded BatchNorm, exports, semi-structured weights."""
