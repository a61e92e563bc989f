"""Raw competition files become pairs.parquet, and a pair becomes token ids."""
