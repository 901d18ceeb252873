"""The config file format, its schema, and reading, writing and checking it. No torch."""
