"""How often the fault tests do it: FAULT_REPEATS in the environment, 20 otherwise."""

from __future__ import annotations

import os

FAULT_REPEATS = int(os.environ.get("FAULT_REPEATS", "20"))
