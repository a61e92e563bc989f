"""How large a packaged model is, and whether it fits the GPUs that will serve it: arithmetic, no weights."""
