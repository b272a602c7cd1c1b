import errno
import os
import resource
import signal
import stat

import pytest
import torch
from safetensors.torch import save_file

from bt_adapter_hf.adapters.writing import written_whole


def test_a_file_takes_its_place_at_the_end_with_the_rights_of_any_new_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    (tmp_path / "other").touch()
    with written_whole(path) as file:
        file.write_text("new")
        file.chmod(0o600)  # as safetensors leaves its files
        assert path.read_text() == "old"
        assert file.parent == tmp_path and file.name.startswith(".a.json.")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["a.json", "other"]


def test_a_folder_replaces_a_folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old.txt").touch()
    with written_whole(tmp_path / "model") as folder:
        folder.mkdir()
        (folder / "new.txt").touch()
    assert os.listdir(tmp_path / "model") == ["new.txt"] and os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_after_an_error_nothing_is_left_and_the_old_one_stays(tmp_path, kind):
    path = tmp_path / "kept"
    path.write_text("old")
    with pytest.raises(OSError, match="No space left on device: '.*kept'"), written_whole(path) as written:
        if kind == "folder":
            written.mkdir()
            written = written / "file"
        written.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["kept"]


@pytest.fixture
def small_files():
    """No file may grow beyond 4 KiB, which the operating system says as it says that a disk is full."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_libraries_with_errors_of_their_own(tmp_path, small_files):
    tensors = {"a": torch.zeros(10_000)}
    with pytest.raises(OSError, match="File too large: '.*a.safetensors'"):
        with written_whole(tmp_path / "a.safetensors") as path:
            save_file(tensors, path)
    with pytest.raises(OSError, match="File too large: '.*a.pth'"):
        with written_whole(tmp_path / "a.pth") as path, path.open("wb") as file:
            torch.save(tensors, file)
    assert os.listdir(tmp_path) == []
