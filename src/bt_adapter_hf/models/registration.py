"""Makes transformers' Auto classes know ours after a plain `import bt_adapter_hf`, without importing torch for it.

Our modelling files register themselves when they are imported. That loads torch, so it waits until the Auto class in
question has been imported, by whomever, and until no import inside transformers or this package is under way (modules
of transformers import one another in circles). Nothing is changed: only the end of such imports is noticed.
"""

import importlib.abc
import importlib.machinery
import sys


_PACKAGE = __package__.partition(".")[0]
_REGISTERS_WITH = {
    "transformers.models.auto.configuration_auto": (
        "configuration_bt_adapter",
        "configuration_bt_adapter_chat",
        "configuration_bt_adapter_gif_qa",
    ),
    "transformers.models.auto.modeling_auto": (
        "modeling_bt_adapter",
        "modeling_bt_adapter_vision",
        "modeling_bt_adapter_llava",
        "modeling_bt_adapter_instructblip",
        "modeling_bt_adapter_minigpt4",
        "modeling_xclip_frames",
        "modeling_bt_adapter_gif_qa",
    ),
    "transformers.models.auto.processing_auto": (
        "processing_bt_adapter",
        "processing_bt_adapter_llava",
        "processing_bt_adapter_qformer",
        "processing_bt_adapter_gif_qa",
    ),
    "transformers.models.auto.video_processing_auto": ("video_processing_bt_adapter",),
}


class _NoticeImports(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if not fullname.startswith(("transformers.", f"{_PACKAGE}.")):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """The module's own loader, and a count of the imports under way."""

    depth = 0

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):  # what else a loader offers: `get_code`, `get_source`, ...
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self._loader
        _Loader.depth += 1
        try:
            self._loader.exec_module(module)
        finally:
            _Loader.depth -= 1
        if _Loader.depth == 0:
            register_with_loaded_auto_classes()


def register_with_loaded_auto_classes():
    for auto_module, names in _REGISTERS_WITH.items():
        for name in names:
            name = f"{__package__}.{name}"
            if auto_module in sys.modules and name not in sys.modules:  # in there: it registers at its end
                importlib.import_module(name)


def install():
    sys.meta_path.insert(0, _NoticeImports())
    register_with_loaded_auto_classes()
