"""One module for each format of a quantized checkpoint."""
