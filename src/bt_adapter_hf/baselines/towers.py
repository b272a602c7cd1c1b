"""The rivals of the branch as video towers: same inputs, outputs, files and trainer as `BTAdapterVisionModel`.

What the paper compares (Table 1 and 6), for CLIP towers. None of it was released; where the paper leaves a choice, the
one that is better for the rival was taken:

- `frame_average`: nothing is learned; frames are encoded alone and averaged.
- `st_pooling`: nothing is learned; T tokens averaged over space and N averaged over time.
- `joint`: all T*N tokens in one sequence through every layer of the encoder, with time embeddings.
- `separate`: temporal attention in front of each of the last K layers, which every token of a frame, the CLS too,
  passes. It starts as the plain encoder: its projection is zero, and only the temporal attention sees the time
  embeddings.
- `branch`: the branch without interaction, fed once, by the backbone layer that feeds the first branch layer.

`frozen=False` lets the image encoder learn; `joint` has nothing else to learn with.

    model = baseline_of(BTAdapterModel.from_pretrained(clip), temporal="separate", adapter_layers=[2, 3])

is a `BaselineForPreTraining` for `BTAdapterTrainer`, around the same parts. `AutoModel` and `AutoConfig` know what it
saves once this module has been imported. A LLaVA takes the tower in memory (`model.model.vision_tower = tower`), with
`T*N` tokens for a video of `joint` and `T+N` of `st_pooling`; it is the tower that is saved then.

Letters in shape comments: B videos, T frames, N patches, D width, K temporal layers, L layers.
"""

import math
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, CLIPTextConfig, initialization as init

from ..models.compat_bt_adapter import BaseModelOutputWithPooling, strict
from ..models.configuration_bt_adapter import BTAdapterConfig, BTAdapterVisionConfig
from ..models.modeling_bt_adapter import BTAdapterModel
from ..models.modeling_bt_adapter_branch import (
    BACKBONES,
    BTAdapterBranch,
    BTAdapterDropPath,
    BTAdapterTemporalBlock,
    BTAdapterZeroLinear,
)
from ..models.modeling_bt_adapter_pretraining import BTAdapterForPreTraining
from ..models.modeling_bt_adapter_vision import BTAdapterVisionModel, BTAdapterVisionOutput


KINDS = ("frame_average", "st_pooling", "joint", "separate", "branch")


@strict
class BaselineVisionConfig(BTAdapterVisionConfig):
    """Configuration of [`BaselineVisionModel`]: a tower's, with the kind of temporal modelling.

    Args:
        temporal (`str`, *optional*, defaults to `"frame_average"`): one of the kinds above.
        frozen (`bool`, *optional*, defaults to `True`): whether the image encoder stays as it is.
    """

    model_type = "bt_adapter_baseline_vision"

    temporal: Literal["frame_average", "st_pooling", "joint", "separate", "branch"] = "frame_average"
    frozen: bool = True

    def validate_architecture(self):
        super().validate_architecture()
        if self.backbone.model_type != "clip_vision_model":
            raise ValueError(f"Baselines are made of CLIP towers; the backbone is a {self.backbone.model_type}.")
        L = self.backbone.num_hidden_layers
        if self.temporal == "separate" and self.adapter_layers != list(range(self.adapter_layers[0], L)):
            raise ValueError(
                f'temporal="separate" stands in front of the last layers: adapter_layers={self.adapter_layers} must '
                f"be such as {list(range(L - len(self.adapter_layers), L))}."
            )
        if self.temporal == "joint" and self.frozen:
            raise ValueError('temporal="joint" learns in the image encoder itself: set frozen=False.')
        if self.temporal == "branch" and (self.fusion, self.output_fusion) != ("sum", "gate"):
            raise ValueError(
                'temporal="branch" takes nothing in and has a gate at its end only: set fusion="sum" and '
                'output_fusion="gate".'
            )


class LoneBranch(BTAdapterBranch):
    """The branch without interaction: later layers do not see the backbone. At the end the two are joined as ever."""

    def _join(self, gate, scale, backbone, branch):
        # The only gate of this branch is at the output, see `BaselineVisionConfig.validate_architecture`.
        return branch if gate is None else super()._join(gate, scale, backbone, branch)


class TemporalBlocks(nn.Module):
    """What a rival adds to the encoder: time embeddings, and K temporal blocks for `separate`."""

    def __init__(self, config: BaselineVisionConfig):
        super().__init__()
        self.config = config
        if config.temporal in ("joint", "separate"):
            self.time_embedding = nn.Embedding(config.max_frames, config.hidden_size)
        if config.temporal == "separate":
            layer_class = BACKBONES[config.backbone.model_type].layer_class
            self.layers = nn.ModuleList(
                BTAdapterTemporalBlock(config, layer_class(config.backbone), BTAdapterDropPath(0.0, 0))
                for _ in config.adapter_layers
            )

    def embed_time(self, T: int) -> torch.Tensor:
        """(T, D): as the branch embeds time."""
        return BTAdapterBranch._time_embeddings(self, T, self.time_embedding.weight.device)


