import os
import tempfile
from pathlib import Path

import pytest

from bt_adapter_hf.adapters.writing import printable
from bt_adapter_hf.search.files import find_videos


def names(paths, folder):
    return [os.path.relpath(path, folder) for path in paths]


def test_find_videos_in_a_folder(clips):
    (clips / ".hidden").mkdir()
    (clips / ".hidden" / "x.mp4").write_bytes(b"")
    (clips / "._red.mp4").write_bytes(b"")
    found = find_videos([clips])
    assert names(found, clips) == ["empty.mp4", "garbage.avi", "green.mp4", "grey.gif", "more/blue.MP4", "red.mp4"]
    assert all(map(os.path.isabs, found))


def test_find_videos_by_pattern_and_file_each_once(clips):
    found = find_videos([clips / "g*", clips / "**" / "*.MP4", clips / "green.mp4", clips / "notes.txt"])
    assert names(found, clips) == ["garbage.avi", "green.mp4", "grey.gif", "more/blue.MP4", "notes.txt"]


def test_find_videos_refuses_nothing(clips, tmp_path):
    with pytest.raises(FileNotFoundError, match="'.*nowhere' is not a file"):
        find_videos([clips, tmp_path / "nowhere"])
    empty = tmp_path / "no videos"
    empty.mkdir()
    (empty / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"no video under '.*no videos': looked for .*\.mp4"):
        find_videos([empty])


@pytest.mark.parametrize("pattern", [".", "**", "**/*.mp4", "*", "*/*/*.mp4"])
def test_links_in_a_circle(clips, pattern):
    (clips / "more" / "back").symlink_to(clips)
    (clips / "again").symlink_to(clips / "more")
    found = find_videos([clips / pattern])
    assert len({os.stat(path).st_ino for path in found}) == len(found) <= 6
    assert all(path.count("back") <= 1 for path in found)


def test_one_file_under_several_names_is_one_video(clips, monkeypatch):
    os.link(clips / "red.mp4", clips / "hard.mp4")
    (clips / "soft.mp4").symlink_to("red.mp4")
    monkeypatch.chdir(clips)
    found = find_videos(["./red.mp4", "red.mp4", clips / "soft.mp4", clips, clips / "more" / ".." / "red.mp4"])
    assert names(found, clips) == ["red.mp4", "empty.mp4", "garbage.avi", "green.mp4", "grey.gif", "more/blue.MP4"]


def test_wildcards_leave_hidden_files_out_unless_named(clips):
    (clips / ".cache").mkdir()
    (clips / ".cache" / "x.mp4").write_bytes(b"x")
    assert not any(".cache" in path for path in find_videos([clips / "**" / "*.mp4"]))
    assert names(find_videos([clips / ".cache" / "*.mp4"]), clips) == [".cache/x.mp4"]
    with pytest.raises(ValueError, match="'.*is no pattern"):
        find_videos([clips / "**x" / "*.mp4"])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="gives up the rights of root for a moment")
def test_folders_that_cannot_be_read(caplog):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own lets nobody else in
        videos = Path(folder)
        videos.chmod(0o755)
        (videos / "green.mp4").touch()
        (videos / "more").mkdir(0)
        os.seteuid(65534)
        try:
            assert names(find_videos([videos]), videos) == ["green.mp4"]
            assert "more cannot be read, and is left out: Permission denied" in caplog.text
            with pytest.raises(OSError, match="the folder '.*more' cannot be read: Permission denied"):
                find_videos([videos / "more"])
        finally:
            os.seteuid(0)


def test_printable():
    assert printable("a clip é 視頻 👍.mp4") == "a clip é 視頻 👍.mp4"
    assert printable("two\nlines\t.mp4") == "two\\nlines\\t.mp4"
    assert printable(os.fsdecode(b"caf\xe9\x1b[31m.mp4")) == "caf\\xe9\\x1b[31m.mp4"
