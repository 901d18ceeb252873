from __future__ import annotations

import os

# Small models on few cores: more threads than one only get in each other's way. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing is ever downloaded by a test.
os.environ["HF_HUB_OFFLINE"] = "1"
