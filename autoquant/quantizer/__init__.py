"""Symmetric int8 numerics: tensors, linears, key/value caches, calibration maxima and checkpoints."""
