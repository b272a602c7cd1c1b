"""The branch of BT-Adapter (CVPR 2024): blocks that attend over time and space, beside a frozen image encoder.

Letters in shape comments: B videos, T frames, N patches, D width, K branch layers, C the number of CLS tokens of the
backbone (1, or 0 for SigLIP), L backbone layers.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers import (
    Blip2VisionModel,
    CLIPVisionModel,
    GradientCheckpointingLayer,
    InstructBlipVisionModel,
    PreTrainedModel,
    SiglipVisionModel,
)
from transformers.models.blip_2.modeling_blip_2 import Blip2EncoderLayer
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.instructblip.modeling_instructblip import InstructBlipEncoderLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer
from transformers.utils import logging

from .configuration_bt_adapter import BTAdapterVisionConfig


logger = logging.get_logger(__name__)


class BackboneFamily(NamedTuple):
    """What the branch needs to know of a native vision model; all families name their parts alike."""

    model_class: type[PreTrainedModel]
    layer_class: type[nn.Module]
    num_cls: int  # CLS tokens in front of the patches
    norm_all: bool  # whether `last_hidden_state` is after the final norm, or only the pooled CLS is


BACKBONES = {
    "clip_vision_model": BackboneFamily(CLIPVisionModel, CLIPEncoderLayer, 1, False),
    "siglip_vision_model": BackboneFamily(SiglipVisionModel, SiglipEncoderLayer, 0, True),
    "instructblip_vision_model": BackboneFamily(InstructBlipVisionModel, InstructBlipEncoderLayer, 1, True),
    "blip_2_vision_model": BackboneFamily(Blip2VisionModel, Blip2EncoderLayer, 1, True),
}


def hashed(*keys: torch.Tensor | int) -> torch.LongTensor:
    """32 random bits that are a function of the keys alone (integers, broadcast), the same on every device.

    What is drawn at random in training is drawn so, from a seed per video: it does not depend on the other videos of a
    batch, on how a batch is spread over processes, or on how many times a layer is run.
    """
    x = torch.zeros((), dtype=torch.long)
    for key in keys:
        # https://github.com/skeeto/hash-prospector; 32 bits in 64, and no factor above 31, so that nothing overflows
        x = ((x + 0x9E3779B9) & 0xFFFFFFFF) ^ (key & 0xFFFFFFFF)
        x = (x ^ (x >> 16)) * 0x21F0AAAD & 0xFFFFFFFF
        x = (x ^ (x >> 15)) * 0x735A2D97 & 0xFFFFFFFF
        x = x ^ (x >> 15)
    return x


def draw(row_seeds: torch.LongTensor, what: int, count: int) -> torch.Tensor:
    """(B,) -> (B, count) float32, uniform in [0, 1). `what` tells the draws of one video apart."""
    number = torch.arange(count, device=row_seeds.device)
    return (hashed(row_seeds[:, None], what, number) >> 8) / 2**24


class BTAdapterDropPath(nn.Module):
    """Stochastic depth: zeroes whole rows (dim 0) in training and scales the kept ones."""

    def __init__(self, rate: float, what: int):
        super().__init__()
        self.rate, self.what = rate, what

    def forward(self, hidden_states: torch.Tensor, row_seeds: torch.LongTensor | None) -> torch.Tensor:
        """(B*n, ...), and (B,) or None in evaluation -> (B*n, ...)"""
        if self.rate == 0.0 or not self.training:
            return hidden_states
        keep = draw(row_seeds, self.what, len(hidden_states) // len(row_seeds)) >= self.rate
        keep = keep.to(hidden_states.dtype).view(-1, *(1,) * (hidden_states.ndim - 1))
        return hidden_states * keep / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.4f}"


class BTAdapterZeroLinear(nn.Linear):
    """The projection W_t of paper Eq. 2: zero at initialisation, so that a fresh temporal block adds nothing.

    A class of its own because initialisation visits leaves only (a module without parameters is skipped).
    """


class BTAdapterTemporalBlock(nn.Module):
    """Self-attention of each patch over the frames, behind a zero-initialised projection (paper Eq. 2)."""

    def __init__(self, config: BTAdapterVisionConfig, layer: nn.Module, drop_path: BTAdapterDropPath):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.temporal_layer_norm_eps)
        self.attn = layer.self_attn
        self.drop_path = drop_path
        self.proj = BTAdapterZeroLinear(config.hidden_size, config.hidden_size)

    def forward(self, patches: torch.Tensor, row_seeds: torch.LongTensor | None = None) -> torch.Tensor:
        """(B, T, N, D) -> (B, T, N, D)"""
        B, T, N, D = patches.shape
        x = self.norm(patches.transpose(1, 2).reshape(B * N, T, D))
        x = self.proj(self.drop_path(self.attn(hidden_states=x)[0], row_seeds))
        return patches + x.view(B, N, T, D).transpose(1, 2)


class BTAdapterSpatialBlock(nn.Module):
    """A layer of the backbone's own kind on each frame; the frames share one video CLS (paper Eq. 1).

    Every frame attends together with a copy of the video CLS; the updates of the copies are averaged over the frames.
    """

    def __init__(self, config: BTAdapterVisionConfig, layer: nn.Module, drop_path: BTAdapterDropPath):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.spatial_layer_norm_eps)
        self.attn = layer.self_attn
        self.drop_path = drop_path
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.spatial_layer_norm_eps)
        self.mlp = layer.mlp

    def forward(
        self, patches: torch.Tensor, video_cls: torch.Tensor | None, row_seeds: torch.LongTensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, N, D), (B, 1, D) or None -> the same shapes"""
        B, T, N, D = patches.shape
        x = self.norm1(patches)
        if video_cls is not None:
            x = torch.cat([self.norm1(video_cls)[:, None].expand(B, T, 1, D), x], dim=2)  # (B, T, 1+N, D)
        x = self.drop_path(self.attn(hidden_states=x.flatten(0, 1))[0], row_seeds).view(B, T, -1, D)
        patches = patches + x[:, :, -N:]
        patches = patches + self.mlp(self.norm2(patches))
        if video_cls is not None:
            video_cls = video_cls + x[:, :, 0].mean(dim=1, keepdim=True)
            video_cls = video_cls + self.mlp(self.norm2(video_cls))
        return patches, video_cls


