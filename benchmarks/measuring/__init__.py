"""What several benchmarks measure with: ratios of things run in turn, emulated clusters, torch's own schedules."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))  # for tests/ranks.py, which no installation has
