"""Raw competition files become pairs.parquet (`python -m preprocess`), and a pair becomes token ids (model_input.py)."""
