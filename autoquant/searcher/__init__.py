"""The knobs of a config, set by what they do on held-out calibration text."""
