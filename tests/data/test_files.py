"""Where the paths that a table names may lead."""

import pytest

from bt_adapter_hf.data.files import join
from bt_adapter_hf.models.video_errors import VideoAccessError


COMMIT = "0" * 40
REPO = f"hf://datasets/org/clips@{COMMIT}"


@pytest.mark.parametrize(
    "root, path, found",
    [
        (f"{REPO}/data", "a.mp4", f"{REPO}/data/a.mp4"),
        (f"{REPO}/data", "./x/../a.mp4", f"{REPO}/data/a.mp4"),
        (f"{REPO}/data", "../videos/a.mp4", f"{REPO}/videos/a.mp4"),
        (f"{REPO}/data", "hf://datasets/org/clips/videos/a.mp4", f"{REPO}/videos/a.mp4"),
        (f"{REPO}/data", "hf://datasets/org/clips@v2/a.mp4", "hf://datasets/org/clips@v2/a.mp4"),
        (f"{REPO}/data", "https://host/a.mp4", "https://host/a.mp4"),
        ("/media", "a/b.mp4", "/media/a/b.mp4"),
        ("/media", "/media/b.mp4", "/media/b.mp4"),
        ("https://host/clips", "a.mp4", "https://host/clips/a.mp4"),
        (REPO, "hf://datasets/org/more/a.mp4", f"hf://datasets/org/more@{COMMIT}/a.mp4"),
    ],
)
def test_what_a_table_of_others_may_name(root, path, found):
    within = [REPO, "/media", f"hf://datasets/org/more@{COMMIT}", "https://host/clips"]
    assert join(root, path, within) == found


@pytest.mark.parametrize(
    "root, path",
    [
        (f"{REPO}/data", "/etc/passwd"),
        (f"{REPO}/data", "../../secret/a.mp4"),
        (f"{REPO}/data", "../../../../datasets/org/secret/a.mp4"),
        (f"{REPO}/data", "hf://datasets/org/secret/a.mp4"),
        (f"{REPO}/data", "hf://datasets/org/clips2/a.mp4"),
        (f"{REPO}/data", "hf://org/model/a.mp4"),
        (f"{REPO}/data", "hf://datasets/org/clips/../secret/a.mp4"),
        ("/media", "../etc/passwd"),
        ("/media", "/media2/a.mp4"),
        ("/media", "file:///etc/passwd"),
        ("/media", "file:///media/%2e%2e/etc/passwd"),
        ("/media", "/media/../etc/passwd"),
        ("https://host/clips", "../secret.mp4"),
        ("https://host/clips", "/etc/passwd"),
    ],
)
def test_what_it_may_not_name(root, path):
    with pytest.raises(VideoAccessError, match="lies outside of"):
        join(root, path, [REPO, "/media", "https://host/clips"])


@pytest.mark.parametrize("path", ["s3://bucket/a.mp4", "ssh://host/a", "zip://a.mp4::/etc/a.zip", "hf://a::b"])
def test_addresses_that_nobody_reads(path):
    for within in (None, [REPO]):
        with pytest.raises(VideoAccessError, match="neither a path nor an address"):
            join("/media", path, within)


def test_a_table_of_ones_own_may_name_anything():
    assert join("/media", "../a.mp4") == "/media/../a.mp4" and join("/media", "/b.mp4") == "/b.mp4"
    assert join("/media", "hf://datasets/org/other/a.mp4") == "hf://datasets/org/other/a.mp4"
    assert join("/media", "file:///tmp/a%20b.mp4") == "/tmp/a b.mp4"
    assert join(REPO, "a.mp4") == f"{REPO}/a.mp4"
