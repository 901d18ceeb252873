"""What ``import autoquant`` offers; the commands are options in front of it and a report behind it.

torch and transformers are imported when a function needs them.
"""

from autoquant.api.analysis import analyze, check, verify
from autoquant.api.checkpoints import apply, convert, load, quantize
from autoquant.api.configs import load_config, save_config
from autoquant.api.evaluation import compare, evaluate, search, serve_check

__all__ = [
    "analyze",
    "apply",
    "check",
    "compare",
    "convert",
    "evaluate",
    "load",
    "load_config",
    "quantize",
    "save_config",
    "search",
    "serve_check",
    "verify",
]
