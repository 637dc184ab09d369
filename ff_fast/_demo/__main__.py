"""The entry of the demo's processes: ``python -m ff_fast._demo ROLE DESCRIPTOR``."""

import sys

from ff_fast._demo.run import child

child(*sys.argv[1:])
