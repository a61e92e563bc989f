"""Folders that are replaced as a whole."""

import shutil

import pytest

from preprocess.core.files import atomic_folder, remove_leftovers, resumable_folder


@pytest.mark.parametrize(
    "replacing", [atomic_folder, lambda path: resumable_folder(path, "key", 0)], ids=["atomic", "resumable"]
)
def test_a_kill_while_the_old_folder_is_removed_leaves_a_whole_one(replacing, tmp_path, monkeypatch):
    path = tmp_path / "package"
    with replacing(path) as folder:
        for name in ("a", "b"):
            (folder / name).write_text("old")

    def remove_one_file_and_die(target, **options):
        if target.exists():
            next(target.iterdir()).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt), replacing(path) as folder:
        for name in ("a", "b"):
            (folder / name).write_text("new")
        patched.setattr(shutil, "rmtree", remove_one_file_and_die)
    assert {file.name: file.read_text() for file in path.iterdir()} == {"a": "new", "b": "new"}
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
