"""X-CLIP as a tower of frames: one state per frame, where transformers gives one per video.

Letters in shape comments: B videos, T frames, P width of a state.
"""

import copy

import torch
from torch import nn
from transformers import AutoModel, XCLIPPreTrainedModel, XCLIPVisionModel
from transformers.models.x_clip.modeling_x_clip import XCLIPAttention, XCLIPMultiframeIntegrationTransformer

from .compat_bt_adapter import BaseModelOutputWithPooling, can_return_tuple
from .configuration_bt_adapter_gif_qa import XCLIPFramesConfig
from .modeling_bt_adapter_vision import package_loading


class _MessageAttention(XCLIPAttention):
    """The attention of the frames' messages to each other, with a mask of its own beside that of the patches."""

    def forward(self, hidden_states: torch.Tensor, message_mask: torch.Tensor | None = None, **kwargs):
        return super().forward(hidden_states, attention_mask=message_mask, **kwargs)


class XCLIPFramesModel(XCLIPPreTrainedModel):
    """X-CLIP's vision model, projection and multi-frame integration transformer: the state of every frame after it.

    The names of the parts are those of `XCLIPModel`: `from_pretrained` takes its checkpoints, strictly. The number of
    frames is the config's, and another one is an error: transformers reads 2 x T frames as twice as many videos.
    """

    config: XCLIPFramesConfig
    main_input_name = "pixel_values"
    input_modalities = ("video",)
    _input_embed_layer = "patch_embedding"
    _supports_flash_attn = False  # takes no mask of frames
    _supports_flex_attn = False
    _can_record_outputs = {}
    _keys_to_ignore_on_load_unexpected = [r"^(text_model|text_projection|prompts_\w+)\b|^logit_scale$|position_ids$"]
    _new_modules = ()

    def __init__(self, config: XCLIPFramesConfig):
        super().__init__(config)
        backbone = config.backbone
        self.vision_model = XCLIPVisionModel._from_config(backbone)
        for layer in self.vision_model.encoder.layers:
            layer.message_attn = _MessageAttention(backbone)
        self.visual_projection = nn.Linear(backbone.hidden_size, backbone.mit_hidden_size, bias=False)
        mit = copy.copy(backbone)
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            setattr(mit, name, getattr(backbone, f"mit_{name}"))
        self.mit = XCLIPMultiframeIntegrationTransformer(mit)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs):
        """As in transformers, but strict: a weight is never silently random or dropped.

        Raises:
            ValueError: if the checkpoint does not fill the model, or holds weights that the model has no place for.
        """
        load, package = super().from_pretrained, package_loading()
        options = {**kwargs, **({} if package is None else package.REPORT), "output_loading_info": True}
        model, info = load(pretrained_model_name_or_path, *model_args, **options)
        if package is not None:
            package.check_loading(model, info, pretrained_model_name_or_path)
        return (model, info) if output_loading_info else model

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        frame_mask: torch.Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values: (B, T, 3, H, W), T the `num_frames` of the config.
            frame_mask: (B, T), nonzero = a real frame. What is in the others has no influence on the states of the
                real ones.
            output_hidden_states: `hidden_states` of the output are a tuple of the one that there is.

        Returns:
            `last_hidden_state` (B, T, P), and their mean over the real frames, `pooler_output` (B, P), which is
            X-CLIP's feature of the video.

        Raises:
            ValueError: if the videos are not 5-D, have another number of frames, or one has no real frame.
        """
        T = self.config.num_frames
        if pixel_values.ndim != 5 or pixel_values.shape[1] != T:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; this X-CLIP takes (B, {T}, 3, H, W). Its number "
                f"of frames is fixed: set num_frames={T} in the processor, or give it more in groups (group_frames of "
                "BTAdapterGifQAConfig)."
            )
        B, mask, options = len(pixel_values), None, {}
        if frame_mask is not None:
            if tuple(frame_mask.shape) != (B, T):
                raise ValueError(f"frame_mask has shape {tuple(frame_mask.shape)}; the videos have (B, T) = {(B, T)}.")
            frame_mask = frame_mask.to(pixel_values.device, torch.bool)
            if not frame_mask.any(dim=1).all():
                raise ValueError("frame_mask leaves a video without any frame; every row needs at least one.")
            if not frame_mask.all():
                pixel_values = pixel_values.masked_fill(~frame_mask[:, :, None, None, None], 0)  # may be no number
                mask = torch.zeros(B, 1, 1, T, dtype=self.dtype, device=pixel_values.device)
                mask = mask.masked_fill(~frame_mask[:, None, None], torch.finfo(self.dtype).min)
                options = {"message_mask": mask}
        frames = self.vision_model(pixel_values.flatten(0, 1), return_dict=True, **options).pooler_output
        frames = self.visual_projection(frames).unflatten(0, (B, T))
        states = self.mit(frames, attention_mask=mask).last_hidden_state
        if mask is None:
            pooled = states.mean(dim=1)
        else:
            real = frame_mask[..., None].to(states.dtype)
            pooled = (states * real).sum(dim=1) / real.sum(dim=1)
        hidden = (states,) if output_hidden_states not in (None, False) else None
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled, hidden_states=hidden)

    # As those of a BT-Adapter tower, for states that are computed once.

    def backbone_is_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.parameters())

    def needed_states(self, output_hidden_states: int | list[int] | None = None) -> list[int]:
        return [0]

    def encode_frames(
        self, pixel_values: torch.FloatTensor, output_hidden_states: int | list[int] | None = None
    ) -> dict[int, torch.Tensor]:
        """Videos of any length (B, T, 3, H, W), in groups of `num_frames` -> their states {0: (B, T, 1, P)}."""
        states = [self._encode_groups(video) for video in pixel_values]
        return {0: torch.stack(states)[:, :, None]}

    def _encode_groups(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames of one video (T, 3, H, W) -> their states (T, P). The last group is padded and masked."""
        groups, mask = in_groups(frames, self.config.num_frames)
        return self(groups, frame_mask=mask).last_hidden_state.flatten(0, 1)[: len(frames)]


def in_groups(frames: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, ...) -> (groups, size, ...), the last one padded with zeros, and what is no padding, bool (groups, size)."""
    T, count = len(frames), -(-len(frames) // size)
    padding = frames.new_zeros(count * size - T, *frames.shape[1:])
    mask = torch.arange(count * size, device=frames.device) < T
    return torch.cat([frames, padding]).unflatten(0, (count, size)), mask.unflatten(0, (count, size))


AutoModel.register(XCLIPFramesConfig, XCLIPFramesModel, exist_ok=True)
