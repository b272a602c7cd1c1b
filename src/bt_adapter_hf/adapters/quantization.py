"""Quantization with bitsandbytes that leaves the vision model, the branch and the projector as they are."""

import copy
from typing import Any

from transformers import BitsAndBytesConfig

from ..import_utils import require_package


# Full paths, for transformers matches them from the start: "vision_tower" would not keep "model.vision_tower" out.
# A list replaces transformers' own, which is the output layer of the language model.
KEPT_OUT = (
    "model.vision_tower",
    "model.multi_modal_projector",
    "vision_model",
    "qformer",
    "language_projection",
    "language_model.lm_head",
    "lm_head",
)


def quantization_config(
    *, load_in_4bit: bool = False, load_in_8bit: bool = False, **fields: Any
) -> BitsAndBytesConfig:
    """A config for `from_pretrained`, of a native chat model or of ours, that quantizes the language model alone.

    `from_pretrained` of our chat models does the same with any `BitsAndBytesConfig`.

    Args:
        load_in_4bit, load_in_8bit: one of them.
        fields: of `BitsAndBytesConfig`, such as `bnb_4bit_compute_dtype=torch.bfloat16`; what
            `llm_int8_skip_modules` names is kept out as well.

    Raises:
        ValueError: if not exactly one of 4 and 8 bits is asked for.
        ImportError: without bitsandbytes, naming what installs it.
    """
    if load_in_4bit == load_in_8bit:
        raise ValueError("Pass load_in_4bit=True or load_in_8bit=True.")
    return language_model_only(BitsAndBytesConfig(load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit, **fields))


def language_model_only(config: Any) -> Any:
    """A copy of the config that keeps all parts out but the language model; of another method than bitsandbytes, it
    itself."""
    if not isinstance(config, (BitsAndBytesConfig, dict)):
        return config
    if is_bitsandbytes(config):
        require_package("bitsandbytes", "quantization")
    config = copy.deepcopy(config)
    keep_out(config, *KEPT_OUT)
    return config


def check_kept_out(config: Any, source: Any) -> None:
    """Checks the quantization that a native checkpoint was saved with: a branch starts from image weights as they are.

    Raises:
        ValueError: if the vision model is quantized.
    """
    skipped = (config if isinstance(config, dict) else config.to_dict()).get("llm_int8_skip_modules")
    if skipped is None or not set(skipped) & {"model.vision_tower", "vision_model"}:
        raise ValueError(
            f"{source} is a quantized checkpoint, its vision model included. Load it with the native class and attach "
            "the adapter with load_bt_adapter; or quantize while loading, from a checkpoint that is not."
        )


def is_bitsandbytes(config: Any) -> bool:
    """Also where a dict does not name the method."""
    method = config.get("quant_method") if isinstance(config, dict) else config.quant_method
    return method in (None, "bitsandbytes")


def keep_out(config: Any, *paths: str) -> None:
    """Adds modules to those that bitsandbytes leaves as they are."""
    if not is_bitsandbytes(config):
        return
    is_dict = isinstance(config, dict)
    skipped = config.get("llm_int8_skip_modules") if is_dict else config.llm_int8_skip_modules
    # without a list transformers leaves the output layer out, with one it does not
    skipped = ["lm_head"] if skipped is None else list(skipped)
    skipped += [path for path in paths if path not in skipped]
    if is_dict:
        config["llm_int8_skip_modules"] = skipped
    else:
        config.llm_int8_skip_modules = skipped
