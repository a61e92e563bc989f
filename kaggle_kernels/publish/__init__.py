"""From a rehearsed kernel to a score on Kaggle, by Kaggle's own client library.

To be read in this order:

    push.py            every check, then the datasets, then the kernel; what was pushed last
    preflight.py       what is checked before the first byte goes up
    package_files.py   the files that may go up, each checked for its kind
    leak_scan.py       secrets, home paths and rows of data in them
    datasets.py        a private dataset, or a new version of one, compared with its folder
    uploads.py         its files sent, each from where it was broken off
    kernels.py         a kernel saved and read back; a version's run
    status.py          the pushed version's run followed
    submit.py          that version submitted, once
    scores.py          submissions with their scores beside cross-validation
    lineage.py         from a submission back to the raw rows
    smoke.py           every call tried on the user's account
    client.py          a call of Kaggle's API: credentials, time limits, errors
"""
