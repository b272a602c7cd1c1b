"""The video tower: a native image model, untouched and frozen, with the branch of BT-Adapter beside it.

Letters in shape comments: B videos, T frames, N patches, D width, K branch layers, C the number of CLS tokens of the
backbone (1, or 0 for SigLIP), L backbone layers.
"""

import importlib
import math
from collections import defaultdict
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel, initialization as init
from transformers.utils import ModelOutput, logging

from .compat_bt_adapter import (
    CAPTURING_HOOKS,
    BaseModelOutputWithPooling,
    WeightRenaming,
    can_return_tuple,
    register_checkpoint_conversion_mapping,
)
from .configuration_bt_adapter import BTAdapterConfig, BTAdapterVisionConfig
from .modeling_bt_adapter_branch import BACKBONES, BTAdapterBranch, BTAdapterZeroLinear


logger = logging.get_logger(__name__)


@dataclass
class BTAdapterVisionOutput(BaseModelOutputWithPooling):
    """Output of the tower when the states of the branch are asked for (`output_branch_states=True`).

    Args:
        last_hidden_state (`torch.Tensor` of shape `(B, C+N, D)`, *optional*):
            Fused tokens; absent when patches are masked, for they have no place for the dropped ones.
        pooler_output (`torch.Tensor` of shape `(B, D)`): Pooled video feature, before any projection.
        backbone_state (`torch.Tensor` of shape `(B, T, C+N, D)`): Output of the last backbone layer, per frame.
        branch_patches (`torch.Tensor` of shape `(B, T, M, D)`): Final branch patches; M of them are kept.
        branch_cls (`torch.Tensor` of shape `(B, 1, D)`, *optional*): Final video CLS.
        branch_index (`torch.LongTensor` of shape `(B, T, M)`, *optional*):
            Where each branch patch comes from, as `frame * N + patch`; absent when all patches stay in their places.
    """

    backbone_state: torch.Tensor | None = None
    branch_patches: torch.Tensor | None = None
    branch_cls: torch.Tensor | None = None
    branch_index: torch.Tensor | None = None


def package_loading() -> ModuleType | None:
    """The package's loading, the one thing out of here that models reach; None in code that came with a checkpoint."""
    return importlib.import_module("bt_adapter_hf.hub.loading") if __name__.startswith("bt_adapter_hf.") else None


def plainly_loaded(loaded: PreTrainedModel | tuple[PreTrainedModel, dict]) -> PreTrainedModel | tuple:
    """What transformers has loaded, its backbone out of training: loading replaces parameters, and new ones learn."""
    (loaded[0] if isinstance(loaded, tuple) else loaded).freeze_backbone()
    return loaded


