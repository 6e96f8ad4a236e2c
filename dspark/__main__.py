"""``python -m dspark`` is ``dspark``."""

import sys

from dspark.cli import main

sys.exit(main())
