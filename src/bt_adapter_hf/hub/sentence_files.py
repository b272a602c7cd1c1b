"""What Sentence Transformers reads of a repository, to load a dual encoder as one for texts, images and videos.

It would find methods and modalities by itself; what it cannot know is that features are compared at unit length.
"""

import json
from pathlib import Path
from typing import Any

from ..models.configuration_bt_adapter import BTAdapterConfig


SENTENCE_NAMES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
_MODULES = ("base.modules.transformer.Transformer", "base.modules.normalize.Normalize")


def sentence_files(folder: Path) -> dict[str, bytes]:
    """The files to add to a folder, by name: none unless it holds a dual encoder with its processor, and none where
    the folder has its own."""
    config, processor = folder / "config.json", folder / "processor_config.json"
    if not (config.is_file() and processor.is_file()) or (folder / "modules.json").exists():
        return {}
    if json.loads(config.read_text(encoding="utf-8")).get("model_type") != BTAdapterConfig.model_type:
        return {}
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": "" if number == 0 else f"{number}_Normalize",
            "type": f"sentence_transformers.{module}",
        }
        for number, module in enumerate(_MODULES)
    ]
    modality = {
        name: {"method": f"get_{name}_features", "method_output_name": "pooler_output"}
        for name in ("text", "image", "video")
    }
    transformer = {
        "transformer_task": "feature-extraction",
        "modality_config": modality,
        "module_output_name": "sentence_embedding",
    }
    whole = {"model_type": "SentenceTransformer", "prompts": {}, "similarity_fn_name": "cosine"}
    contents: tuple[Any, ...] = (modules, transformer, whole)
    return {
        name: (json.dumps(content, indent=2) + "\n").encode()
        for name, content in zip(SENTENCE_NAMES, contents, strict=True)
    }
