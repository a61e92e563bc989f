"""From a rehearsed kernel to a score on Kaggle, by the kaggle command.

To be read in this order:

    push.py            every check, then the datasets, then the kernel
    preflight.py       what is checked before the first byte goes up
    leak_scan.py       secrets, home paths and rows of data in what goes up
    quota.py           GPU hours and storage that Kaggle still grants
    datasets.py        a folder becomes a private dataset, or a new version of one
    upload.py          its files sent, and sent again where something broke off
    dataset_state.py   a dataset as it is here and as Kaggle has it
    kernels.py         a kernel pushed and read back
    submit.py          its run followed, its output checked and submitted
    scores.py          submissions with their scores beside cross-validation
    lineage.py         from a submission back to the raw rows
    client.py          the kaggle command itself, which is never taken at its word
"""
