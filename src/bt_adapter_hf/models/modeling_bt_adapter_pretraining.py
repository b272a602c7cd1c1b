"""Pretraining of the branch: asymmetric tube masking and the three losses of the paper (section 3.3)."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from transformers.utils import ModelOutput

from .compat_bt_adapter import can_return_tuple
from .configuration_bt_adapter import BTAdapterConfig
from .modeling_bt_adapter import BTAdapterModel
from .modeling_bt_adapter_branch import draw, true_first
from .modeling_bt_adapter_vision import BTAdapterVisionOutput


_SHUFFLE = 1 << 20  # the draw of shuffled frames; masks have 0, dropped paths small numbers
_STILL = 1e-4  # share of a clip's energy below which a change over time is noise


@dataclass
class BTAdapterForPreTrainingOutput(ModelOutput):
    """Output of the pretraining model.

    Args:
        loss (`torch.Tensor` of shape `()`): Weighted sum of the three losses.
        vtc_loss, mbta_loss, mbca_loss (`torch.Tensor` of shape `()`):
            The unweighted losses; `None` where the weight is 0 (video-text contrast is always computed).
        text_embeds, video_embeds (`torch.Tensor` of shape `(B, P)`): Unit-length features of this process's batch.
    """

    loss: torch.Tensor | None = None
    vtc_loss: torch.Tensor | None = None
    mbta_loss: torch.Tensor | None = None
    mbca_loss: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    video_embeds: torch.Tensor | None = None


@dataclass
class BTAdapterPreTrainingFeatures(ModelOutput):
    """What the losses are computed from, one row per video. The losses of a batch need its rows only, not its graph.

    Args:
        text (`torch.Tensor` of shape `(B, P)`): Text features, not normalised.
        video (`torch.Tensor` of shape `(B, P)`): Video features, not normalised.
        patches (`torch.Tensor` of shape `(B, P)`, *optional*): Projected mean of the kept branch patches, for MBCA.
        token_loss (`torch.Tensor` of shape `(B,)`, *optional*): MBTA of each video, a mean over its kept tokens.
        reversed, shuffled (`torch.Tensor` of shape `(B, P)`, *optional*): Features of the copies in another order.
        opposite (`torch.Tensor` of shape `(B, P)`, *optional*): Text features of the opposite captions.
        distinct (`torch.Tensor` of shape `(B, 3)`, *optional*):
            1 where the reversed copy differs from the clip, where the shuffled one does, and where the opposite
            caption is known and differs; else 0.
    """

    text: torch.Tensor | None = None
    video: torch.Tensor | None = None
    patches: torch.Tensor | None = None
    token_loss: torch.Tensor | None = None
    reversed: torch.Tensor | None = None
    shuffled: torch.Tensor | None = None
    opposite: torch.Tensor | None = None
    distinct: torch.Tensor | None = None


class BTAdapterForPreTraining(BTAdapterModel):
    """The dual encoder with the pretraining losses; only the branch and the alignment head learn."""

    _new_modules = ("bt_adapter", "mbta_head")
    _keys_to_ignore_on_load_unexpected = [r"position_ids$"]
    # The loss is a mean over the batch: Trainer must divide it by the accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, config: BTAdapterConfig):
        super().__init__(config)
        # The temperature is fixed here (`config.temperature`). As a buffer it is kept for the dual encoder and saved
        # as before, but is no parameter without dimensions, which FSDP2 cannot shard.
        logit_scale = self.logit_scale.detach()
        del self.logit_scale
        self.register_buffer("logit_scale", logit_scale)
        D, P = config.vision_config.hidden_size, config.projection_dim
        # The student's own projection W' (Eq. 7). It exists only where it learns.
        self.mbta_head = None
        if config.mbta_weight > 0:
            if config.mbta_loss == "cosine":
                self.mbta_head = nn.ModuleDict({"linear": nn.Linear(D, P), "norm": nn.LayerNorm(P, eps=1e-5)})
            else:
                self.mbta_head = nn.ModuleDict({"linear": nn.Linear(D, P, bias=False)})
        self.post_init()
        self.freeze_backbone()

    def freeze_backbone(self):
        """Leaves gradients to the branch and the alignment head only (as released)."""
        self.requires_grad_(False)
        self.vision_model.bt_adapter.requires_grad_(True)
        if self.mbta_head is not None:
            self.mbta_head.requires_grad_(True)

    def train(self, mode: bool = True):
        super().train(mode)
        if not any(p.requires_grad for p in self.text_model.parameters()):
            self.text_model.eval()
        return self

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        pixel_values_videos: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        bool_masked_pos: torch.BoolTensor | None = None,
        kept_patches: int | None = None,
        row_seeds: torch.LongTensor | None = None,
        return_loss: bool = True,
        backbone_states: dict[int, torch.Tensor] | None = None,
        opposite_input_ids: torch.LongTensor | None = None,
        opposite_attention_mask: torch.Tensor | None = None,
        has_opposite: torch.BoolTensor | None = None,
        **kwargs,
    ) -> BTAdapterForPreTrainingOutput | BTAdapterPreTrainingFeatures:
        """
        Args:
            input_ids: (B, length); text i belongs to video i.
            pixel_values_videos: (B, T, 3, H, W).
            attention_mask: (B, length).
            bool_masked_pos: bool (B, N) or (B, T*N), True = dropped from the branch. Drawn per video with
                `config.mask_ratio` when absent in training mode; nothing is dropped in evaluation mode.
            kept_patches: as [`BTAdapterVisionModel.forward`] takes it.
            row_seeds: (B,), an integer per video that says what is masked and which paths are dropped in training,
                whatever else is in the batch; drawn from torch's generator when absent.
            return_loss: False for the features that [`~BTAdapterForPreTraining.losses`] takes.
            backbone_states: in place of pixel_values_videos, see [`BTAdapterVisionModel.forward`].
            opposite_input_ids, opposite_attention_mask: (B, length), what each clip shows when it is played backwards;
                read with `config.order_negatives` in training.
            has_opposite: bool (B,), where that is known; everywhere by default.

        Raises:
            ValueError: if texts and videos are not equally many, or as the tower raises.
        """
        kwargs.pop("video_metadata", None)  # `**processor(..., return_metadata=True)` brings it along
        B = len(input_ids)
        seen = pixel_values_videos if backbone_states is None else next(iter(backbone_states.values()))
        if B != len(seen):
            raise ValueError(f"Pretraining pairs text i with video i; found {B} texts, {len(seen)} videos.")
        if self.training and row_seeds is None:
            row_seeds = torch.randint(2**32, (B,), device=seen.device)
        if bool_masked_pos is None:
            bool_masked_pos, kept_patches = self.draw_mask(seen, row_seeds)
        reads_order = self.training and self.config.order_negatives != "none"
        if reads_order and kwargs.get("frame_mask") is not None:
            raise ValueError(
                f"order_negatives={self.config.order_negatives!r} reverses whole clips: pass clips of one length, "
                "without frame_mask."
            )
        if reads_order and backbone_states is None and self.vision_model.backbone_is_frozen():
            # The copies have the same frames: the frozen backbone sees each once.
            last = self.config.vision_config.num_hidden_layers
            backbone_states = self.vision_model.encode_frames(pixel_values_videos, last)
        text = self._text(input_ids, attention_mask)

        def encode(order: torch.LongTensor | None) -> BTAdapterVisionOutput:
            output = self.vision_model(
                _in_order(pixel_values_videos, order) if backbone_states is None else None,
                backbone_states=backbone_states and {n: _in_order(x, order) for n, x in backbone_states.items()},
                bool_masked_pos=bool_masked_pos,
                kept_patches=kept_patches,
                output_branch_states=True,
                row_seeds=row_seeds,
                return_dict=True,
                **kwargs,
            )
            output.pooler_output = self.visual_projection(output.pooler_output)
            return output

        states = encode(None)
        features = BTAdapterPreTrainingFeatures(text=text, video=states.pooler_output)
        if self.config.mbca_weight > 0:
            # Eq. 8 averages projected tokens; the projection is linear, so the mean is projected instead.
            features.patches = self.visual_projection(states.branch_patches.mean(dim=(1, 2)))
        if self.mbta_head is not None:
            features.token_loss = self._token_alignment_loss(states, bool_masked_pos)
        if reads_order:
            orders = other_orders(row_seeds.to(seen.device), seen.shape[1])
            if opposite_input_ids is not None:
                features.opposite = self._text(opposite_input_ids, opposite_attention_mask)
                differs = (opposite_input_ids != input_ids).any(dim=1)
                known = torch.ones_like(differs) if has_opposite is None else has_opposite.bool()
            else:
                differs, known = torch.zeros(2, B, dtype=torch.bool, device=seen.device)
            guessed = order_is_seen(seen, orders["reversed"], slack=min(1, seen.shape[1] // 8))
            told_apart = torch.where(known, differs & order_is_seen(seen, orders["reversed"]), guessed)
            # Few frames are often shuffled into the reverse, a clip that is right for the opposite caption.
            moves = order_is_seen(seen, orders["shuffled"]) & (orders["shuffled"] != orders["reversed"]).any(dim=1)
            features.distinct = torch.stack([told_apart, moves, told_apart & known], dim=1).to(text.dtype)
            features.reversed = encode(orders["reversed"]).pooler_output
            if self.config.order_negatives == "reversed_and_shuffled":
                features.shuffled = encode(orders["shuffled"]).pooler_output
        return self.losses(features) if return_loss else features

    def _text(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.text_learns()):
            return self.get_text_features(input_ids, attention_mask=attention_mask).pooler_output

    def draw_mask(
        self, seen: torch.Tensor, row_seeds: torch.LongTensor | None
    ) -> tuple[torch.BoolTensor | None, int | None]:
        """A mask (B, N) as `config.mask_ratio` says and the patches it keeps per video; None in evaluation mode.

        Args:
            seen: videos (B, T, 3, H, W), or a state of the backbone (B, T, C+N, D).
        """
        ratio, size = self.config.mask_ratio, self.config.vision_config.patch_size
        if not self.training or ratio == 0:
            return None, None
        if seen.ndim == 5:
            N = (seen.shape[-2] // size) * (seen.shape[-1] // size)
        else:
            N = seen.shape[2] - self.vision_model.family.num_cls
        return random_tube_mask(row_seeds, N, ratio), N - int(ratio * N)

    def losses(self, features: BTAdapterPreTrainingFeatures) -> BTAdapterForPreTrainingOutput:
        """The losses of a batch; in training on several processes, the contrastive ones over the batches of all.

        The contrastive losses are computed in float32 at least, also under autocast. Token alignment is in `features`
        already, in the precision in which the forward pass was run.
        """
        config = self.config
        all_text, all_video = self._gather(features.text), self._gather(features.video)
        if features.distinct is None:
            vtc_loss = contrastive_loss(all_video, all_text, config.temperature)
        else:
            others = {
                name: self._gather(features[name]) if name in features else None
                for name in ("reversed", "shuffled", "opposite", "distinct")
            }
            vtc_loss = order_contrastive_loss(all_video, all_text, config.temperature, **others)
        loss = config.vtc_weight * vtc_loss
        mbta_loss = mbca_loss = None
        if features.patches is not None:
            mbca_loss = contrastive_loss(self._gather(features.patches), all_text, config.temperature)
            loss = loss + config.mbca_weight * mbca_loss
        if features.token_loss is not None:
            mbta_loss = features.token_loss.mean()
            loss = loss + config.mbta_weight * mbta_loss
        return BTAdapterForPreTrainingOutput(
            loss=loss,
            vtc_loss=vtc_loss,
            mbta_loss=mbta_loss,
            mbca_loss=mbca_loss,
            text_embeds=nn.functional.normalize(features.text, dim=-1),
            video_embeds=nn.functional.normalize(features.video, dim=-1),
        )

    def text_learns(self) -> bool:
        """Whether the text features carry a gradient; not unless the text tower was taken out of its freeze."""
        return any(p.requires_grad for m in (self.text_model, self.text_projection) for p in m.parameters())

    def _token_alignment_loss(
        self, states: BTAdapterVisionOutput, bool_masked_pos: torch.Tensor | None
    ) -> torch.Tensor:
        """MBTA of each video (B,), Eq. 7: kept branch tokens against the backbone's of the same frame and patch."""
        tower = self.vision_model
        num_cls = tower.family.num_cls
        student = states.branch_patches.transpose(1, 2).flatten(1, 2)  # (B, tokens, D), patch-major
        with torch.no_grad():
            if self.config.mbta_pairing == "released" and bool_masked_pos is not None:
                index = self._frame_major_index(states, bool_masked_pos)
            else:
                index = states.branch_index
            if index is None:
                teacher = states.backbone_state[:, :, num_cls:].transpose(1, 2).flatten(1, 2)
            else:
                teacher = tower.bt_adapter._take(states.backbone_state, index).transpose(1, 2).flatten(1, 2)
            # As released, the teacher is normalised like a pooled CLS; Eq. 7 projects the tokens as they are.
            if self.config.mbta_loss == "cosine":
                teacher = tower.vision_model.post_layernorm(teacher)
            teacher = self.visual_projection(teacher)
        student = self.mbta_head["linear"](student)
        if self.config.mbta_loss == "mse":
            return (teacher - student).square().sum(dim=-1).mean(dim=1)
        student = self.mbta_head["norm"](student)
        return (2 - 2 * nn.functional.cosine_similarity(teacher, student, dim=-1)).mean(dim=1)

    def _frame_major_index(self, states: BTAdapterVisionOutput, masked: torch.Tensor) -> torch.LongTensor:
        """The order in which the released code lists the teacher's tokens; see `mbta_pairing`."""
        B, T, S, _ = states.backbone_state.shape
        N = S - self.vision_model.family.num_cls
        kept = ~masked.to(states.backbone_state.device, torch.bool).view(B, -1, N).expand(B, T, N).flatten(1)
        index = true_first(kept)[:, : states.branch_index[0].numel()]
        return index.view(B, -1, states.branch_index.shape[1]).transpose(1, 2)

    def _gather(self, features: torch.Tensor) -> torch.Tensor:
        """(B, P) -> (world * B, P) in rank order, in training on several processes."""
        if not (self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return features
        return _GatherWithGradient.apply(features, self.config.gather_gradient == "global")


class _GatherWithGradient(torch.autograd.Function):
    """All-gather whose backward sums the gradients of all processes.

    Every process computes the loss of the global batch, so the sum is `world` times the gradient with respect to its
    own features, and the average that DDP takes of the parameters' gradients is the gradient of that loss exactly.
    The released code does not sum, which leaves 1/world of it.
    """

    @staticmethod
    def forward(ctx, features: torch.Tensor, sum_gradients: bool) -> torch.Tensor:
        ctx.sum_gradients, ctx.rows = sum_gradients, features.shape[0]
        parts = [torch.empty_like(features) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, features.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradient.contiguous()
        if ctx.sum_gradients:
            dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.rows
        return gradient[start : start + ctx.rows], None


def contrastive_loss(x: torch.Tensor, y: torch.Tensor, temperature: float) -> torch.Tensor:
    """Both directions of paper Eq. 6, summed: (B, P), (B, P) -> (). Row i of one belongs to row i of the other.

    In float32 at least, whatever the autocast: divided by a small temperature, half precision leaves no digits.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        x = nn.functional.normalize(x.to(dtype), dim=-1, eps=1e-8)
        y = nn.functional.normalize(y.to(dtype), dim=-1, eps=1e-8)
        logits = x @ y.t() / temperature
    target = torch.arange(len(logits), device=logits.device)
    return nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.t(), target)


def order_contrastive_loss(
    video: torch.Tensor,
    text: torch.Tensor,
    temperature: float,
    reversed: torch.Tensor,
    shuffled: torch.Tensor | None,
    opposite: torch.Tensor | None,
    distinct: torch.Tensor,
) -> torch.Tensor:
    """`contrastive_loss` with copies of each clip in another order, and opposite captions, among what is wrong.

    A reversed clip and its opposite caption are a pair of their own where that caption is known; else the copy is
    only a wrong clip for all texts, as a shuffled copy always is. A copy that does not differ from its clip, and the
    opposite of what is its own reverse, are left out.

    Args:
        video, text, reversed, shuffled, opposite: (B, P) each.
        distinct: (B, 3), see [`BTAdapterPreTrainingFeatures`].
    """
    dtype = torch.promote_types(video.dtype, torch.float32)
    usable, moves, paired = distinct.detach().bool().unbind(dim=1)
    all_true = torch.ones_like(usable)
    videos, seen = [video, reversed], [all_true, usable]
    if shuffled is not None:
        videos, seen = [*videos, shuffled], [*seen, moves]
    texts, said = ([text], [all_true]) if opposite is None else ([text, opposite], [all_true, paired])
    with torch.autocast(video.device.type, enabled=False):
        x, y = (nn.functional.normalize(torch.cat(z).to(dtype), dim=-1, eps=1e-8) for z in (videos, texts))
        logits = x @ y.t() / temperature
    logits = logits.masked_fill(~torch.cat(seen)[:, None] | ~torch.cat(said), torch.finfo(dtype).min)
    rows = len(y)  # of the pairs: clips with captions, then reversed clips with opposite captions
    target = torch.arange(rows, device=logits.device).masked_fill(~torch.cat(said), -100)
    return nn.functional.cross_entropy(logits[:rows], target) + nn.functional.cross_entropy(logits.t(), target)


def other_orders(row_seeds: torch.LongTensor, T: int) -> dict[str, torch.LongTensor]:
    """(B,) -> {name: (B, T)}, frames by number: backwards, and in an order that the seed of each video says."""
    backwards = torch.arange(T - 1, -1, -1, device=row_seeds.device).expand(len(row_seeds), T)
    return {"reversed": backwards, "shuffled": draw(row_seeds, _SHUFFLE, T).argsort(dim=1, stable=True)}


def order_is_seen(x: torch.Tensor, order: torch.LongTensor, slack: int = 0) -> torch.BoolTensor:
    """Whether each video (B, T, ...) looks different in another order (B, T) of its frames: (B,).

    Two frames that have nothing to do with each other differ by twice the variance over time, on average. A movement
    there and back again differs from its reverse by far less, and then the two cannot be told apart; nor can any order
    of frames that hardly change at all.

    With `slack` a frame may also look like one that so many places away: of frames that are drawn at random times,
    those of the way back are not quite those of the way there.
    """
    x = x.detach().flatten(2).float()
    variance = (x - x.mean(dim=1, keepdim=True)).square().mean(dim=(1, 2))
    other, places = _in_order(x, order), torch.arange(x.shape[1], device=x.device)
    beside = [(places + k).clamp(0, len(places) - 1) for k in range(-slack, slack + 1)]
    difference = torch.stack([(x[:, near] - other).square().mean(dim=2) for near in beside]).amin(dim=0).mean(dim=1)
    return (difference > variance) & (variance > _STILL * x.square().mean(dim=(1, 2)))


def _in_order(x: torch.Tensor, order: torch.LongTensor | None) -> torch.Tensor:
    """(B, T, ...), (B, T) -> (B, T, ...)"""
    return x if order is None else x[torch.arange(len(x), device=x.device)[:, None], order]


def random_tube_mask(row_seeds: torch.LongTensor, num_patches: int, ratio: float) -> torch.BoolTensor:
    """(B,) -> (B, N), True = dropped: `int(ratio * N)` patches, by the seed of each video, dropped from all frames."""
    dropped = draw(row_seeds, 0, num_patches).argsort(dim=1, stable=True)[:, : int(ratio * num_patches)]
    masked = torch.zeros(len(row_seeds), num_patches, dtype=torch.bool, device=row_seeds.device)
    return masked.scatter_(1, dropped, True)
