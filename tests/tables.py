"""`each`: one test over a table of cases, for checks that cost less than a test item does."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any


def each(names: str | Sequence[str], cases: Iterable[Any]) -> Callable[[Callable[..., Any]], Any]:
    """Like `pytest.mark.parametrize`, in one item: the test runs for every case in turn, and the first that
    fails names its case. Fixtures are shared by all cases. Several of them multiply.
    """
    single = isinstance(names, str) and "," not in names
    listed = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    table = [dict(zip(listed, (case,) if single else case, strict=True)) for case in cases]
    if not table:
        raise ValueError(f"no cases for {names}")

    def decorate(test: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.iscoroutinefunction(test):

            @wraps(test)
            async def run(*args: Any, **fixtures: Any) -> None:
                for case in table:
                    with _naming(case):
                        await test(*args, **fixtures, **case)
        else:

            @wraps(test)
            def run(*args: Any, **fixtures: Any) -> None:
                for case in table:
                    with _naming(case):
                        test(*args, **fixtures, **case)

        signature = inspect.signature(test)
        fixtures = [one for name, one in signature.parameters.items() if name not in listed]
        run.__signature__ = signature.replace(parameters=fixtures)  # type: ignore[attr-defined]
        return run

    return decorate


@contextmanager
def _naming(case: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        error.add_note(f"case: {case!r:.2000}")
        raise
