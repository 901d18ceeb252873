"""Text through a float model: what is observed on the way."""
