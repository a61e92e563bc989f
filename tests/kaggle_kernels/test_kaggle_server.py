"""The real kaggle command against the stand-in: what it prints, and how often it exits with 0 where nothing was done."""

import subprocess


def kaggle_command(*arguments):
    """Run `kaggle`."""
    return subprocess.run(["kaggle", *map(str, arguments)], capture_output=True, text=True, timeout=60)


def test_a_dataset_that_is_not_there_is_a_404(kaggle):
    ended = kaggle_command("datasets", "status", "tester/absent")
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", "Dataset tester/absent was not found\n")
