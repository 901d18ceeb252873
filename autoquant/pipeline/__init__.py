"""The order of work on a module in memory; nothing here knows a folder."""
