"""Where things lie."""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SAMPLES = REPOSITORY / "samples"
GOLDENS = REPOSITORY / "tests" / "goldens"
MERGELINE = (sys.executable, "-m", "mergeline.flows.cli")  # the command line, as a process of its own
