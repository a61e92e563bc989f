"""A package's model: loaded as it was trained, placed on the devices, and run.

To be read in this order:

    model.py           the model of a package, loaded as its contract says
    gptq.py            layers whose GPTQ weights are unpacked in each pass
    placement.py       layers over several devices, where one cannot hold the model
    pipeline.py        a batch in flight on each of those devices
    scoring.py         from pairs to probabilities: requests, batches, one forward pass, the verdicts' logits
    shortcuts.py       work of a forward pass that nobody reads, left out
"""
