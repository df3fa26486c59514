"""What a run leaves for analysts: scores in Parquet, skipped documents, the top of each query."""
