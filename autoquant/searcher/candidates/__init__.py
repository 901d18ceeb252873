"""The settings that a search tries, one module for each family of knobs."""
