"""Canaries: each private name, signature and module path of other libraries that we lean on, and where.

When one of these fails, the library has changed under us: the message says at which line of ours to look. The two
last tests find what is not listed yet.
"""

import ast
import importlib
import inspect
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import nn


SOURCE = Path(__file__).parents[2] / "src" / "bt_adapter_hf"
LIBRARIES = ("transformers", "peft", "accelerate", "datasets", "huggingface_hub", "torchcodec", "bitsandbytes")
# Modules below their top level whose content these libraries document.
DOCUMENTED = {
    "accelerate.hooks",
    "accelerate.state",
    "accelerate.utils",
    "huggingface_hub.errors",
    "huggingface_hub.utils",
    "transformers.generation",
    "transformers.image_processing_utils",
    "transformers.image_utils",
    "transformers.modeling_outputs",
    "transformers.processing_utils",
    "transformers.trainer_callback",
    "transformers.trainer_utils",
    "transformers.utils",
    "transformers.video_utils",
}

# Module paths: what we import from modules that are not documented.
PATHS = [
    "accelerate.utils.constants.OPTIMIZER_NAME",
    "datasets.packaged_modules.videofolder.videofolder.VideoFolder",
    "datasets.utils.file_utils.xopen",
    "huggingface_hub.dataclasses.strict",
    "huggingface_hub.dataclasses.validate_typed_dict",
    "huggingface_hub.utils.sha.git_hash",
    "transformers.configuration_utils.SubConfigSpec",
    "transformers.conversion_mapping.get_checkpoint_conversion_mapping",
    "transformers.conversion_mapping.register_checkpoint_conversion_mapping",
    "transformers.core_model_loading.WeightRenaming",
    "transformers.dynamic_module_utils.get_relative_import_files",
    "transformers.integrations.bitsandbytes.dequantize_bnb_weight",
    "transformers.models.blip_2.modeling_blip_2.BaseModelOutputWithVisionQformerOutputs",
    "transformers.models.blip_2.modeling_blip_2.Blip2EncoderLayer",
    "transformers.models.blip_2.modeling_blip_2.Blip2ForConditionalGenerationModelOutput",
    "transformers.models.clip.modeling_clip.CLIPEncoderLayer",
    "transformers.models.instructblip.modeling_instructblip.InstructBlipEncoderLayer",
    "transformers.models.instructblip.modeling_instructblip.InstructBlipForConditionalGenerationModelOutput",
    "transformers.models.llava.modeling_llava.LlavaCausalLMOutputWithPast",
    "transformers.models.llava.modeling_llava.LlavaModelOutputWithPast",
    "transformers.models.llava.modeling_llava.LlavaMultiModalProjector",
    "transformers.models.siglip.modeling_siglip.SiglipEncoderLayer",
    "transformers.models.x_clip.modeling_x_clip.XCLIPAttention",
    "transformers.models.x_clip.modeling_x_clip.XCLIPMultiframeIntegrationTransformer",
    "transformers.pytorch_utils.Conv1D",
    "transformers.trainer.SCHEDULER_NAME",
    "transformers.trainer.TRAINER_STATE_NAME",
    "transformers.utils.generic.can_return_tuple",
    "transformers.utils.hub.resolve_revision",
]

