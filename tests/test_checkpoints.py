"""tern/checkpoints.py: a checkpoint is arrays and a JSON state in one file, whole or not there."""

from __future__ import annotations

import os

import numpy as np
import pytest
import safetensors.numpy

from tern.checkpoints import FILE, CheckpointError, check_tensors, read_checkpoint, read_state, write_checkpoint
from tern.files import WriteError

pytestmark = pytest.mark.fast
ARRAYS = {"latent/a": np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3), "codes/a": np.array([[-1, 0, 1]], np.int8),
          "scales/a": np.array([[7], [65535]], np.uint16), "rng/cpu": np.arange(5, dtype=np.uint8)}
STATE = {"step": 3, "name": "ä ▁", "formats": {"a": {"kind": "ternary", "group_size": 3}}}


def test_arrays_and_state_come_back_from_a_file_and_from_its_folder(tmp_path):
    write_checkpoint(tmp_path / FILE, ARRAYS | {"latent/t": ARRAYS["latent/a"].T}, STATE)
    for path in (tmp_path, tmp_path / FILE, str(tmp_path)):
        arrays, state = read_checkpoint(path)
        assert state == STATE == read_state(path)
        assert arrays.keys() == ARRAYS.keys() | {"latent/t"}
        for name, x in ARRAYS.items():
            assert arrays[name].dtype == x.dtype and np.array_equal(arrays[name], x), name
        assert np.array_equal(arrays["latent/t"], ARRAYS["latent/a"].T)  # not contiguous
    write_checkpoint(tmp_path / FILE, ARRAYS, STATE | {"step": 4})
    assert read_state(tmp_path)["step"] == 4 and os.listdir(tmp_path) == [FILE]


def test_the_last_good_one_is_kept_where_a_new_one_cannot_be_written(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / FILE, ARRAYS, STATE)
    before = (tmp_path / FILE).read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match=f"cannot write .*{FILE}: No space left on device"):
        write_checkpoint(tmp_path / FILE, ARRAYS, STATE | {"step": 4})
    assert (tmp_path / FILE).read_bytes() == before and os.listdir(tmp_path) == [FILE]


@pytest.mark.parametrize(("damage", "said"), [
    (lambda data: data[:-20], "delete it"),
    (lambda data: b"\x80\x04" + data[2:], "delete it"),
    (lambda data: b"", "delete it"),
    (lambda data: safetensors.numpy.save({"x": np.zeros(1)}), "'state'"),
    (lambda data: safetensors.numpy.save({"x": np.zeros(1)}, {"state": "[1]"}), "not a JSON object"),
    (lambda data: safetensors.numpy.save({"x": np.zeros(1)}, {"state": "[" * 100_000}), "delete it"),
    (lambda data: None, "no such checkpoint"),
], ids=["truncated", "a pickle's head", "empty", "no state", "another state", "a nesting", "missing"])
def test_a_bad_checkpoint_is_one_clear_error(tmp_path, damage, said):
    path = tmp_path / FILE
    write_checkpoint(path, ARRAYS, STATE)
    data = damage(path.read_bytes())
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    for read in (read_checkpoint, read_state):
        with pytest.raises(CheckpointError, match=said) as e:
            read(tmp_path)
        assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / FILE)
    with pytest.raises(CheckpointError, match="not a file"):
        read_state(tmp_path)


def test_tensors_of_another_model_are_named():
    x = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(1, np.float32)}
    check_tensors(x, x)
    for wrong, said in (({"a": x["a"]}, "tensor b is missing"), (x | {"c": x["a"]}, "tensor c is missing or not known"),
                        (x | {"a": x["a"].T}, r"tensor a is float32 \(3, 2\), not float32 \(2, 3\)"),
                        (x | {"b": np.zeros(1)}, "tensor b is float64")):
        with pytest.raises(ValueError, match=said):
            check_tensors(wrong, x)
