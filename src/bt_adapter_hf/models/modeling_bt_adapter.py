"""The dual encoder: CLIP's text tower beside the video tower, for search and zero-shot labels."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, CLIPTextModel, initialization as init
from transformers.utils import ModelOutput

from .compat_bt_adapter import BaseModelOutputWithPooling, can_return_tuple
from .configuration_bt_adapter import BTAdapterConfig
from .modeling_bt_adapter_vision import BTAdapterPreTrainedModel, BTAdapterVisionModel


@dataclass
class BTAdapterOutput(ModelOutput):
    """Output of the dual encoder.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): Contrastive loss, returned with `return_loss=True`.
        logits_per_video (`torch.Tensor` of shape `(videos, texts)`): Scaled cosine similarities.
        logits_per_text (`torch.Tensor` of shape `(texts, videos)`): The same, transposed.
        text_embeds (`torch.Tensor` of shape `(texts, P)`): Unit-length text features.
        video_embeds (`torch.Tensor` of shape `(videos, P)`): Unit-length video features.
        text_model_output (`BaseModelOutputWithPooling`): Output of the text tower.
        vision_model_output (`BaseModelOutputWithPooling`): Output of the video tower.
    """

    loss: torch.Tensor | None = None
    logits_per_video: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    video_embeds: torch.Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple:
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in self.values())


class BTAdapterModel(BTAdapterPreTrainedModel):
    """The dual encoder: CLIP's text tower and projections around the video tower, for search and zero-shot labels."""

    main_input_name, tower_class = "input_ids", BTAdapterVisionModel
    _keys_to_ignore_on_load_unexpected = [r"^mbta_head\.", r"position_ids$"]

    def __init__(self, config: BTAdapterConfig):
        super().__init__(config)
        config.validate()
        self.text_model = CLIPTextModel._from_config(config.text_config)
        self.vision_model = self.tower_class._from_config(config.vision_config)
        self.visual_projection = nn.Linear(
            config.vision_config.hidden_size, config.projection_dim, bias=config.visual_projection_bias
        )
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, BTAdapterModel):
            factor = module.config.initializer_factor
            init.normal_(module.text_projection.weight, std=module.config.text_config.hidden_size**-0.5 * factor)
            init.normal_(module.visual_projection.weight, std=module.config.vision_config.hidden_size**-0.5 * factor)
            init.constant_(module.logit_scale, module.config.logit_scale_init_value)
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def get_text_features(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """input_ids (B, length) -> output of the text tower with `pooler_output` (B, P) projected, not normalised.

        Raises:
            ValueError: if the text is longer than the tower's positions.
        """
        limit = self.config.text_config.max_position_embeddings
        if input_ids.shape[-1] > limit:
            raise ValueError(
                f"The texts are {input_ids.shape[-1]} tokens long and the text tower takes {limit}: tokenize with "
                f"truncation=True, max_length={limit}."
            )
        output = self.text_model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        output.pooler_output = self.text_projection(output.pooler_output)
        return output

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.FloatTensor, **kwargs) -> BaseModelOutputWithPooling:
        """Images (B, 3, H, W) -> the native CLIP's output with `pooler_output` (B, P) projected, not normalised."""
        if pixel_values.ndim != 4:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; expected images (B, 3, H, W). For videos call "
                "get_video_features."
            )
        output = self.vision_model(pixel_values, return_dict=True, **kwargs)
        output.pooler_output = self.visual_projection(output.pooler_output)
        return output

    @can_return_tuple
    def get_video_features(
        self, pixel_values_videos: torch.FloatTensor, frame_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Videos (B, T, 3, H, W) and frame_mask (B, T) -> output of the tower, `pooler_output` (B, P) projected.

        The features are not normalised (paper Eq. 5). Further arguments go to [`BTAdapterVisionModel.forward`].
        """
        if pixel_values_videos.ndim != 5:
            raise ValueError(
                f"pixel_values_videos has shape {tuple(pixel_values_videos.shape)}; expected (B, T, 3, H, W). For "
                "images call get_image_features."
            )
        kwargs.pop("video_metadata", None)  # `**processor(..., return_metadata=True)` brings it along
        output = self.vision_model(pixel_values_videos, frame_mask=frame_mask, return_dict=True, **kwargs)
        output.pooler_output = self.visual_projection(output.pooler_output)
        return output

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        pixel_values_videos: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        return_loss: bool | None = None,
        **kwargs,
    ) -> BTAdapterOutput:
        """
        Args:
            input_ids: (texts, length).
            pixel_values_videos: (videos, T, 3, H, W).
            attention_mask: (texts, length).
            frame_mask: (videos, T), nonzero = a real frame.
            return_loss: also compute the symmetric contrastive loss of CLIP; text i belongs to video i.
        """
        vision_output = self.get_video_features(pixel_values_videos, frame_mask=frame_mask, **kwargs)
        text_output = self.get_text_features(input_ids, attention_mask=attention_mask)
        video_embeds = nn.functional.normalize(vision_output.pooler_output, dim=-1)
        text_embeds = nn.functional.normalize(text_output.pooler_output, dim=-1).to(video_embeds.device)
        logits_per_text = text_embeds @ video_embeds.t() * self.logit_scale.exp().to(video_embeds.device)
        loss = None
        if return_loss:
            if logits_per_text.shape[0] != logits_per_text.shape[1]:
                raise ValueError(
                    f"The loss pairs text i with video i; found {logits_per_text.shape[0]} texts and "
                    f"{logits_per_text.shape[1]} videos."
                )
            target = torch.arange(len(logits_per_text), device=logits_per_text.device)
            loss = sum(nn.functional.cross_entropy(x, target) for x in (logits_per_text, logits_per_text.t())) / 2
        return BTAdapterOutput(
            loss=loss,
            logits_per_video=logits_per_text.t(),
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            video_embeds=video_embeds,
            text_model_output=text_output,
            vision_model_output=vision_output,
        )


AutoModel.register(BTAdapterConfig, BTAdapterModel, exist_ok=True)
