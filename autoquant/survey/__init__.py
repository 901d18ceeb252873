"""Every model type that transformers registers."""
