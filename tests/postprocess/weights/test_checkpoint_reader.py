import pytest
import torch
from safetensors.torch import load_file

from postprocess.weights.checkpoint_reader import open_tensors
from postprocess.weights.shard_writer import Stored, write_shards
from preprocess.core.errors import UserError

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float16).reshape(2, 3),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c": torch.tensor(7, dtype=torch.int64),
    "d": torch.tensor([1, 2, 255], dtype=torch.uint8),
    "e": torch.zeros(0, 4),
}


def write_tensors(folder, tensors, **options):
    weight_bytes = {name: tensor.nbytes for name, tensor in tensors.items()}

    def store(name):
        yield Stored(name, tensors[name].dtype, tuple(tensors[name].shape), [tensors[name]])

    write_shards(folder, weight_bytes, store, **options)


@pytest.mark.parametrize(("shard_bytes", "files"), [(10**6, 1), (12, 3)])
def test_shards_of_at_most_the_bytes_asked_for_are_read_back(shard_bytes, files, tmp_path):
    write_tensors(tmp_path, TENSORS, shard_bytes=shard_bytes)
    written = {}
    for path in tmp_path.glob("*.safetensors"):
        written |= load_file(path)
    assert written.keys() == TENSORS.keys()
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    with open_tensors(tmp_path) as read:
        for name, tensor in TENSORS.items():
            assert (read.get(name).dtype, read.shape(name)) == (tensor.dtype, tuple(tensor.shape))
            assert torch.equal(read.get(name), tensor)
            assert torch.equal(written[name], tensor)


def test_a_shard_that_is_absent_is_one_error(tmp_path):
    write_tensors(tmp_path, TENSORS, shard_bytes=12)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003.safetensors: no such file"), open_tensors(tmp_path):
        pass


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "no model.safetensors"),
        ("[]", "no weight_map of tensors to files"),
        ('{"weight_map": 5}', "no weight_map of tensors to files"),
    ],
)
def test_a_folder_without_weights_or_with_another_index_is_one_error(index, message, tmp_path):
    if index:
        (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=message), open_tensors(tmp_path):
        pass
