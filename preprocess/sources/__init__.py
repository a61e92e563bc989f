"""Source files of known layouts become rows of one schema.

reader.py is the entry: `read_batches` and `read_prompts`. rows.py holds the schema and reads single
values, tables.py opens files, messages.py turns chats into turns. competition.py makes the layouts of
the competitions; each other layout has a module: arena.py, ppe.py, helpsteer.py, chosen_rejected.py.

To add a layout, write a module like ppe.py (a function that turns a row into a Judgement, and a LAYOUT
with the columns by which such a file is recognised), and add its LAYOUT to reader.LAYOUTS.
"""