class BTAdapterPreTrainedModel(PreTrainedModel):
    """Weight initialisation, strict loading and the flags that transformers reads."""

    config: BTAdapterConfig
    base_model_prefix = "bt_adapter_model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = [
        "BTAdapterLayer", "CLIPEncoderLayer", "SiglipEncoderLayer", "InstructBlipEncoderLayer", "Blip2EncoderLayer",
        "CLIPVisionEmbeddings", "CLIPTextEmbeddings", "SiglipVisionEmbeddings", "InstructBlipVisionEmbeddings",
        "Blip2VisionEmbeddings", "SiglipMultiheadAttentionPoolingHead",
    ]  # fmt: skip
    # Modules that a checkpoint of a bare backbone lacks; they are new then, each as a whole.
    _new_modules: tuple[str, ...] = ("bt_adapter",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, BTAdapterZeroLinear):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, BTAdapterBranch):
            # The branch is visited after the backbone, so a loaded backbone is there to start from.
            self._init_branch(module)
        else:
            super()._init_weights(module)

    def _init_branch(self, branch: BTAdapterBranch):
        """Initialisation as released: spatial blocks from the backbone, temporal attention as fresh `nn.Linear`."""
        for parameter in (branch.video_cls if branch.num_cls else None, branch.fusion_gate, branch.output_gate):
            if parameter is not None:
                init.zeros_(parameter)
        init.normal_(branch.time_embedding.weight, std=branch.config.time_embedding_init_std)
        for layer, number in zip(branch.layers, branch.config.adapter_layers, strict=True):
            for linear in layer.temporal.attn.modules():
                if isinstance(linear, nn.Linear):
                    init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
                    if linear.bias is not None:
                        bound = linear.in_features**-0.5
                        init.uniform_(linear.bias, -bound, bound)
            source = self.vision_model.encoder.layers[number]
            spatial = layer.spatial
            for target, origin in (
                (spatial.norm1, source.layer_norm1),
                (spatial.attn, source.self_attn),
                (spatial.norm2, source.layer_norm2),
                (spatial.mlp, source.mlp),
            ):
                for (_, p), (_, q) in zip(target.named_parameters(), origin.named_parameters(), strict=True):
                    init.copy_(p, q)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As in transformers, but strict: a weight is never silently random or dropped.

        A checkpoint without a branch (CLIPModel, a bare vision model) gives a fresh, warm-started branch and says so
        in the log. Anything else that is missing, unexpected or of another shape is an error with counts and nearest
        names.

        An adapter, by folder or id, is put into the base model that it names, at the revision that it was trained on.

        Code that came with a checkpoint loads as plain transformers does.

        Raises:
            ValueError: if the checkpoint does not fill the model, or holds weights that the model has no place for.
            OSError: if a repository cannot be fetched; of an adapter's base model it says which, and what to do.
        """
        load, package = super().from_pretrained, package_loading()
        if cls is BTAdapterVisionModel:  # out of a dual encoder that was put together in memory and saved
            kwargs.setdefault("key_mapping", {r"^vision_model\.vision_model\.bt_adapter\.": "bt_adapter."})
        if package is not None:
            return package.load_model(load, pretrained_model_name_or_path, *model_args, **kwargs)
        return plainly_loaded(load(pretrained_model_name_or_path, *model_args, **kwargs))

    def freeze_backbone(self):
        """Takes the image backbone out of training. It is frozen from the start; `requires_grad_(True)` frees it."""
        for module in self.modules():
            if isinstance(module, BTAdapterVisionModel):
                module.vision_model.requires_grad_(False)

    def __getstate__(self) -> dict:
        """For pickle: without transformers' hooks that record hidden states, which it installs anew when needed."""
        for module in self.modules():
            for key, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__module__", None) == CAPTURING_HOOKS:
                    del module._forward_hooks[key]
            vars(module).pop("_output_capturing_hooks_installed", None)
        return self.__dict__


