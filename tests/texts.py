"""`texts` and `patterns`: what `st.text` and `st.from_regex` draw unless told otherwise, without the seconds
that each process of a fresh checkout pays for it: hypothesis finds the characters of UTF-8 by trying all.
"""

from __future__ import annotations

from functools import partial

from hypothesis import strategies as st

UTF8 = st.characters(exclude_categories=["Cs"])
"""Every character but surrogates."""

texts = partial(st.text, UTF8)
patterns = partial(st.from_regex, alphabet=UTF8, fullmatch=True)