class BaselineVisionModel(BTAdapterVisionModel):
    """A tower of one of the kinds above. Images take the native path."""

    config: BaselineVisionConfig

    @staticmethod
    def branch_class(config: BaselineVisionConfig) -> nn.Module:
        return (LoneBranch if config.temporal == "branch" else TemporalBlocks)(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, TemporalBlocks):
            if hasattr(module, "time_embedding"):
                init.normal_(module.time_embedding.weight, std=self.config.time_embedding_init_std)
            for linear in module.modules():
                if isinstance(linear, nn.Linear) and not isinstance(linear, BTAdapterZeroLinear):  # as in the branch
                    init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
                    init.uniform_(linear.bias, -(linear.in_features**-0.5), linear.in_features**-0.5)
        else:
            super()._init_weights(module)

    def freeze_backbone(self):
        self.vision_model.requires_grad_(not self.config.frozen)

    def needed_states(self, output_hidden_states=None) -> list[int]:
        if self.config.temporal == "separate":  # what lies behind its first block depends on the other frames
            return [self.config.adapter_layers[0]]
        if self.config.temporal == "joint":  # the embedded frames stand in for it
            return [self.config.num_hidden_layers]
        return super().needed_states(output_hidden_states)

    def _run_backbone(self, frames, selected, output_attentions, **kwargs):
        """Frames (F, 3, H, W) -> {index: (F, 1+N, D)}. What changes inside stands still until `_run_branch`."""
        kind = self.config.temporal
        if kind not in ("joint", "separate"):
            return super()._run_backbone(frames, selected, output_attentions, **kwargs)
        if output_attentions:
            raise ValueError(f'temporal="{kind}" gives no attentions.')
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.backbone_is_frozen()):
            state = self.vision_model.embeddings(frames, **kwargs)
            if kind == "joint":
                return {self.config.num_hidden_layers: state}, None
            state = self.vision_model.pre_layrnorm(state)
            states = {0: state}
            for number, layer in enumerate(self.vision_model.encoder.layers[: self.config.adapter_layers[0]], 1):
                states[number] = layer(states[number - 1], attention_mask=None)
        return {n: state for n, state in states.items() if n in {*selected, *self.needed_states()}}, None

    def _run_branch(self, states, position, bool_masked_pos, selected, output_branch_states, *args):
        kind = self.config.temporal
        if kind == "branch":
            return super()._run_branch(states, position, bool_masked_pos, selected, output_branch_states, *args)
        if bool_masked_pos is not None:
            raise ValueError(f'temporal="{kind}" has no branch whose patches could be masked: set mask_ratio=0.')
        tower, states = self.vision_model, dict(states)
        if kind == "joint":
            states = self._joint(states[self.config.num_hidden_layers])
        elif kind == "separate":
            states = self._separate(states)
        L = self.config.num_hidden_layers
        final = states[L]  # (B, T, 1+N, D), or (B, 1, 1+T*N, D)
        tokens = {n: x.mean(dim=1) for n, x in states.items() if n in selected}
        last = final.mean(dim=1)
        pooled = final[:, :, 0]
        if kind == "st_pooling":
            last = pooled = _over_space_and_time(final)
            # The CLS in front, which a chat model leaves out.
            tokens = {n: torch.cat([x[:, :1], _over_space_and_time(states[n])], dim=1) for n, x in tokens.items()}
        output = {
            "last_hidden_state": last,
            "pooler_output": tower.post_layernorm(pooled).mean(dim=1),
            "hidden_states": tuple(tokens.get(n) for n in range(L + 1)) if tokens else None,
        }
        if output_branch_states:
            return BTAdapterVisionOutput(**output, backbone_state=final)
        return BaseModelOutputWithPooling(**output)

    def _regroup(self, results, groups, lengths):
        if self.config.temporal in ("joint", "st_pooling") and len(set(lengths)) > 1:
            raise ValueError(
                f'temporal="{self.config.temporal}" gives as many tokens as a video has frames for: videos of '
                f"{sorted(set(lengths))} frames do not stand in one tensor. Run those of one length together."
            )
        return super()._regroup(results, groups, lengths)

    def _joint(self, embedded: torch.Tensor) -> dict[int, torch.Tensor]:
        """Embedded frames (B, T, 1+N, D) -> {index: (B, 1, 1+T*N, D)}: one CLS, and the patches frame by frame."""
        time = self.bt_adapter.embed_time(embedded.shape[1])[:, None]  # (T, 1, D)
        x = torch.cat([embedded[:, 0, :1], (embedded[:, :, 1:] + time).flatten(1, 2)], dim=1)
        states = {0: self.vision_model.pre_layrnorm(x)}
        for number, layer in enumerate(self.vision_model.encoder.layers, 1):
            states[number] = layer(states[number - 1], attention_mask=None)
        return {n: x[:, None] for n, x in states.items()}

    def _separate(self, states: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """{index: (B, T, 1+N, D)} up to the first changed layer -> the same, with those behind it."""
        first = self.config.adapter_layers[0]
        x = states[first]
        time = self.bt_adapter.embed_time(x.shape[1])[:, None]  # (T, 1, D)
        for number, block in enumerate(self.bt_adapter.layers, first):
            timed = x + time
            x = x + (block(timed) - timed)
            x = self.vision_model.encoder.layers[number](x.flatten(0, 1), attention_mask=None).view_as(x)
            states[number + 1] = x
        return states


def _over_space_and_time(x: torch.Tensor) -> torch.Tensor:
    """(B, T, 1+N, D) -> (B, T+N, D): the mean patch of each frame, and each patch's mean over the frames."""
    patches = x[:, :, 1:]
    return torch.cat([patches.mean(dim=2), patches.mean(dim=1)], dim=1)


@strict
class BaselineConfig(BTAdapterConfig):
    """Configuration of the dual encoder around a [`BaselineVisionModel`]."""

    model_type = "bt_adapter_baseline"
    sub_configs_defaults: ClassVar[dict] = {"text_config": CLIPTextConfig, "vision_config": BaselineVisionConfig}


class BaselineModel(BTAdapterModel):
    """The dual encoder around a rival's tower."""

    config: BaselineConfig
    tower_class = BaselineVisionModel


class BaselineForPreTraining(BTAdapterForPreTraining):
    """The pretraining of a rival; what is not frozen in its tower learns too."""

    config: BaselineConfig
    tower_class = BaselineVisionModel

    def __init__(self, config: BaselineConfig):
        temporal = config.vision_config.temporal
        if temporal != "branch" and (config.mbta_weight > 0 or config.mbca_weight > 0):
            raise ValueError(f'temporal="{temporal}" has no branch to align: set mbta_weight=0 and mbca_weight=0.')
        super().__init__(config)

    def freeze_backbone(self):
        super().freeze_backbone()
        self.vision_model.freeze_backbone()


def baseline_of(model: BTAdapterModel, *, seed: int = 0, **fields: Any) -> BaselineForPreTraining:
    """A rival around copies of the CLIP in a dual encoder, ready for `BTAdapterTrainer`.

    Args:
        model: dual encoder; its own branch is left behind.
        seed: of the new weights.
        fields: of [`BaselineVisionConfig`] and [`BaselineConfig`]; there is no masking and no alignment of patches
            unless asked for.

    Raises:
        ValueError: for fields that do not fit each other.
    """
    known = BaselineVisionConfig.__dataclass_fields__.keys() | BaselineConfig.__dataclass_fields__.keys()
    if unknown := fields.keys() - known:
        raise ValueError(f"{', '.join(sorted(unknown))}: no field of BaselineVisionConfig or BaselineConfig.")
    config, tower = model.config, model.config.vision_config
    of_tower = {name: fields.pop(name) for name in BaselineVisionConfig.__dataclass_fields__.keys() & fields.keys()}
    fields = {"mask_ratio": 0.0, "mbta_weight": 0.0, "mbca_weight": 0.0, **fields}
    own = {name: getattr(config, name) for name in ("projection_dim", "visual_projection_bias", "temperature")}
    baseline_config = BaselineConfig(
        text_config=config.text_config.to_dict(),
        vision_config=BaselineVisionConfig(backbone=tower.backbone.to_dict(), **of_tower).to_dict(),
        **{**own, **fields},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        baseline = BaselineForPreTraining(baseline_config)
        weights = {name: x for name, x in model.state_dict().items() if ".bt_adapter." not in name}
        new = baseline.load_state_dict(weights, strict=False).missing_keys
        missing = [name for name in new if ".bt_adapter." not in name and not name.startswith("mbta_head.")]
        if missing:
            raise ValueError(f"{type(model).__name__} lacks the weights {missing}.")
        baseline.vision_model._init_weights(baseline.vision_model.bt_adapter)  # now that the backbone is there
    baseline.freeze_backbone()
    return baseline


AutoConfig.register(BaselineVisionConfig.model_type, BaselineVisionConfig, exist_ok=True)
AutoConfig.register(BaselineConfig.model_type, BaselineConfig, exist_ok=True)
AutoModel.register(BaselineVisionConfig, BaselineVisionModel, exist_ok=True)
AutoModel.register(BaselineConfig, BaselineModel, exist_ok=True)
