"""A run folder → report.html; the command is __main__.py."""
