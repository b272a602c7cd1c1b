"""`import bt_adapter_hf` is cheap, and the Auto classes know ours in whatever order things are imported."""

import subprocess
import sys

import pytest


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_import_loads_neither_torch_nor_training_nor_demo_packages():
    code = "import sys, bt_adapter_hf; print([m for m in {} if m in sys.modules])"
    heavy = ["torch", "transformers", "datasets", "accelerate", "peft", "sklearn", "gradio", "matplotlib", "av"]
    assert run(code.format(heavy)) == "[]"


def test_inference_imports_no_training_package():
    code = (
        "import sys\n"
        "from bt_adapter_hf import BTAdapterModel, BTAdapterProcessor, load_video\n"
        "ours = [m for m in sys.modules if m.startswith('bt_adapter_hf.')]\n"
        "print([m for m in ours if m.split('.')[1] in ('training', 'data', 'evaluation', 'demo', 'cli')],\n"
        "      [m for m in ('datasets', 'peft', 'sklearn', 'gradio') if m in sys.modules])"
    )
    assert run(code) == "[] []"


@pytest.mark.parametrize(
    "imports",
    [
        "import bt_adapter_hf; from transformers import AutoConfig, AutoModel",
        "from transformers import AutoConfig, AutoModel; import bt_adapter_hf",
        "import bt_adapter_hf; import transformers.models.llava.modeling_llava; "
        "from transformers import AutoConfig, AutoModel",
        "import bt_adapter_hf; from transformers import Trainer, AutoConfig, AutoModel",
        "from bt_adapter_hf import BTAdapterConfig; from transformers import AutoConfig, AutoModel",
    ],
)
def test_auto_classes_know_ours(imports):
    code = (
        f"{imports}\n"
        "from transformers import AutoProcessor, AutoVideoProcessor\n"
        "config = AutoConfig.for_model('bt_adapter_vision', backbone=dict(model_type='clip_vision_model',\n"
        "    hidden_size=8, num_attention_heads=2, num_hidden_layers=2, intermediate_size=8))\n"
        "print(type(AutoModel.from_config(config)).__name__)\n"
        "from transformers.models.auto.processing_auto import processor_class_from_name\n"
        "print(processor_class_from_name('BTAdapterProcessor').__name__)"
    )
    assert run(code).split() == ["BTAdapterVisionModel", "BTAdapterProcessor"]


def test_modules_run_as_programs():
    code = "import runpy, bt_adapter_hf; print(runpy.run_module('bt_adapter_hf.import_utils')['__name__'])"
    assert run(code) == "bt_adapter_hf.import_utils"


def test_the_processors_can_come_first():
    code = (
        "from bt_adapter_hf.models.video_processing_bt_adapter import BTAdapterVideoProcessor as p; print(p.__name__)"
    )
    assert run(code) == "BTAdapterVideoProcessor"


def test_unknown_names_are_attribute_errors():
    import bt_adapter_hf

    with pytest.raises(AttributeError, match="BTAdapterNothing"):
        bt_adapter_hf.BTAdapterNothing  # noqa: B018
    for name in bt_adapter_hf.__all__:
        assert getattr(bt_adapter_hf, name) is not None


@pytest.mark.parametrize("host", ["Llava", "InstructBlip", "MiniGPT4"])
def test_auto_classes_know_the_chat_models(host):
    code = (
        "import bt_adapter_hf\n"
        "from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor\n"
        f"config = type(AutoConfig.for_model('bt_adapter_{host.lower()}'))\n"
        "print(config.__name__, AutoModelForImageTextToText._model_mapping[config].__name__)\n"
        "from transformers.models.auto.processing_auto import PROCESSOR_MAPPING\n"
        "print(PROCESSOR_MAPPING[config].__name__)"
    )
    names = ["Config", "ForConditionalGeneration", "Processor"]
    assert run(code).split() == [f"BTAdapter{host}{name}" for name in names]
