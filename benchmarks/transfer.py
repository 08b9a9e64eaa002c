"""KV transfers between two processes of this host, beside memcpy and a plain socket: see `workers.bench.transfer`.

.venv/bin/python benchmarks/transfer.py [--json FILE] [--path PATH] [--size SIZE] …
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script, which is not in a package

from workers.bench.transfer import main

if __name__ == "__main__":
    main()
