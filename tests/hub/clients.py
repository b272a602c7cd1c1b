"""Points unmodified clients at a `Hub`: by environment and constants only, in this process or in a fresh one."""

import importlib
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub.server import TOKEN, Hub


GUARD = Path(__file__).parent / "guard"
REPOSITORY = Path(__file__).parents[2]


def environment(hub: Hub, home: Path, token: str | None = TOKEN) -> dict[str, str | None]:
    """Variables of a process that uses `hub`, with caches in `home`; None where one must not be set."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": None,
        "TRANSFORMERS_OFFLINE": None,
        "HF_HUB_DISABLE_XET": None if hub.xet else "1",
        "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2",  # of 5 by default, with waits of minutes in all
        "HF_XET_CLIENT_RETRY_BASE_DELAY": "50ms",
        "HF_XET_CLIENT_READ_TIMEOUT": "2s",
        "HF_XET_CLIENT_RECONSTRUCTION_API_VERSION": "1",
        "HF_XET_CLIENT_SHARD_API_VERSION": "1",
        "HF_XET_CLIENT_LEGACY_DIRECT_XORB_UPLOAD": "1",
        "HF_XET_XORB_COMPRESSION_POLICY": "none",
        "HF_XET_TELEMETRY_ENABLED": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "LOOPBACK_ONLY": "1",
        "PYTHONPATH": os.pathsep.join([str(GUARD), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]).strip(
            os.pathsep
        ),
        **{name: None for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE")},
    }


def point_here(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch, token: str | None = TOKEN) -> None:
    """Makes the clients in this process use `hub`, as if they had been imported with its `environment`.

    They read their settings once, when they are imported, so the modules that hold them are evaluated again, and what
    comes out is set in them and in the modules that have copied a setting by name.

    Code that is loaded from the Hub stays in `sys.modules`: use `run_python` for that.
    """
    import huggingface_hub.constants
    import transformers.utils.hub

    # What copies a setting must be imported before, or it would keep one of this test.
    for name in ("_cache_manager", "_cache_assets", "_git_credential", "_http", "tqdm"):
        importlib.import_module(f"huggingface_hub.utils.{name}")
    import datasets.config
    import huggingface_hub.hf_api
    import transformers.dynamic_module_utils  # noqa: F401

    for name, value in environment(hub, home, token).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)

    def use(module, fresh: dict) -> None:
        for name, value in fresh.items():
            old = getattr(module, name, None)
            if not name.isupper() or name.startswith("__") or old == value:
                continue
            for other in list(sys.modules.values()):
                ours = getattr(other, "__name__", "").split(".")[0] in ("huggingface_hub", "transformers", "datasets")
                if ours and vars(other).get(name, ...) is old:
                    monkeypatch.setattr(other, name, value)

    for module in (huggingface_hub.constants, datasets.config):
        use(module, runpy.run_path(module.__file__))
    use(transformers.utils.hub, {"HF_MODULES_CACHE": str(home / "modules")})
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # made with the settings at first use
    monkeypatch.setattr(sys, "path", list(sys.path))  # transformers adds its folder of modules


def run_python(
    code: str,
    hub: Hub,
    home: Path,
    token: str | None = TOKEN,
    timeout: float = 240,
    check: bool = True,
    **variables: str,
) -> subprocess.CompletedProcess:
    """Runs code in a fresh process that uses `hub`, with caches in `home`.

    Args:
        check: raise if the process fails, showing what it wrote.
        variables: further environment variables, e.g. `HF_HUB_OFFLINE="1"`.
    """
    settings = {**os.environ, **environment(hub, home, token), **variables}
    settings = {name: value for name, value in settings.items() if value is not None}
    done = subprocess.run(
        [sys.executable, "-c", code], env=settings, cwd=home.parent, capture_output=True, text=True, timeout=timeout
    )
    if check and done.returncode:
        raise AssertionError(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done
