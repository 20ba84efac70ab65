"""How hard the property tests search: KTMOE_HYPOTHESIS_PROFILE is dev (the default), ci or short."""

from __future__ import annotations

import os

from converted import source, target  # noqa: F401  (fixtures)
from hypothesis import settings

# No deadlines: a machine that is shared or emulated is no error.
settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("short", deadline=None, derandomize=True, max_examples=5)
settings.load_profile(os.environ.get("KTMOE_HYPOTHESIS_PROFILE", "dev"))
