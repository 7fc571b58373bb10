"""From a repaired model to use: checkpoints, folded BatchNorm, exported files, semi-structured weights."""
