"""BT-Adapter for Hugging Face: a temporal branch that gives image-language models a sense of time.

Importing the package is cheap: names are loaded on first use, and torch with them.
"""

import importlib
import importlib.abc
import importlib.util
import sys


__version__ = "0.1.0"

_EXPORTS = {
    "configuration_bt_adapter": ("BTAdapterConfig", "BTAdapterVisionConfig"),
    "modeling_bt_adapter": ("BTAdapterModel", "BTAdapterVisionModel"),
    "modeling_bt_adapter_pretraining": ("BTAdapterForPreTraining",),
    "processing_bt_adapter": ("BTAdapterProcessor",),
    "video_processing_bt_adapter": ("BTAdapterVideoProcessor",),
    "video_io": ("load_video",),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


# The modelling files register themselves with transformers' Auto classes when they are imported. For `AutoModel` to know
# them after a plain `import bt_adapter_hf`, they are imported with the Auto class they register with, not before: it is
# those imports that load torch.
_REGISTERS_WITH = {
    "transformers.models.auto.configuration_auto": "configuration_bt_adapter",
    "transformers.models.auto.modeling_auto": "modeling_bt_adapter",
    "transformers.models.auto.processing_auto": "processing_bt_adapter",
    "transformers.models.auto.video_processing_auto": "video_processing_bt_adapter",
}


class _ImportAfter(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports our module right after the Auto module that it registers with."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in _REGISTERS_WITH:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        self._loaders[fullname] = spec.loader
        spec.loader = self
        return spec

    def __init__(self):
        self._loaders = {}

    def create_module(self, spec):
        return self._loaders[spec.name].create_module(spec)

    def exec_module(self, module):
        name = module.__spec__.name
        module.__spec__.loader = module.__loader__ = loader = self._loaders.pop(name)
        loader.exec_module(module)
        _register(name)


def _register(auto_module: str):
    name = f"{__name__}.{_REGISTERS_WITH[auto_module]}"
    if name not in sys.modules:  # else it is being imported, and registers at its end
        importlib.import_module(name)


sys.meta_path.insert(0, _ImportAfter())
for _auto_module in _REGISTERS_WITH:
    if _auto_module in sys.modules:
        _register(_auto_module)
