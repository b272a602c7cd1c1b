"""A Hub on 127.0.0.1 for each test, and clients that use it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.clients import point_here
from tests.hub.guard import sitecustomize as guard
from tests.hub.server import Hub


both_transports = pytest.mark.parametrize("hub", ["lfs", "xet"], indirect=True)


@pytest.fixture
def hf_home(tmp_path) -> Path:
    """Folder of the clients' caches, empty at first."""
    home = tmp_path / "hf_home"
    home.mkdir()
    return home


@pytest.fixture
def hub(hf_home, monkeypatch, request) -> Iterator[Hub]:
    """A Hub that the clients in this process and in its children use, with the token of its user `tester`.

    Nothing but this machine can be reached while it lives. Its large files go over Xet in tests that are marked with
    `both_transports`, and over the older protocol in all.
    """
    import huggingface_hub
    from huggingface_hub.utils._xet import abort_xet_session

    abort_xet_session()  # it has read its settings, and remembers what it has put elsewhere
    with Hub(xet=getattr(request, "param", "lfs") == "xet") as hub:
        point_here(hub, hf_home, monkeypatch)
        guard.refused.clear()
        yield hub
        huggingface_hub.close_session()  # connections that wait for more
        huggingface_hub.HfFileSystem.clear_instance_cache()
    assert not guard.refused, f"connections to {guard.refused} were tried"
    assert not hub.leaks, f"a token was sent to the storage: {hub.leaks}"
