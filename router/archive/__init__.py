"""Archives: Parquet files that stand in for rows which are no longer in the database."""
