"""The foundation that every room stands on: user errors, atomic files, validation messages, progress bars and the ledger.

Nothing here knows about pairs, models or kernels, and nothing here imports another room.
"""