# Private methods that ours take the place of, or call, with the arguments that we rely on.
METHODS = {
    "accelerate.state.GradientState._set_sync_gradients": "sync_gradients",
    "transformers.Blip2ForConditionalGeneration._preprocess_accelerate": "",
    "transformers.InstructBlipForConditionalGeneration._preprocess_accelerate": "",
    "transformers.PreTrainedModel._from_config": "config",
    "transformers.PreTrainedModel._init_weights": "module",
    "transformers.ProcessorMixin._merge_kwargs": "tokenizer_init_kwargs",
    "transformers.Trainer._finish_current_push": "",
    "transformers.Trainer._get_dataloader": "",
    "transformers.Trainer._get_output_dir": "trial",
    "transformers.Trainer._get_train_sampler": "train_dataset",
    "transformers.Trainer._init_training_state": "max_steps",
    "transformers.Trainer._load_best_model": "",
    "transformers.Trainer._load_from_checkpoint": "resume_from_checkpoint model",
    "transformers.Trainer._maybe_log_save_evaluate": "",
    "transformers.Trainer._prepare_inputs": "inputs",
    "transformers.Trainer._push_from_checkpoint": "checkpoint_folder",
    "transformers.Trainer._save_checkpoint": "model trial",
    "transformers.Trainer._save_optimizer_and_scheduler": "output_dir",
    "transformers.Trainer._save_rng_state": "output_dir",
    "transformers.Trainer.get_batch_samples": "epoch_iterator num_batches device",
    "transformers.Trainer.save_model": "output_dir _internal_call",
    "transformers.Trainer.set_initial_training_values": "args dataloader",
    "transformers.video_processing_utils.BaseVideoProcessor._standardize_kwargs": "",
    "transformers.video_processing_utils.BaseVideoProcessor._validate_preprocess_kwargs": "",
}

# Private attributes, with a module of the library that has to speak of them.
ATTRIBUTES = {
    "_VALID_DICT_FIELDS": "transformers.training_args",
    "_attn_implementation": "transformers.configuration_utils",
    "_attn_implementation_internal": "transformers.configuration_utils",
    "_can_record_outputs": "transformers.modeling_utils",
    "_forward_hooks": "torch.nn.modules.module",
    "_from_model_config": "transformers.generation.configuration_utils",
    "_hf_hook": "accelerate.hooks",
    "_hf_peft_config_loaded": "transformers.integrations.peft",
    "_input_embed_layer": "transformers.modeling_utils",
    "_is_hf_initialized": "transformers.modeling_utils",
    "_keep_in_fp32_modules": "transformers.modeling_utils",
    "_keys_to_ignore_on_load_unexpected": "transformers.modeling_utils",
    "_name_or_path": "transformers.configuration_utils",
    "_no_split_modules": "transformers.modeling_utils",
    "_supports_attention_backend": "transformers.modeling_utils",
    "_supports_flash_attn": "transformers.modeling_utils",
    "_supports_flex_attn": "transformers.modeling_utils",
    "_supports_sdpa": "transformers.modeling_utils",
}

# Of Python's own library, and of named tuples: they stay.
PYTHON = {"_ActionsContainer", "_ArgumentGroup", "_asdict", "_create_connection", "_exit", "_fields", "_replace"}


