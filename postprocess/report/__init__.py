"""A run folder → report.html, in three steps.

Read the run folder (run_data, predictions), measure (results, which calls metrics, calibration,
position_bias and worst_rows), draw and render (page with learning_curves and svg). The command is
__main__.py.
"""