class BTAdapterLayer(GradientCheckpointingLayer):
    """One branch layer: divided space-time attention, time first."""

    def __init__(self, config: BTAdapterVisionConfig, j: int):
        super().__init__()
        rate = config.drop_path_rate * j / max(config.num_adapter_layers - 1, 1)
        layer_class = BACKBONES[config.backbone.model_type].layer_class
        # Two native layers lend their parts. The layer class itself must not appear in the branch: transformers
        # records hidden states by hooks on every instance of it.
        self.temporal = BTAdapterTemporalBlock(
            config, layer_class(config.backbone), BTAdapterDropPath(rate, 2 * j + 1)
        )
        self.spatial = BTAdapterSpatialBlock(config, layer_class(config.backbone), BTAdapterDropPath(rate, 2 * j + 2))

    def forward(
        self, patches: torch.Tensor, video_cls: torch.Tensor | None, row_seeds: torch.LongTensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, N, D), (B, 1, D) or None -> the same shapes"""
        return self.spatial(self.temporal(patches, row_seeds), video_cls, row_seeds)


class BTAdapterBranch(nn.Module):
    """The branch: K layers, each fed by one backbone layer, and the gates that join branch and backbone."""

    def __init__(self, config: BTAdapterVisionConfig):
        super().__init__()
        self.config = config
        self.num_cls = BACKBONES[config.backbone.model_type].num_cls
        D, K = config.hidden_size, config.num_adapter_layers
        if self.num_cls:
            self.video_cls = nn.Parameter(torch.zeros(D))
        self.time_embedding = nn.Embedding(config.max_frames, D)
        # A gate exists only where it is used: a parameter without gradient is an error under DDP.
        self.fusion_gate = nn.Parameter(torch.zeros(D)) if config.fusion == "gate" and K > 1 else None
        self.output_gate = nn.Parameter(torch.zeros(D)) if config.output_fusion == "gate" else None
        self.layers = nn.ModuleList([BTAdapterLayer(config, j) for j in range(K)])

    def forward(
        self,
        states: list[torch.Tensor],
        final_state: torch.Tensor | None,
        position: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        to_fuse: dict[int, tuple[torch.Tensor, int]] | None = None,
        kept_patches: int | None = None,
        row_seeds: torch.LongTensor | None = None,
    ) -> "BTAdapterBranchOutput":
        """
        Args:
            states: K backbone states of shape (B, T, C+N, D), one per branch layer.
            final_state: (B, T, C+N, D), the output of the last backbone layer; None where the pooled feature is not
                wanted.
            position: (C+N, D), the spatial position embeddings of the backbone.
            bool_masked_pos: bool (B, N) or (B, T*N), True = dropped; see [`BTAdapterVisionModel.forward`].
            to_fuse: {key: (backbone state (B, T, C+N, D), branch layer)}, the states to fuse with branch outputs.
            kept_patches, row_seeds: see [`BTAdapterVisionModel.forward`]; training needs seeds.
        """
        config = self.config
        # The branch may be kept in another precision than a frozen backbone in half precision.
        dtype, outer_dtype = self.time_embedding.weight.dtype, states[0].dtype
        states, position = [x.to(dtype) for x in states], position.to(dtype)
        T = states[0].shape[1]
        window = T
        if config.temporal_window == "released":
            if T > 64:
                states = [self._average_pairs(x) for x in states]
            elif T < 2:
                raise ValueError('temporal_window="released" needs at least two frames; use temporal_window="full".')
            window = T // 2
        index = self._token_index(states[0], window, bool_masked_pos, kept_patches)

        outputs = []
        patches = video_cls = None
        for j, (layer, x) in enumerate(zip(self.layers, states, strict=True)):
            x_patches = self._take(x, index)
            if j == 0:
                patches = self._add_positions(x_patches, x.shape[1], position, index)
                video_cls = self._first_cls(x, position)
            else:
                patches = self._join(self.fusion_gate, config.fusion_gate_scale, x_patches, patches)
                if self.num_cls and config.video_cls == "average":
                    frame_cls = x[:, :, 0].mean(dim=1, keepdim=True)
                    video_cls = self._join(self.fusion_gate, config.fusion_gate_scale, frame_cls, video_cls)
            patches, video_cls = layer(patches, video_cls, row_seeds)
            outputs.append((patches, video_cls))

        # Paper Eq. 5: the video CLS (B, 1, D) joins the CLS of each frame (B, T, D). Without a CLS patches are joined.
        joined = None
        if final_state is not None:
            if self.num_cls:
                final, branch = final_state[:, :, 0], video_cls
            else:
                final, branch = self._take(final_state, index), patches
            joined = self._join(self.output_gate, config.output_gate_scale, final.to(dtype), branch).to(outer_dtype)
        fused = {key: self._fuse(x.to(dtype), *outputs[j]).to(outer_dtype) for key, (x, j) in (to_fuse or {}).items()}
        return BTAdapterBranchOutput(patches, video_cls, index, joined, fused)

    def _average_pairs(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C+N, D) -> (B, T/2, C+N, D), as released above 64 frames."""
        if x.shape[1] % 2:
            raise ValueError(
                f'temporal_window="released" averages pairs of frames above 64 and got {x.shape[1]} frames: pass an '
                'even number, or use temporal_window="full".'
            )
        return x.unflatten(1, (-1, 2)).mean(dim=2)

    def _token_index(
        self, x: torch.Tensor, window: int, bool_masked_pos: torch.Tensor | None, kept_patches: int | None
    ) -> torch.LongTensor | None:
        """Which backbone patch stands where in the branch, as `frame * N + patch`: (B, T', M); None = all in place.

        The kept tokens are listed patch by patch (all frames of the first patch, all frames of the second, ...), and
        the list is cut into temporal sequences of `window` tokens. With whole tubes and a window of T that is one
        patch over all frames; the two released variants differ from it in this list only.
        """
        B, T, S, _ = x.shape
        N = S - self.num_cls
        if bool_masked_pos is None and window == T:
            return None
        if bool_masked_pos is None:
            keep = torch.ones(B, N * T, dtype=torch.bool, device=x.device)
        else:
            keep = self._kept_tokens(bool_masked_pos.to(x.device, torch.bool), B, T, N)
        counts = [kept_patches * T] if kept_patches is not None else keep.sum(dim=1).unique().tolist()
        count = counts[0]
        if len(counts) > 1 or count == 0 or count % window:
            raise ValueError(
                f"After masking, {counts} of {N * T} tokens are left per video; every video must keep the same "
                f"number, more than 0 and divisible by the temporal window of {window} frames."
            )
        listed = true_first(keep)[:, :count]  # patch * T + frame
        listed = listed % T * N + listed // T  # frame * N + patch
        return listed.view(B, -1, window).transpose(1, 2)

    def _kept_tokens(self, masked: torch.Tensor, B: int, T: int, N: int) -> torch.Tensor:
        """bool (B, N) or frame-major (B, T*N), True = dropped -> bool (B, N*T), patch-major, True = kept"""
        if masked.shape not in ((B, N), (B, T * N)):
            raise ValueError(
                f"bool_masked_pos has shape {tuple(masked.shape)}; expected {(B, N)} (patches dropped from all "
                f"frames) or {(B, T * N)} (frame by frame)."
            )
        frames = masked.view(B, -1, N).expand(B, T, N)
        if self.config.mask_order == "released":
            # The defect of the released code: the frame-major vector indexes the patch-major list as it is.
            return ~frames.flatten(1)
        if masked.shape != (B, N) and (frames != frames[:, :1]).any():
            raise ValueError(
                'bool_masked_pos drops other patches in other frames; mask_order="tube" needs the same in all frames.'
            )
        return ~frames.transpose(1, 2).flatten(1)

    def _take(self, x: torch.Tensor, index: torch.LongTensor | None) -> torch.Tensor:
        """Patches of (B, T, C+N, D) in branch layout: (B, T', M, D). Dropped tokens are not touched."""
        if index is None:
            return x[:, :, self.num_cls :]
        B, T, S, D = x.shape
        N = S - self.num_cls
        rows = index // N * S + self.num_cls + index % N
        rows = rows + torch.arange(B, device=x.device).view(B, 1, 1) * (T * S)
        return x.reshape(-1, D).index_select(0, rows.flatten()).view(*rows.shape, D)

    def _add_positions(
        self, patches: torch.Tensor, T: int, position: torch.Tensor, index: torch.LongTensor | None
    ) -> torch.Tensor:
        """Spatial and time embeddings of each patch's own place and frame (paper Eq. 3)."""
        position, time = position[self.num_cls :], self._time_embeddings(T, position.device)
        if index is None:
            return patches + position + time[:, None]
        return patches + position[index % len(position)] + time[index // len(position)]

    def _time_embeddings(self, T: int, device: torch.device) -> torch.Tensor:
        """(T, D), the rows that were trained, or for another T a linear interpolation: first on first, last on last.

        As released, where it is not recorded which were: the first T rows, and an interpolation of all beyond.
        """
        trained = self.config.num_trained_frames
        rows = self.time_embedding(torch.arange(trained or min(T, self.config.max_frames), device=device))
        if T == len(rows):
            return rows
        if trained and not trained / 2 <= T <= 2 * trained and not self.training and not torch.compiler.is_compiling():
            logger.warning_once(
                f"The time embeddings were trained for {trained} frames per video and are interpolated to {T}: the "
                f"order of events is told best with num_frames={trained} of the processor, or nearby."
            )
        return nn.functional.interpolate(rows.t()[None], size=T, mode="linear", align_corners=True)[0].t()

    def _first_cls(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor | None:
        if not self.num_cls:
            return None
        if self.config.video_cls == "token":
            return self.video_cls.expand(x.shape[0], 1, -1)
        return (x[:, :, 0].mean(dim=1, keepdim=True) + self.video_cls + position[0]) / 2

    def _join(
        self, gate: torch.Tensor | None, scale: float, backbone: torch.Tensor, branch: torch.Tensor
    ) -> torch.Tensor:
        """Gate per channel (paper Eq. 4 and 5), or a plain sum where the config has no gate."""
        if gate is None:
            return backbone + branch
        weight = torch.sigmoid(scale * gate)
        if self.config.gate_on == "branch":
            return torch.lerp(*torch.broadcast_tensors(backbone, branch, weight))
        return torch.lerp(*torch.broadcast_tensors(branch, backbone, weight))

    def _fuse(self, x: torch.Tensor, patches: torch.Tensor, video_cls: torch.Tensor | None) -> torch.Tensor:
        """Backbone state (B, T, C+N, D), branch output (all patches) -> one set of tokens (B, C+N, D), CLS first."""
        B, _, S, D = x.shape
        N = S - self.num_cls
        if patches.shape[2] == N:
            tokens = patches.mean(dim=1)
        else:  # the released window folds frames into the patch axis; unfold them
            tokens = patches.transpose(1, 2).reshape(B, N, -1, D).mean(dim=2)
        if video_cls is not None:
            tokens = torch.cat([video_cls, tokens], dim=1)
        x = x.mean(dim=1)
        if self.config.token_fusion == "gate":
            return self._join(self.output_gate, self.config.output_gate_scale, x, tokens)
        return (x + tokens) / 2


class BTAdapterBranchOutput(NamedTuple):
    """What the branch returns for videos of one length."""

    patches: torch.Tensor  # (B, T', M, D)
    video_cls: torch.Tensor | None  # (B, 1, D)
    index: torch.LongTensor | None  # (B, T', M)
    joined: torch.Tensor | None  # (B, T, D) with a CLS, else (B, T', M, D): joined with the backbone, to be pooled
    fused: dict[int, torch.Tensor]  # (B, C+N, D) each


def true_first(keep: torch.Tensor) -> torch.LongTensor:
    """bool (B, n) -> (B, n), in each row the positions of the True ones in order, then those of the others."""
    return keep.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
