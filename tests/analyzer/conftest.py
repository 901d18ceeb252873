from __future__ import annotations

import sys
from pathlib import Path

# Tests are imported by file, so the oracle and the small models that they share have to be made importable.
sys.path.insert(0, str(Path(__file__).parent))
