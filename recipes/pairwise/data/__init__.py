"""From pairs.parquet to batches: rows split by fold and tokenised in both orders, then padded by a collator for each head."""
