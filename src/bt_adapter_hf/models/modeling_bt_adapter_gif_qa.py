"""GIF question answering: frames through X-CLIP (or a BT-Adapter tower), a connector, and a language model.

Letters in shape comments: V GIFs, T frames, G groups of frames, N states per group, D their width, W width of the
language model.
"""

import copy
import os
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedModel,
    initialization as init,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from .compat_bt_adapter import BaseModelOutputWithPooling, can_return_tuple
from .configuration_bt_adapter_gif_qa import BTAdapterGifQAConfig, XCLIPFramesConfig
from .modeling_bt_adapter_qformer import BTAdapterQFormerChatMixin
from .modeling_bt_adapter_vision import BTAdapterPreTrainedModel, BTAdapterVisionModel
from .modeling_gif_connectors import CONNECTORS
from .modeling_xclip_frames import XCLIPFramesModel, in_groups


class BTAdapterGifQAForConditionalGeneration(BTAdapterQFormerChatMixin, PreTrainedModel, GenerationMixin):
    """A frozen tower, a connector, and any causal language model that reads a GIF's tokens in its prompt.

    `vision_model` is an [`XCLIPFramesModel`] or a [`BTAdapterVisionModel`], `language_projection` the connector,
    `language_model` what `AutoModelForCausalLM` makes of the text config.

    Of X-CLIP's states, one per frame, the MLP makes as many tokens, the other connectors `num_query_tokens` for every
    group of `num_frames` frames. The groups stand one behind the other in the prompt.
    """

    config: BTAdapterGifQAConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("video", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = [
        *BTAdapterPreTrainedModel._no_split_modules, "XCLIPVisionEncoderLayer", "XCLIPVisionEmbeddings",
        "XCLIPEncoderLayer", "AttentionConnector", "Blip2QFormerLayer",
    ]  # fmt: skip

    def __init__(self, config: BTAdapterGifQAConfig):
        super().__init__(config)
        config.validate()
        tower = XCLIPFramesModel if isinstance(config.vision_config, XCLIPFramesConfig) else BTAdapterVisionModel
        self.vision_model = tower._from_config(config.vision_config)
        self.language_projection = CONNECTORS[config.connector](config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()
        self.freeze_backbone()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(getattr(module, "query_tokens", None), nn.Parameter):
            init.normal_(module.query_tokens, std=self.config.initializer_range)

    @classmethod
    def from_components(
        cls,
        *,
        tower: str | os.PathLike,
        language_model: str | os.PathLike,
        dtype: torch.dtype | str = "auto",
        hub: dict[str, Any] | None = None,
        **fields: Any,
    ) -> "BTAdapterGifQAForConditionalGeneration":
        """Puts a model together from public pieces, with a fresh connector. Save the result: it is one ordinary
        checkpoint then.

        Args:
            tower: X-CLIP checkpoint (`microsoft/xclip-base-patch16-16-frames`), or a tower or dual encoder with a
                BT-Adapter.
            language_model: with its tokenizer.
            dtype: of the language model, and of the rest.
            hub: `cache_dir`, `token`, `local_files_only` for both.
            fields: of [`BTAdapterGifQAConfig`], such as `connector="qformer"`.

        Raises:
            ValueError: if a piece lacks weights, or is of another kind.
        """
        hub = hub or {}
        speech = AutoModelForCausalLM.from_pretrained(language_model, dtype=dtype, **hub)
        kind = AutoConfig.from_pretrained(tower, **hub).model_type
        tower_class = XCLIPFramesModel if kind in ("xclip", "xclip_frames") else BTAdapterVisionModel
        eyes = tower_class.from_pretrained(tower, dtype=speech.dtype, **hub)
        tokenizer = AutoTokenizer.from_pretrained(language_model, **hub)
        tokenizer.add_tokens(["<image>", "<video>"], special_tokens=True)  # none that is there already
        fields.setdefault("video_token_index", tokenizer.convert_tokens_to_ids("<video>"))
        config = cls.config_class(vision_config=eyes.config, text_config=speech.config, **fields)
        with torch.device("meta"):
            model = cls(config)
        model.vision_model, model.language_model = eyes, speech
        connector = CONNECTORS[config.connector](config)
        model.language_projection = connector.to(speech.dtype)
        for module in connector.modules():
            model._init_weights(module)
        model.config.dtype = speech.dtype
        model.generation_config = copy.deepcopy(speech.generation_config)
        model.freeze_backbone()
        return model.eval()

    def freeze_backbone(self):
        """Takes the tower out of training; of a BT-Adapter the branch learns."""
        if isinstance(self.vision_model, BTAdapterVisionModel):
            super().freeze_backbone()
        else:
            self.vision_model.requires_grad_(False)

    def train(self, mode: bool = True):
        nn.Module.train(self, mode)
        if not any(parameter.requires_grad for parameter in self.vision_model.parameters()):
            self.vision_model.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.FloatTensor | None = None,
        frame_mask: torch.Tensor | None = None,
        backbone_states: dict[int, torch.Tensor] | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """GIFs to tokens of the language model.

        Args:
            pixel_values_videos: (V, T, 3, H, W).
            frame_mask: (V, T), nonzero = a real frame.
            backbone_states: in place of the pixels, what `encode_frames` of the tower gave.

        Returns:
            `last_hidden_state` (G, N, D), the states of the tower, and `pooler_output`, a list of V tensors
            (tokens, W).

        Raises:
            ValueError: if the GIFs are not 5-D, or the tower does not take so many frames.
        """
        if backbone_states is None and pixel_values_videos.ndim != 5:
            shape = tuple(pixel_values_videos.shape)
            raise ValueError(f"pixel_values_videos has shape {shape}; expected (V, T, 3, H, W).")
        if not isinstance(self.vision_model, XCLIPFramesModel):
            given = {"frame_mask": frame_mask, "backbone_states": backbone_states, "return_dict": True}
            states = self.vision_model(pixel_values_videos, **given).last_hidden_state
            return BaseModelOutputWithPooling(
                last_hidden_state=states, pooler_output=list(self.language_projection(states))
            )
        size = self.config.frames_per_group
        seen = pixel_values_videos if backbone_states is None else backbone_states[0][:, :, 0].to(self.dtype)
        frames = self._real_frames(seen, frame_mask, size)
        groups, masks = zip(*(in_groups(video, size) for video in frames), strict=True)
        states, mask = torch.cat(groups), torch.cat(masks)
        if backbone_states is None:
            states = self.vision_model(states, frame_mask=mask, return_dict=True).last_hidden_state
        states = states.masked_fill(~mask[..., None], 0)
        tokens = self.language_projection(states, None if mask.all() else mask)
        joined = [part.flatten(0, 1) for part in tokens.split([len(group) for group in groups])]
        if self.config.tokens_per_group is None:
            joined = [part[: len(video)] for part, video in zip(joined, frames, strict=True)]
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=joined)

    def _real_frames(self, seen: torch.Tensor, frame_mask: torch.Tensor | None, size: int) -> list[torch.Tensor]:
        """(V, T, ...) -> the real frames of each video.

        Raises:
            ValueError: if one has none, or they are not to be grouped and not `size`.
        """
        if frame_mask is None:
            frames = list(seen)
        else:
            frames = [video[real] for video, real in zip(seen, frame_mask.to(seen.device, torch.bool), strict=True)]
        counts = {len(video) for video in frames}
        if 0 in counts:
            raise ValueError("frame_mask leaves a GIF without any frame; every row needs at least one.")
        if not self.config.group_frames and counts != {size}:
            raise ValueError(
                f"The GIFs have {', '.join(map(str, sorted(counts)))} frames, and this X-CLIP takes {size}: set "
                f"num_frames={size} in the processor, or group_frames=True in the model's config for groups of {size}."
            )
        return frames

    def _features(
        self, input_ids, pixel_values_videos, frame_mask, backbone_states=None
    ) -> dict[str, BaseModelOutputWithPooling]:
        if input_ids is None:
            raise ValueError(
                "GIFs find their places by the placeholders in input_ids: pass what the processor of this model "
                "returns."
            )
        if pixel_values_videos is None and backbone_states is None:
            return {}
        features = self.get_video_features(pixel_values_videos, frame_mask, backbone_states, return_dict=True)
        return {"video": features}

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        frame_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        backbone_states: dict[int, torch.Tensor] | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            input_ids: (B, S), with a run of placeholders where a GIF belongs.
            attention_mask: (B, S).
            pixel_values_videos: (V, T, 3, H, W), in the order of the batch.
            frame_mask: (V, T), nonzero = a real frame, where the GIFs differ in length.
            labels: (B, S), -100 where no loss is wanted.
            backbone_states: in place of pixel_values_videos, see [`get_video_features`].
            kwargs: for the language model.

        Raises:
            ValueError: if placeholders and tokens of GIFs differ in number, or the prompt is too long for the model.
        """
        encoded = self._features(input_ids, pixel_values_videos, frame_mask, backbone_states)
        answer = self._answer(input_ids, encoded, attention_mask, labels, **kwargs)
        speech = answer.pop("language_model_outputs")
        return CausalLMOutputWithPast(**answer, hidden_states=speech.hidden_states, attentions=speech.attentions)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        frame_mask: torch.Tensor | None = None,
        **generate_kwargs,
    ) -> torch.LongTensor:
        """Answers, as ids behind those of the prompt; see [`forward`] for the inputs and transformers' `generate` for
        `generate_kwargs`. The model's `generation_config` counts where they say nothing."""
        encoded = self._features(input_ids, pixel_values_videos, frame_mask)
        self.language_model.generation_config = self.generation_config  # it is saved with the whole model
        return self._generate(input_ids, attention_mask, encoded, **generate_kwargs)


for _auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto.register(BTAdapterGifQAConfig, BTAdapterGifQAForConditionalGeneration, exist_ok=True)
