"""Everything that speaks to Postgres or runs it. What the statements say is in queries/ and migrations."""
