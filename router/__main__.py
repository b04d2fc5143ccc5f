"""`python -m router` is `postroom`."""

from router.cli import main

main()
