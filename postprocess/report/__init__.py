"""A run folder → report.html, in three steps.

Read the run folder (run_data, predictions), compute (results, which calls metrics, calibration,
position_bias, learning_curves and worst_rows), draw and render (page with head_facts and svg).
The command is __main__.py.
"""
