"""Where the repository's own files are, and the real data sets where they can be had."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
GOLDEN = ROOT / "tests" / "golden"
TOOLS = ROOT / "tools"
REAL_SETS = ROOT.parent / "shared" / "data"
