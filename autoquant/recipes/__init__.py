"""Other tools' recipes: written from a config, read back, and put to the proof."""
