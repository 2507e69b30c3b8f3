"""The helper modules training.py and measured.py lie beside other tests."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("runtime", "deferred"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
