"""Benches of what has a limit or is compared with other tools: `make bench`, `make bench-…`, `make compare`, `make ladder`."""

# A model's sizes as the benches list them; a BERT has the first four.
SIZE_NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
