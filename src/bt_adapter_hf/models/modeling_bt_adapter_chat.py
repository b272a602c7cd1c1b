"""What the chat models share: loading a native host together with an adapter, and putting visual tokens in place."""

import os
import re

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import logging, torch_compilable_check

from .modeling_bt_adapter_vision import BTAdapterPreTrainedModel, package_loading, plainly_loaded


logger = logging.get_logger(__name__)

NEEDS_PACKAGE = (
    "bt_adapter= needs the package that this code belongs to: pip install bt_adapter_hf, and import bt_adapter_hf "
    "before loading; trust_remote_code is not needed then."
)


class BTAdapterChatMixin:
    """A native image chat model with a BT-Adapter tower in it."""

    _new_modules = ("bt_adapter",)
    __getstate__ = BTAdapterPreTrainedModel.__getstate__
    freeze_backbone = BTAdapterPreTrainedModel.freeze_backbone

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        bt_adapter: str | None = None,
        bt_adapter_revision: str | None = None,
        allow_backbone_mismatch: bool = False,
        **kwargs,
    ):
        """As in transformers, but strict: a weight is never silently random or dropped.

        Args:
            pretrained_model_name_or_path: a native checkpoint of the host (old and new key names), or one of ours; or
                an adapter, which is put into the base model that it names, at the revision that it was trained on.
            bt_adapter: adapter folder, or id on the Hub, for a native checkpoint. Without it a native checkpoint gets
                a fresh branch, warm-started from the image tower; a checkpoint of ours has its own.
            bt_adapter_revision: of an adapter on the Hub.
            allow_backbone_mismatch: attach to other image weights than the adapter was trained on, with a warning.
            kwargs: as in transformers; fields of the tower's config are passed on to it, `adapter_layers` among them.
                A `quantization_config` of bitsandbytes quantizes the language model alone (see
                [`quantization_config`]).

        Raises:
            ValueError: if the checkpoint does not fill the model, or holds weights that the model has no place for.
            AdapterError: if the adapter is damaged, or was trained on another backbone.
            OSError: if a repository cannot be fetched; of an adapter's base model it says which, and what to do.
        """
        adapter = {
            "bt_adapter": bt_adapter,
            "bt_adapter_revision": bt_adapter_revision,
            "allow_backbone_mismatch": allow_backbone_mismatch,
        }
        load, package = super().from_pretrained, package_loading()
        if package is not None:
            return package.load_chat_model(cls, load, pretrained_model_name_or_path, *model_args, **adapter, **kwargs)
        if any(adapter.values()):
            raise ImportError(NEEDS_PACKAGE)
        return plainly_loaded(load(pretrained_model_name_or_path, *model_args, **kwargs))

    def _unsaved_by_peft(self) -> list[str]:
        """Tensors of the branch of which peft has no copy that it saves; beside LoRA it saves `modules_to_save`."""
        names = [name for name in self.state_dict() if ".bt_adapter." in f".{name}" and ".lora_" not in name]
        saved = {_COPY.sub(".", name) for name in names if _COPY.search(name)}
        plain = (re.sub(r"\.(original_module|base_layer)\b", "", name) for name in names if not _COPY.search(name))
        return [name for name in plain if name not in saved]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """As in transformers.

        Raises:
            ValueError: if peft's adapters are in the model (`add_adapter`), and the branch is not among what of them
                would be saved.
        """
        lost = self._unsaved_by_peft() if getattr(self, "_hf_peft_config_loaded", False) else ()
        if lost:
            raise ValueError(
                "The model has adapters of peft, and save_pretrained would write these alone, without the branch "
                f"({len(lost)} of its tensors, {lost[0]} among them). Train with peft.get_peft_model(model, "
                "bt_adapter_hf.lora_config(model)), whose save_pretrained writes all that was trained; or save the "
                "branch with save_bt_adapter."
            )
        return super().save_pretrained(save_directory, **kwargs)


_COPY = re.compile(r"\.modules_to_save\.[^.]+\.")  # what peft trains whole, and saves


def embed_text(embedding: nn.Module, input_ids: torch.LongTensor, vocab_size: int) -> torch.Tensor:
    """Embeddings of a prompt, in which ids beyond the vocabulary are placeholders: (B, S) -> (B, S, D)."""
    return embedding(input_ids.masked_fill(input_ids >= vocab_size, 0))


def check_length(config: PreTrainedConfig, length: int):
    """Compares the length of a prompt with the language model's positions; rotary ones go on beyond their last.

    Raises:
        ValueError: if it has no position for some token.
    """
    text_config = config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    if limit is None or length <= limit:
        return
    message = (
        f"The conversation is {length} tokens long, visual tokens included, and the language model "
        f"{{}} {limit}: drop earlier turns, images or videos, or use fewer clips per video (num_clips)."
    )
    if getattr(text_config, "rope_parameters", None) is None:
        raise ValueError(message.format("takes"))
    logger.warning_once(message.format("is made for"))


def check_frames(config: PreTrainedConfig, T: int):
    """Warns where videos have far more or fewer frames than the branch was trained on: a processor takes 64 if it is
    told nothing else."""
    trained = config.vision_config.num_trained_frames
    if trained and not trained / 2 <= T <= trained * 2:
        logger.warning_once(
            f"The videos have {T} frames, and the branch was trained on {trained}: set num_frames={trained} in the "
            "processor's from_pretrained."
        )


def check_placeholders(input_ids: torch.LongTensor, token_id: int | None, visuals: int, tokens: int, kind: str):
    """Compares the placeholders of a prompt with the visual tokens that are to stand there.

    Args:
        input_ids: (B, S).
        token_id: of the placeholder.
        visuals: number of images or videos passed.
        tokens: number of tokens that they make in all.
        kind: "image" or "video".

    Raises:
        ValueError: if there are not as many placeholders.
    """
    found = (input_ids == token_id).sum() if token_id is not None else torch.zeros((), dtype=torch.long)
    torch_compilable_check(
        found == tokens,
        lambda: (
            f"The prompt has {int(found)} {kind} tokens (id {token_id}), and {visuals} {kind}s with {tokens} tokens "
            f"in all were passed. Prepare prompts with the processor of this model: its {kind}_token_id must be the "
            f"model's config.{kind}_token_id, and its number of tokens per {kind} the model's."
        ),
    )


def put_in_place(
    inputs_embeds: torch.Tensor,
    input_ids: torch.LongTensor,
    token_id: int | None,
    features: list[torch.Tensor] | torch.Tensor,
    kind: str,
) -> torch.Tensor:
    """Replaces the embeddings (B, S, D) of placeholders by visual tokens, a tensor (tokens, D) per image or video.

    Raises:
        ValueError: if placeholders and tokens are not equally many.
    """
    check_placeholders(input_ids, token_id, len(features), sum(len(feature) for feature in features), kind)
    if not len(features):
        return inputs_embeds
    features = torch.cat(list(features)).to(inputs_embeds.device, inputs_embeds.dtype)
    where = (input_ids == token_id).unsqueeze(-1).to(inputs_embeds.device)
    return inputs_embeds.masked_scatter(where, features)
