"""``python -m ktmoe_np.cli``: the command `ktmoe` where it is not installed."""

import sys

from . import entry

sys.exit(entry())
