"""What ``import autoquant`` offers; the commands are options in front of it and a report behind it.

torch and transformers are imported when a function needs them.
"""

from autoquant.api.analysis import analyze as analyze
from autoquant.api.analysis import check as check
from autoquant.api.analysis import init_group as init_group
from autoquant.api.analysis import verify as verify
from autoquant.api.checkpoints import apply as apply
from autoquant.api.checkpoints import convert as convert
from autoquant.api.checkpoints import load as load
from autoquant.api.checkpoints import quantize as quantize
from autoquant.api.configs import load_config as load_config
from autoquant.api.configs import save_config as save_config
from autoquant.api.evaluation import compare as compare
from autoquant.api.evaluation import evaluate as evaluate
from autoquant.api.evaluation import search as search
from autoquant.api.evaluation import serve_check as serve_check
from autoquant.api.pages import write_page as write_page
from autoquant.api.recipes import audit as audit
from autoquant.api.recipes import export_recipe as export_recipe
from autoquant.api.recipes import import_recipe as import_recipe
