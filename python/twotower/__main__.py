"""`python -m twotower`: the command line."""

from __future__ import annotations

import sys

from twotower.cli import main

sys.exit(main())
