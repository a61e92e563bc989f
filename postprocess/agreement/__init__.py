"""Is the package what was trained? Both score the same validation rows; the gate compares them."""
