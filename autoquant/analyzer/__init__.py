"""Reads a model's symmetries off its graph: model -> graph -> findings -> config."""
