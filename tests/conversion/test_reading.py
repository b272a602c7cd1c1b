"""Checkpoint files: every container, and what must be refused."""

import collections
import os
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bt_adapter_hf.conversion import CheckpointError, read_checkpoint


TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.float16)}


class RunsCode:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize(
    "wrap", [lambda t: t, lambda t: {"state_dict": collections.OrderedDict(t), "meta": {"epoch": 1}}]
)
def test_pickled_containers(tmp_path, wrap, old_format):
    path = tmp_path / "w.pth"
    torch.save(wrap(TENSORS), path, _use_new_zipfile_serialization=not old_format)
    found = read_checkpoint(path)
    assert list(found) == list(TENSORS) and all(found[key].equal(t) for key, t in TENSORS.items())


def test_safetensors(tmp_path):
    save_file(TENSORS, tmp_path / "w.safetensors")
    assert read_checkpoint(tmp_path / "w.safetensors")["b"].dtype == torch.float16


@pytest.mark.parametrize("old_format", [False, True])
def test_training_record_of_mmengine_is_skipped(tmp_path, monkeypatch, old_format):
    """mmengine's own checkpoints hold its HistoryBuffer, with numpy arrays and bound functions."""
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self):
            self._log_history, self.statistics_methods = np.array([1.0, 2.0]), {"mean": HistoryBuffer.mean}

        def mean(self):
            raise AssertionError("never called")

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    HistoryBuffer.mean.__module__, HistoryBuffer.mean.__qualname__ = module.__name__, "HistoryBuffer.mean"
    module.HistoryBuffer = HistoryBuffer
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    path = tmp_path / "epoch_1.pth"
    content = {"state_dict": TENSORS, "message_hub": {"loss": HistoryBuffer(), "lr": np.float64(0.1)}}
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.delitem(sys.modules, name)
    assert read_checkpoint(path).keys() == TENSORS.keys()


@pytest.mark.parametrize("old_format", [False, True])
def test_code_is_refused_and_not_run(tmp_path, old_format):
    path, marker = tmp_path / "evil.pth", tmp_path / "it-ran"
    torch.save({**TENSORS, "x": RunsCode(marker)}, path, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(CheckpointError, match=r"refused: besides tensors its pickle names \w+\.mkdir.*safetensors"):
        read_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_truncated_file(tmp_path, name, share):
    path = tmp_path / name
    big = {key: torch.randn(64, 64) for key in "abcd"}
    save_file(big, path) if name.endswith("safetensors") else torch.save(big, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match="truncated") as caught:
        read_checkpoint(path)
    assert "weights_only" not in str(caught.value)  # torch's own advice is to run the file


def test_other_files(tmp_path):
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    with pytest.raises(CheckpointError, match="another kind of file"):
        read_checkpoint(tmp_path / "page.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list"):
        read_checkpoint(tmp_path / "list.pth")
    torch.save({"model": TENSORS, "epoch": 3}, tmp_path / "nested.pth")
    with pytest.raises(CheckpointError, match="no state dict: 2 of its 2 entries"):
        read_checkpoint(tmp_path / "nested.pth")
    with pytest.raises(FileNotFoundError, match="folder"):
        read_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="missing"):
        read_checkpoint(tmp_path / "absent.pth")
