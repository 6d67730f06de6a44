"""`python -m twotower_ext.benchmarks.plots`: the pictures' command line."""

from __future__ import annotations

import sys

from . import main

sys.exit(main())
