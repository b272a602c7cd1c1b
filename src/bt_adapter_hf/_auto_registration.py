"""Makes transformers' Auto classes know ours after a plain `import bt_adapter_hf`, without importing torch for it.

Our modelling files register themselves when they are imported. That loads torch, so it waits until the Auto class in
question has been imported, by whomever, and until no import inside transformers or this package is under way (modules
of transformers import one another in circles). Nothing is changed: only the end of such imports is noticed.
"""

import importlib.abc
import importlib.machinery
import sys


_REGISTERS_WITH = {
    "transformers.models.auto.configuration_auto": "configuration_bt_adapter",
    "transformers.models.auto.modeling_auto": "modeling_bt_adapter",
    "transformers.models.auto.processing_auto": "processing_bt_adapter",
    "transformers.models.auto.video_processing_auto": "video_processing_bt_adapter",
}


class _NoticeImports(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self):
        self._loaders = {}
        self._depth = 0  # imports under way

    def find_spec(self, fullname, path=None, target=None):
        if not fullname.startswith(("transformers.", f"{__package__}.")):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            self._loaders[fullname] = spec.loader
            spec.loader = self
        return spec

    def create_module(self, spec):
        return self._loaders[spec.name].create_module(spec)

    def exec_module(self, module):
        spec = module.__spec__
        spec.loader = module.__loader__ = loader = self._loaders.pop(spec.name)
        self._depth += 1
        try:
            loader.exec_module(module)
        finally:
            self._depth -= 1
        if self._depth == 0:
            register_with_loaded_auto_classes()


def register_with_loaded_auto_classes():
    for auto_module, name in _REGISTERS_WITH.items():
        name = f"{__package__}.{name}"
        if auto_module in sys.modules and name not in sys.modules:  # in there: it registers at its end
            importlib.import_module(name)


def install():
    sys.meta_path.insert(0, _NoticeImports())
    register_with_loaded_auto_classes()
