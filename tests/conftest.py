"""How thorough the property tests are: quick at a desk, thorough in CI (and with
`--hypothesis-profile=thorough`).
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("quick", max_examples=20, deadline=None)
settings.register_profile("thorough", max_examples=200, deadline=None)
settings.load_profile("thorough" if os.environ.get("CI") == "true" else "quick")
