"""A teacher's labels: rows of a pairs file scored by runs that did not train on them, for students to learn from."""
