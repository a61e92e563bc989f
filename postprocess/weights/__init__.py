"""A base model and its adapter become one checkpoint: read, merged, quantised and written in a stream."""
