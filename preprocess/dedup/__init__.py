"""Near-duplicate prompts: they share a group, hence a fold, and a report proves that none leaks.

grouping.py makes groups (minhash.py proposes candidates); leaks.py checks
the folds by a search of its own (prefix_filter.py). ngrams.py says what makes two prompts similar.
"""
