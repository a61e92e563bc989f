"""Scores all rows within the time limit, on devices that may fail.

To be read in this order:

    schedule.py        pass after pass: `score_all`, and `plan_next_pass` says which
    pass_runner.py     one pass: batches to workers and back, and what happens when a worker dies
    worker_handle.py   a worker as the kernel's own process sees it: started, given batches, killed
    worker.py          the worker's process: it loads a model and scores what comes
    plan.py            the second order and further models: which rows are worth their seconds
"""
