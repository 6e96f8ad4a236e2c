"""Makes ``from helpers.drafters import …`` work from every test. Threads are left to ``OMP_NUM_THREADS``, which torch reads itself."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from helpers.triton_interpreter import use_interpreter

use_interpreter()
