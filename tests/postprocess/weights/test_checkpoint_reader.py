import pytest
import torch
from safetensors.torch import load_file

from postprocess.weights.checkpoint_reader import open_tensors
from postprocess.weights.shard_writer import Planned, Stored, write_shards
from preprocess.core.errors import UserError

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float16).reshape(2, 3),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c": torch.tensor(7, dtype=torch.int64),
    "d": torch.tensor([1, 2, 255], dtype=torch.uint8),
    "e": torch.zeros(0, 4),
}


def write_tensors(folder, tensors, **options):
    planned = [Planned(name, (name,), tensor.nbytes) for name, tensor in tensors.items()]

    def store(name):
        yield Stored(name, tensors[name].dtype, tuple(tensors[name].shape), [tensors[name]])

    write_shards(folder, planned, store, **options)


def test_what_is_written_is_read_back_by_safetensors(tmp_path):
    write_tensors(tmp_path, TENSORS)
    found = load_file(tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert all(found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_shards_hold_at_most_the_bytes_asked_for(tmp_path):
    tensors = {f"layer.{number}": torch.full((10,), number, dtype=torch.float32) for number in range(5)}
    write_tensors(tmp_path, tensors, shard_bytes=80)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ]
    with open_tensors(tmp_path) as found:
        assert all(torch.equal(found.get(name), tensor) for name, tensor in tensors.items())
        assert found.shape("layer.3") == (10,)


def test_a_tensor_that_was_announced_must_come(tmp_path):
    with pytest.raises(ValueError, match="announced and not written"):
        write_shards(
            tmp_path, [Planned("a", ("a", "a.scale"), 4)], lambda name: [Stored(name, torch.float32, (1,), [torch.zeros(1)])]
        )


def test_a_folder_without_weights_is_one_error(tmp_path):
    with pytest.raises(UserError, match="no model.safetensors"), open_tensors(tmp_path):
        pass


def test_a_shard_that_is_absent_is_one_error(tmp_path):
    tensors = {f"layer.{number}": torch.zeros(10) for number in range(3)}
    write_tensors(tmp_path, tensors, shard_bytes=40)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003.safetensors: no such file"), open_tensors(tmp_path):
        pass


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": 5}'])
def test_an_index_without_a_weight_map_is_one_error(index, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match="no weight_map of tensors to files"), open_tensors(tmp_path):
        pass