class BTAdapterVisionModel(BTAdapterPreTrainedModel):
    """The tower: a native image model, untouched and frozen, with the branch beside it.

    Images (4-D `pixel_values`) take the native path and give the native model's output, bit for bit. Videos (5-D) give
    one set of `C+N` tokens, whatever the number of frames. Without gradients, frames with equal pixels pass the image
    model once.
    """

    config: BTAdapterVisionConfig
    input_modalities = ("image", "video")
    branch_class = BTAdapterBranch
    _input_embed_layer = "patch_embedding"
    _can_record_outputs = {}  # hidden states are fused by hand; recording would return those of single frames
    _keys_to_ignore_on_load_unexpected = [
        r"^(text_model|text_projection|visual_projection|mbta_head)\.|^logit_(scale|bias)$|position_ids$"
    ]

    def __init__(self, config: BTAdapterVisionConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        config.validate()
        self.family = BACKBONES[config.backbone.model_type]
        if backbone is None:
            backbone = self.family.model_class._from_config(config.backbone)
        self.vision_model = backbone
        self.bt_adapter = self.branch_class(config)
        self.post_init()
        self.freeze_backbone()

    @classmethod
    def from_backbone(cls, backbone: PreTrainedModel, num_adapter_layers: int = 4, **config_fields):
        """Puts a fresh, warm-started branch beside a vision model in memory, which is used as it is, not copied.

        Args:
            backbone: CLIPVisionModel, SiglipVisionModel, InstructBlipVisionModel or Blip2VisionModel.
            num_adapter_layers: the branch is fed by the last so many layers; `adapter_layers` takes precedence.
            config_fields: further fields of [`BTAdapterVisionConfig`].

        Raises:
            ValueError: if the model is of another kind.
        """
        if getattr(backbone.config, "model_type", None) not in BACKBONES or not hasattr(backbone, "encoder"):
            raise ValueError(
                f"{type(backbone).__name__} is not a vision model that takes a BT-Adapter; pass a "
                + ", ".join(family.model_class.__name__ for family in BACKBONES.values())
                + " (for a CLIPModel or LLaVA its vision model)."
            )
        depth = backbone.config.num_hidden_layers
        if "adapter_layers" not in config_fields:
            if not 1 <= num_adapter_layers <= depth:
                raise ValueError(f"num_adapter_layers={num_adapter_layers} must be between 1 and {depth}.")
            config_fields["adapter_layers"] = list(range(depth - num_adapter_layers, depth))
        config = cls.config_class(backbone=backbone.config, **config_fields)
        for module in backbone.modules():
            module._is_hf_initialized = True
        model = cls(config, backbone)
        model.bt_adapter.to(device=backbone.device, dtype=backbone.dtype)
        return model.train(backbone.training)

    def _replicate_for_data_parallel(self):
        raise RuntimeError(
            "A BT-Adapter does not run under nn.DataParallel: start one process per GPU, with torchrun or accelerate."
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.get_input_embeddings()

    def backbone_is_frozen(self) -> bool:
        return not any(p.requires_grad for p in self.vision_model.parameters())

    def train(self, mode: bool = True):
        super().train(mode)
        if self.backbone_is_frozen():
            self.vision_model.eval()  # no dropout and no activation checkpointing where nothing is learned
        return self

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        frame_mask: torch.Tensor | None = None,
        bool_masked_pos: torch.BoolTensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        interpolate_pos_encoding: bool = False,
        output_branch_states: bool = False,
        kept_patches: int | None = None,
        backbone_states: dict[int, torch.Tensor] | None = None,
        row_seeds: torch.LongTensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values: images (B, 3, H, W), which take the native path, or videos (B, T, 3, H, W) with T >= 1.
            frame_mask: (B, T), nonzero = a real frame, for videos of unequal length in one batch. Each video gives
                what it would give alone.
            bool_masked_pos: bool, True = the patch is dropped from the branch: (B, N), from all frames (a tube, paper
                section 3.3), or (B, T*N), frame by frame. Every video drops equally many. The backbone sees all.
            output_hidden_states: all (`True`), or those of some indices into the tuple of L+1 entries; the others are
                `None`. For videos, entry l is the mean over the frames of the backbone's, fused with the branch from
                the first adapter layer on.
            output_attentions: return the backbone's attentions, per frame; needs `attn_implementation="eager"`.
            interpolate_pos_encoding: as in the native model, for images of another size.
            output_branch_states: return [`BTAdapterVisionOutput`] with the states of the branch.
            kept_patches: how many patches each row of a mask (B, N) keeps, from a caller who knows: the mask is then
                neither checked nor read back from the device, and the forward pass compiles into one graph.
            backbone_states: in place of pixel_values, what [`encode_frames`] gave for the videos, (B, T, C+N, D)
                each: only the branch runs. Unequal videos are padded with any values, see frame_mask.
            row_seeds: (B,), an integer per video that says which paths are dropped from it in training; drawn from
                torch's generator when absent.

        Returns:
            `last_hidden_state` (B, C+N, D) and `pooler_output` (B, D); for images the native model's output. Both are
            None with backbone_states that lack the output of the last backbone layer.

        Raises:
            ValueError: if shapes do not fit each other or the backbone.
        """
        configs = (self.config, self.vision_model.config)
        if output_hidden_states is None:
            output_hidden_states = any(config.output_hidden_states for config in configs)
        if output_attentions is None and backbone_states is None:
            output_attentions = any(config.output_attentions for config in configs)
        selected = self._select(output_hidden_states)
        if backbone_states is not None:
            if pixel_values is not None or output_attentions or interpolate_pos_encoding:
                raise ValueError(
                    "backbone_states stand in for pixel_values, and come without attentions or interpolated "
                    "positions: pass them alone."
                )
            self._check_states(backbone_states, set(self.needed_states(output_hidden_states)))
        elif pixel_values is None:
            raise ValueError("Pass pixel_values, or backbone_states.")
        elif pixel_values.ndim == 4:
            if frame_mask is not None or bool_masked_pos is not None or output_branch_states:
                raise ValueError(
                    "frame_mask, bool_masked_pos and output_branch_states are for videos (B, T, 3, H, W); "
                    f"pixel_values of shape {tuple(pixel_values.shape)} are images. "
                    "Use pixel_values[:, None] for videos of one frame."
                )
            return self.vision_model(
                pixel_values,
                output_hidden_states=output_hidden_states,
                output_attentions=output_attentions,
                interpolate_pos_encoding=interpolate_pos_encoding,
                return_dict=True,
                **kwargs,
            )
        else:
            self._check_video(pixel_values)

        seen = pixel_values if backbone_states is None else next(iter(backbone_states.values()))
        B, T = seen.shape[:2]
        lengths = [T] * B
        if frame_mask is not None:
            self._check_frame_mask(frame_mask, (B, T))
            frame_mask = frame_mask.to(seen.device, torch.bool)
            lengths = frame_mask.sum(dim=1).tolist()
        groups = self._groups(lengths, whole=torch.is_grad_enabled() or output_branch_states)
        if bool_masked_pos is not None and len(set(lengths)) > 1:
            raise ValueError(f"bool_masked_pos needs videos of one length; frame_mask gives {sorted(set(lengths))}.")
        if output_branch_states and len(groups) > 1:
            raise ValueError("output_branch_states needs videos of one length; run unequal videos in groups.")
        if self.training and row_seeds is None:
            row_seeds = torch.randint(2**32, (B,), device=seen.device)
        position = self._position_embeddings(pixel_values, interpolate_pos_encoding)
        results = []
        for rows in groups:
            chosen = slice(None) if len(rows) == B else rows
            masked = None if bool_masked_pos is None else bool_masked_pos[chosen]
            real = None if frame_mask is None else frame_mask[chosen]
            seeds = None if row_seeds is None else row_seeds.to(seen.device)[chosen]
            if backbone_states is not None:
                states = {n: _frames(x[chosen], real).to(self.dtype) for n, x in backbone_states.items()}
                attentions = None
            else:
                states, attentions = self._run_backbone(
                    _frames(pixel_values[chosen], real),
                    selected,
                    output_attentions=output_attentions,
                    interpolate_pos_encoding=interpolate_pos_encoding,
                )
            states = {n: x.unflatten(0, (len(rows), -1)) for n, x in states.items()}
            output = self._run_branch(states, position, masked, selected, output_branch_states, kept_patches, seeds)
            output.attentions = attentions
            results.append(output)
        return results[0] if len(results) == 1 else self._regroup(results, groups, lengths)

    def _groups(self, lengths: list[int], whole: bool) -> list[list[int]]:
        """Rows of the batch that go through together: of one length, so that no padding exists anywhere.

        Unless they are to stay `whole`, as learning from them needs, only so many at once as `frames_per_chunk`
        allows: memory does not grow with the number of videos.
        """
        rows_of = defaultdict(list)
        for row, length in enumerate(lengths):
            rows_of[length].append(row)
        groups = []
        for length, rows in rows_of.items():
            at_once = len(rows) if whole else max(1, self.config.frames_per_chunk // length)
            groups += [rows[start : start + at_once] for start in range(0, len(rows), at_once)]
        return groups

    @property
    def dtype(self) -> torch.dtype:
        """That of the backbone: a branch that learns may be kept in another."""
        return self.vision_model.dtype

    def needed_states(self, output_hidden_states: bool | int | list[int] | None = None) -> list[int]:
        """Indices into the L+1 hidden states of the backbone that the branch reads, and those asked for."""
        return sorted(self._select(output_hidden_states) | {layer + 1 for layer in self.config.adapter_layers})

    @torch.no_grad()
    def encode_frames(
        self, pixel_values: torch.FloatTensor, output_hidden_states: int | list[int] | None = None
    ) -> dict[int, torch.Tensor]:
        """What the branch reads of the frozen backbone, to be computed once and given to [`forward`] ever after.

        Args:
            pixel_values: videos of one length (B, T, 3, H, W).
            output_hidden_states: further states that [`forward`] will be asked for.

        Returns:
            {index of [`needed_states`]: (B, T, C+N, D)}
        """
        self._check_video(pixel_values)
        wanted = self.needed_states(output_hidden_states)
        states, _ = self._run_backbone(pixel_values.flatten(0, 1), set(wanted), output_attentions=False)
        return {n: states[n].unflatten(0, pixel_values.shape[:2]) for n in wanted}

    def _check_states(self, states: dict[int, torch.Tensor], needed: set[int]):
        shapes = {tuple(x.shape) for x in states.values()}
        if needed - states.keys() or len(shapes) != 1 or len(next(iter(shapes))) != 4:
            raise ValueError(
                f"backbone_states has the states {sorted(states)} of shapes {sorted(shapes)}; expected at least "
                f"{sorted(needed)}, all of one shape (B, T, tokens, {self.config.hidden_size})."
            )

    def _check_video(self, pixel_values: torch.Tensor):
        shape, channels = tuple(pixel_values.shape), self.config.num_channels
        if pixel_values.ndim != 5 or shape[2] != channels or 0 in shape:
            raise ValueError(
                f"pixel_values has shape {shape}; expected images (B, {channels}, H, W) or videos "
                f"(B, T, {channels}, H, W) with at least one frame."
            )

    @staticmethod
    def _check_frame_mask(frame_mask: torch.Tensor, shape: tuple[int, int]):
        if tuple(frame_mask.shape) != shape:
            raise ValueError(f"frame_mask has shape {tuple(frame_mask.shape)}; the videos have (B, T) = {shape}.")
        if not frame_mask.any(dim=1).all():
            raise ValueError("frame_mask leaves a video without any frame; every row needs at least one.")

    def _select(self, output_hidden_states: bool | int | list[int] | None) -> set[int]:
        """Indices into the tuple of L+1 hidden states, counted from 0."""
        L = self.config.num_hidden_layers
        if output_hidden_states is None or isinstance(output_hidden_states, bool):
            return set(range(L + 1)) if output_hidden_states else set()
        wanted = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
        return {n % (L + 1) for n in wanted if -(L + 1) <= n <= L}  # others select nothing, as in transformers

    def _run_backbone(
        self, frames: torch.Tensor, selected: set[int], output_attentions: bool | None, **kwargs
    ) -> tuple[dict[int, torch.Tensor], tuple[torch.Tensor, ...] | None]:
        """Frames (F, 3, H, W) -> hidden states {index: (F, C+N, D)} that branch and caller need, and attentions."""
        needed = selected | {layer + 1 for layer in self.config.adapter_layers} | {self.config.num_hidden_layers}
        as_they_are = torch.is_grad_enabled() or self.vision_model.training or output_attentions or frames.is_meta
        frames, places = (frames, None) if as_they_are or torch.compiler.is_compiling() else _distinct(frames)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.backbone_is_frozen()):
            chunks = [
                self.vision_model(
                    chunk,
                    output_hidden_states=sorted(needed),
                    output_attentions=output_attentions,
                    return_dict=True,
                    **kwargs,
                )
                for chunk in frames.split(self.config.frames_per_chunk)
            ]
        states = {n: _cat([chunk.hidden_states[n] for chunk in chunks]) for n in sorted(needed)}
        states = states if places is None else {n: x[places] for n, x in states.items()}
        attentions = None
        if output_attentions:
            attentions = tuple(_cat(list(x)) for x in zip(*(chunk.attentions for chunk in chunks), strict=True))
        return states, attentions

    def _position_embeddings(self, pixel_values: torch.Tensor | None, interpolate_pos_encoding: bool) -> torch.Tensor:
        """Spatial position embeddings of the backbone, (C+N, D), frozen."""
        embeddings = self.vision_model.embeddings
        if interpolate_pos_encoding:
            H, W = pixel_values.shape[-2:]
            count = self.family.num_cls + (H // self.config.patch_size) * (W // self.config.patch_size)
            like = pixel_values.new_empty(1, count, self.config.hidden_size)
            return embeddings.interpolate_pos_encoding(like, H, W)[0]
        table = embeddings.position_embedding  # a parameter (1, C+N, D) in the EVA towers
        return table[0] if isinstance(table, nn.Parameter) else table(embeddings.position_ids)[0]

    def _run_branch(
        self,
        states: dict[int, torch.Tensor],
        position: torch.Tensor,
        bool_masked_pos: torch.Tensor | None,
        selected: set[int],
        output_branch_states: bool,
        kept_patches: int | None = None,
        row_seeds: torch.LongTensor | None = None,
    ) -> BaseModelOutputWithPooling:
        """Videos of one length. `states` are {index: (B, T, C+N, D)}."""
        L, layers = self.config.num_hidden_layers, self.config.adapter_layers
        wanted = selected | {L} & states.keys()
        to_fuse = {}
        if bool_masked_pos is None:
            # Entry n is the output of backbone layer n-1, fused with the latest branch layer fed by then.
            fed_by = {n: sum(layer < n for layer in layers) - 1 for n in wanted}
            to_fuse = {n: (states[n], j) for n, j in fed_by.items() if j >= 0}
        inputs = [states[i + 1] for i in layers]
        branch = self.bt_adapter(inputs, states.get(L), position, bool_masked_pos, to_fuse, kept_patches, row_seeds)

        last_hidden_state = hidden_states = None
        if bool_masked_pos is None:
            fused = {n: branch.fused[n] if n in branch.fused else states[n].mean(dim=1) for n in wanted}
            if L in fused:
                last_hidden_state = self._place_cls(
                    self.vision_model.post_layernorm(fused[L]) if self.family.norm_all else fused[L]
                )
            if selected:
                hidden_states = tuple(self._place_cls(fused[n]) if n in selected else None for n in range(L + 1))
        output = {
            "last_hidden_state": last_hidden_state,
            "pooler_output": None if branch.joined is None else self._pool(branch.joined),
            "hidden_states": hidden_states,
        }
        if not output_branch_states:
            return BaseModelOutputWithPooling(**output)
        return BTAdapterVisionOutput(
            **output,
            backbone_state=states.get(L),
            branch_patches=branch.patches,
            branch_cls=branch.video_cls,
            branch_index=branch.index,
        )

    def _pool(self, joined: torch.Tensor) -> torch.Tensor | None:
        """(B, T, D) per-frame CLS, or (B, T, M, D) patches without CLS -> (B, D). Paper Eq. 5 up to the projection."""
        if self.config.pooling_order == "mean_then_norm":
            joined = joined.mean(dim=1, keepdim=True)
        joined = self.vision_model.post_layernorm(joined)
        if joined.ndim == 4:
            head = getattr(self.vision_model, "head", None)
            if head is None:
                return None
            joined = head(joined.flatten(0, 1)).unflatten(0, joined.shape[:2])
        return joined.mean(dim=1)

    def _place_cls(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.config.cls_position == "last" and self.family.num_cls:
            return torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1)
        return tokens

    def _regroup(self, results: list[ModelOutput], groups: list[list[int]], lengths: list[int]) -> ModelOutput:
        """Puts the outputs of several groups of videos back into the order of the batch."""
        rows = [row for group in groups for row in group]
        frames = [(row, t) for row in rows for t in range(lengths[row])]

        def merge(name: str, order: list) -> torch.Tensor | tuple | None:
            parts = [result[name] if name in result else None for result in results]
            if parts[0] is None:
                return None
            index = torch.tensor(sorted(range(len(order)), key=order.__getitem__))
            if isinstance(parts[0], tuple):
                entries = zip(*parts, strict=True)
                return tuple(None if x[0] is None else torch.cat(x)[index.to(x[0].device)] for x in entries)
            return torch.cat(parts)[index.to(parts[0].device)]

        return BaseModelOutputWithPooling(
            last_hidden_state=merge("last_hidden_state", rows),
            pooler_output=merge("pooler_output", rows),
            hidden_states=merge("hidden_states", rows),
            attentions=merge("attentions", frames),
        )


def _frames(videos: torch.Tensor, frame_mask: torch.Tensor | None) -> torch.Tensor:
    """The real frames of videos, one after the other: (B, T, ...) and (B, T) -> (F, ...)"""
    return videos.flatten(0, 1) if frame_mask is None else videos[frame_mask]


def _distinct(frames: torch.Tensor) -> tuple[torch.Tensor, list[int] | None]:
    """The frames (F, 3, H, W) without those that equal another, and the place of each among them; None: all differ."""
    # sums of the bits tell which may be equal: whole numbers, so that no order of adding matters
    bits = frames.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[frames.element_size()])
    distinct, places, seen = [], [], defaultdict(list)
    for number, total in enumerate(bits.flatten(1).sum(dim=1).tolist()):
        place = next((p for p in seen[total] if torch.equal(frames[distinct[p]], frames[number])), len(distinct))
        if place == len(distinct):
            seen[total].append(place)
            distinct.append(number)
        places.append(place)
    return (frames, None) if len(distinct) == len(frames) else (frames[distinct], places)


def _cat(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


# Two renamings make every checkpoint route work, in both directions, wherever the tower stands in a larger model: hub
# names nest the native model once more (`vision_model.vision_model.*`), newer ones are flat (`embeddings.*`).
register_checkpoint_conversion_mapping(
    "BTAdapterVisionModel",
    [
        WeightRenaming(r"^vision_model\.(vision_model|bt_adapter)\.", r"\1."),
        WeightRenaming(r"^(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.", r"vision_model.\1."),
    ],
    overwrite=True,
)

AutoModel.register(BTAdapterVisionConfig, BTAdapterVisionModel, exist_ok=True)
