"""What runs on Kaggle: a test file and packages in, submission.csv out.

A leaf: it imports nothing of this project but itself, so that `build` can put it into one file, and
postprocess can score as the kernel does. To be read in this order:

    main.py            the kernel from beginning to end
    settings.py        what the spec asks for, the clock, the log
    inputs.py          what Kaggle mounted: test rows, packages, wheels
    package.py         a package, checked byte by byte
    checks.py          libraries and GPUs, before the work begins
    visible.py         rows of the train file that the visible run scores too
    scheduling/        which rows are scored when, by which worker
    models/            a model and its answers
    submission.py      from probabilities to a file that is whole
"""
