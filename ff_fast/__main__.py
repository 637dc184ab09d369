"""``python -m ff_fast`` is the command ``ff-fast``."""

import sys

from ff_fast.cli import main

sys.exit(main())
