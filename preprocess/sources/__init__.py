"""Source files of known layouts become rows of one schema.

reader.py is the entry: `read_rows` and `read_prompts`. rows.py holds the schema and reads single
values, tables.py opens files, messages.py turns chats into turns, and each layout has a module: wsdm.py
(PPE too), lmsys.py, arena.py, helpsteer.py, chosen_rejected.py.

To add a layout, write a module like wsdm.py (a function that turns a row into a Judgement, and a LAYOUT
with the columns by which such a file is recognised), and add its LAYOUT to reader.LAYOUTS.
"""
