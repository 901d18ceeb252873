from __future__ import annotations

from autoquant.cli.main import main

if __name__ == "__main__":
    main()
