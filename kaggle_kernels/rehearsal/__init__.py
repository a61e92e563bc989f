"""The rehearsal: a generated kernel runs on this machine as it would in Kaggle's hidden test.

`rehearse.py` takes the steps in order, each from a module of its own, as the options in scenario.py say:

1. rows.py makes the test rows, with adversarial_rows.py and adversarial_texts.py for odd ones;
   verdicts.py reads the human verdicts that some test files hold.
2. kaggle_tree.py lays out /kaggle: packages, test file, train file.
3. sandbox.py runs the kernel there, without network and repository; fault_injection.py kills
   workers.
4. validate.py checks what the kernel wrote, without relying on the kernel's own checks.
5. verdicts.py measures accuracy and log loss; throughput.py predicts the hours on two T4s.
6. rehearse.py writes rehearsal.json, which a push asks for.
"""
