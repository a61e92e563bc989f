"""A base model and its adapter become one checkpoint: read, merged, quantised and written, a weight at a time."""
