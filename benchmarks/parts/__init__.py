"""Parts of the benchmarks, each with `rows(quick)` in the long form.

`python -m benchmarks.parts.NAME` runs one alone.
"""

import sys
from pathlib import Path

# So that a part finds `benchmarks.core` wherever it is imported from.
ROOT = str(Path(__file__).parents[2])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)
