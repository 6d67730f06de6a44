"""`python -m twotower_ext.benchmarks`: the suite's command line."""

from __future__ import annotations

import sys

from .run import main

sys.exit(main())
