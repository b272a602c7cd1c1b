"""The golden cases: inputs, weights and outputs of the released code on small random models.

A part of them lies in tests/data/golden. `BT_ADAPTER_GOLDEN` names another folder with more cases, of other sizes.
"""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import Blip2VisionConfig, CLIPConfig, CLIPVisionConfig, PreTrainedConfig

from bt_adapter_hf.conversion.names import rename_from_released


FOLDER = Path(os.environ.get("BT_ADAPTER_GOLDEN", Path(__file__).parents[1] / "data" / "golden"))


def cases(prefix: str) -> list[str]:
    return sorted(path.stem for path in FOLDER.glob(f"{prefix}*.safetensors"))


class Golden:
    """One case. `weights` have the released names, `inputs` and `outputs` no prefix."""

    def __init__(self, case: str):
        self.case = case
        self.meta = json.loads((FOLDER / f"{case}.json").read_text())
        tensors = load_file(FOLDER / f"{case}.safetensors")
        if not any(key.startswith("sd.") for key in tensors):  # the two-rank case uses the weights of the single one
            tensors |= {k: v for k, v in load_file(FOLDER / "pretrain_losses.safetensors").items() if k[:3] == "sd."}
        self.weights, self.inputs, self.outputs = (
            {key.removeprefix(part): tensor for key, tensor in tensors.items() if key.startswith(part)}
            for part in ("sd.", "in.", "out.")
        )

    @property
    def base(self) -> PreTrainedConfig:
        """Config of the backbone, or of the dual encoder where the case has a text tower."""
        if "eva_config" in self.meta:
            eva = self.meta["eva_config"]
            return Blip2VisionConfig(
                hidden_size=eva["embed_dim"],
                intermediate_size=self.meta["mlp_hidden"],
                num_hidden_layers=eva["depth"],
                num_attention_heads=eva["num_heads"],
                image_size=eva["img_size"],
                patch_size=eva["patch_size"],
            )
        config = self.meta["clip_config"]
        if "text" not in config:
            return CLIPVisionConfig(**config["vision"])
        ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
        return CLIPConfig(
            text_config={**config["text"], **ids},
            vision_config=config["vision"],
            projection_dim=config["projection_dim"],
        )

    def released_name(self) -> dict[str, str]:
        """Our names in the pretraining model -> released names (those of single tensors)."""
        return rename_from_released(self.weights).origin


def patch_major(tokens: torch.Tensor) -> torch.Tensor:
    """(B, T, M, D) -> (B, M*T, D), the order of the released branch"""
    return tokens.transpose(1, 2).flatten(1, 2)