def place(name: str) -> str:
    """Where our code speaks of the name, for a person."""
    word = re.compile(rf"\b{re.escape(name.rpartition('.')[2])}\b")
    lines = [
        f"src/bt_adapter_hf/{path.relative_to(SOURCE).as_posix()}:{number}"
        for path in sorted(SOURCE.rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if word.search(line)
    ]
    assert lines, f"nothing uses {name} any more: take it off the list in this test"
    library = name.partition(".")[0]
    return f"{library} {version(library)} has changed; what leans on {name}: {', '.join(lines)}"


def resolve(name: str):
    """The object of a dotted name, whose first part is a package."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part, None)
        return found
    return None


@pytest.mark.parametrize("name", PATHS)
def test_module_path(name):
    assert resolve(name) is not None, place(name)
    place(name)


@pytest.mark.parametrize("name", METHODS)
def test_method(name):
    method = resolve(name)
    assert method is not None, place(name)
    missing = set(METHODS[name].split()) - inspect.signature(method).parameters.keys()
    assert not missing, f"{place(name)} with the arguments {sorted(missing)}"
    place(name)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attribute(name):
    module = ATTRIBUTES[name]
    speaks = re.search(rf"\b{name}\b", inspect.getsource(importlib.import_module(module)))
    where = place(f"{module}.{name}")
    assert speaks, f"{where}; {module} says nothing of it any more"


# What the names do, where having them is not enough


def test_the_methods_of_trainer_are_still_called():
    """One that is there but is not called any more would leave ours without effect."""
    import transformers

    source = inspect.getsource(transformers.Trainer)
    for name in METHODS:
        if name.startswith("transformers.Trainer."):
            assert re.search(rf"self\.{name.rpartition('.')[2]}\b", source), place(name)


def test_initialised_modules_are_left_alone():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=16, patch_size=8))
    before = {name: p.clone() for name, p in model.named_parameters()}
    for module in model.modules():
        module._is_hf_initialized = True
    model.initialize_weights()
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert not changed, place("transformers._is_hf_initialized")


def test_a_hook_of_accelerate_is_found_on_its_module():
    from accelerate.hooks import ModelHook, add_hook_to_module

    hook, linear = ModelHook(), nn.Linear(1, 1)
    add_hook_to_module(linear, hook)
    assert getattr(linear, "_hf_hook", None) is hook, place("accelerate._hf_hook")


def test_a_config_tells_its_attention():
    from transformers import CLIPVisionConfig

    config = CLIPVisionConfig(attn_implementation="eager")
    assert config._attn_implementation == "eager", place("transformers._attn_implementation")
    internal = config._attn_implementation_internal
    assert internal == "eager", place("transformers._attn_implementation_internal")


def test_training_values_are_seven():
    """`ResumableTrainer.set_initial_training_values` returns them in this order."""
    import transformers

    source = inspect.getsource(transformers.Trainer.set_initial_training_values)
    returned = re.findall(r"return \(([^)]*)\)", source)[-1]
    names = [name.strip() for name in returned.split(",") if name.strip()]
    expected = ["num_train_epochs", "num_update_steps_per_epoch", "num_examples", "num_train_samples"]
    where = place("transformers.Trainer.set_initial_training_values")
    assert len(names) == 7 and names[:4] == expected, f"{where}: it returns {names}"


def test_a_deprecation_that_our_code_causes_is_an_error():
    """Also one that transformers logs, as it does for `past_key_values` since 5.24; see tests/conftest.py."""
    call = "from transformers.utils import logging; logging.get_logger('transformers.x').warning_once(text)"
    with pytest.raises(DeprecationWarning, match="`this` is deprecated. Use `that`"):
        exec(call, {"__name__": "bt_adapter_hf.somewhere", "text": "`this` is deprecated. Use `that` instead."})
    exec(call, {"__name__": "peft.somewhere", "text": "`these` are deprecated. Use `those` instead."})
    with pytest.raises(DeprecationWarning):
        exec(
            "import warnings; warnings.warn('old', DeprecationWarning, stacklevel=1)",
            {"__name__": "bt_adapter_hf.somewhere"},
        )


# What is not on the lists


def trees():
    for path in sorted(SOURCE.rglob("*.py")):
        yield path.relative_to(SOURCE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def test_every_undocumented_module_path_is_on_the_list():
    found = set()
    for _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module and "." in node.module:
                if node.module.partition(".")[0] in LIBRARIES and node.module not in DOCUMENTED:
                    found |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert found == set(PATHS), f"not on the list: {sorted(found - set(PATHS))}; gone: {sorted(set(PATHS) - found)}"


def test_every_private_name_is_on_a_list():
    """Names that begin with `_`, are used on something, and are defined nowhere in this package."""
    own, used = set(), {}
    for file, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Attribute):
                if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self":
                    own.add(node.attr)
                used.setdefault(node.attr, f"{file}:{node.lineno}")
    ours = {"_loaded_from", "_bt_adapter_attachment"}  # set from outside on models, ours and native
    known = {name.rpartition(".")[2] for name in METHODS} | ATTRIBUTES.keys() | PYTHON | ours | own
    unknown = {name: where for name, where in used.items() if re.match("_[^_]", name) and name not in known}
    assert not unknown, f"lean on a public name, or add a canary here: {unknown}"
