"""`Trainer` for pretraining the branch: each loss in the log, and recall."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import EvalPrediction

from ..evaluation.controls import control_features, control_metrics
from ..evaluation.retrieval import retrieval_metrics
from ..models.configuration_bt_adapter import BTAdapterVisionConfig
from ..models.modeling_bt_adapter_branch import hashed
from ..models.modeling_bt_adapter_pretraining import BTAdapterForPreTrainingOutput
from .arguments import BTAdapterTrainingArguments
from .cached_gradients import cached_gradient_step
from .compat import set_sync_gradients
from .resumable import ResumableTrainer
from .sharding import unsharded
from .trained_frames import vary_frames


# Of the output folder, with the branch alone
ADAPTER_FOLDER = "adapter"
LOSSES = ("vtc_loss", "mbta_loss", "mbca_loss")


class BTAdapterTrainer(ResumableTrainer):
    """Pretrains a `BTAdapterForPreTraining` on the batches of `PairCollator`.

    What it does beyond `ResumableTrainer`:

    - logs each loss (`vtc_loss`, `mbta_loss`, `mbca_loss`), averaged over the logging window and all processes, and of
      how many clips the opposite caption was known (`known_opposites`, 0-1), where the batches say;
    - evaluates recall in both directions (`eval_t2v_R1`, ..., see `retrieval_metrics`) over the features of all
      processes, and again under the temporal controls (`eval_shuffled_t2v_R1`, `eval_reversed_t2v_R1`, ...).
      `eval_loss` is the loss of the unmasked model, over evaluation batches;
    - `save_model()` writes the branch alone, too, as an adapter for chat models, into the folder `adapter`;
    - draws what is masked, and which paths are dropped, by `args.seed` and the position of the row in the order of the
      data: the same on one process as on several;
    - with `args.frame_counts`, trains on one of several numbers of frames in each step;
    - with `args.cached_gradient_batch_size`, takes the gradient of a large batch a few clips at a time.

    Runs on one process or several, with DDP, FSDP2 or DeepSpeed's ZeRO-2 (`torchrun`, `accelerate launch`). Pass the
    `BTAdapterProcessor` as `processing_class`.
    """

    args: BTAdapterTrainingArguments

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        config = self.model.config
        contrasts = config.vtc_weight > 0 or config.mbca_weight > 0
        if contrasts and self.args.per_device_train_batch_size * self.args.world_size == 1:
            raise ValueError(
                "per_device_train_batch_size=1 on one process leaves nothing to contrast: each clip is compared with "
                "the texts of its own step, and of a single one the losses are 0, whatever the model says. Take at "
                "least 2 (the released batch was 8 x 52); what does not fit into memory does with "
                "cached_gradient_batch_size."
            )
        # The loss is a mean over the batch, so Trainer has to divide it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        if self.compute_metrics is None:
            self.compute_metrics = self._compute_recall
        counts = self.args.frame_counts
        if counts is not None and self.train_dataset is not None and max(counts) > self.train_dataset.num_frames:
            raise ValueError(
                f"frame_counts={counts} asks for more frames than the {self.train_dataset.num_frames} per clip that "
                "the data set gives: set its num_frames to the largest."
            )
        if config.order_negatives != "none":
            self._check_order_negatives()
        self._loss_sums: dict[str, torch.Tensor] = {}
        self._loss_batches = 0
        self._shuffling = torch.Generator()

    def _check_order_negatives(self) -> None:
        """Copies in other orders are part of the video-text contrast, of several frames."""
        told = f"order_negatives={self.model.config.order_negatives!r}"
        if self.model.config.vtc_weight == 0:
            raise ValueError(
                f"{told} is a part of the video-text contrast, which vtc_weight=0 leaves out, and has no effect. "
                "Set vtc_weight above 0, or order_negatives='none'."
            )
        if self.train_dataset is not None and (T := self.train_dataset.num_frames) < 2:
            raise ValueError(
                f"{told} contrasts the orders of frames, and the data set gives {T} per clip: it would have no "
                "effect. Set num_frames to 2 or more, or order_negatives='none'."
            )

    # Losses

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.args.cached_gradient_batch_size is None:
            return super().training_step(model, inputs, num_items_in_batch)
        self.begin_batch()
        model.train()
        inputs = self._model_inputs(self._prepare_inputs(inputs), "train")
        # Both are divided by the accumulated batches here already; DeepSpeed would do it once more.
        options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        outputs = cached_gradient_step(
            model,
            inputs,
            self.args.cached_gradient_batch_size,
            backward=partial(self.accelerator.backward, **options),
            no_sync=partial(self._no_sync, model),
            bare=self.accelerator.unwrap_model(model),
            scale=1 / self.current_gradient_accumulation_steps,
        )
        self._note_losses(outputs)
        return outputs.loss / self.current_gradient_accumulation_steps

    @contextmanager
    def _no_sync(self, model: torch.nn.Module) -> Iterator[None]:
        state = self.accelerator.gradient_state
        sync_gradients = state.sync_gradients
        set_sync_gradients(state, False)  # DeepSpeed takes its optimizer step in a backward pass unless told so
        with self.accelerator.no_sync(model):
            yield
        set_sync_gradients(state, sync_gradients)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**self._model_inputs(inputs, "train" if model.training else "eval"))
        if model.training:
            self._note_losses(outputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _model_inputs(self, inputs: dict[str, Any], part: str) -> dict[str, Any]:
        """What of a batch the model takes, with the seeds of a training batch; its broken items are noted."""
        inputs = {name: value for name, value in inputs.items() if name != "pair_ids"}
        rows = len(inputs["input_ids"])
        self.take_broken(inputs, rows, part)
        if part == "train":
            if "has_opposite" in inputs:  # of a file of opposites that fits no caption the run would say nothing
                self._note("known_opposites", inputs["has_opposite"])
            inputs["row_seeds"] = hashed(self.args.seed, self.positions(rows)).to(inputs["input_ids"].device)
            if self.args.frame_counts is not None:
                chosen = partial(
                    vary_frames, choices=self.args.frame_counts, seed=self.args.seed, step=self.state.global_step
                )
                if "backbone_states" in inputs:
                    inputs["backbone_states"] = {n: chosen(x) for n, x in inputs["backbone_states"].items()}
                else:
                    inputs["pixel_values_videos"] = chosen(inputs["pixel_values_videos"])
        return inputs

    def _note_losses(self, outputs: BTAdapterForPreTrainingOutput) -> None:
        for name in LOSSES:
            if outputs.get(name) is not None:
                self._note(name, outputs[name])
        self._loss_batches += 1

    def _note(self, name: str, value: torch.Tensor) -> None:
        self._loss_sums[name] = self._loss_sums.get(name, 0) + value.detach().float().mean()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._loss_batches:  # the end of a logging window, on every process
            means = torch.stack(list(self._loss_sums.values())) / self._loss_batches
            means = self.accelerator.reduce(means, reduction="mean").tolist()
            logs |= dict(zip(self._loss_sums, means, strict=True))
            self._loss_sums, self._loss_batches = {}, 0
        super().log(logs, start_time)

    # What is written

    def _adapter_modules(self) -> list[str] | None:
        """None for a baseline: another branch than a BT-Adapter's, or none, is no adapter."""
        return [] if self.model.config.vision_config.model_type == BTAdapterVisionConfig.model_type else None

    def _write_result(self, folder: Path, rehearsal: bool = False) -> None:
        super()._write_result(folder, rehearsal)
        if self._adapter_modules() is not None:
            self._write_adapter(folder / ADAPTER_FOLDER)

    # Evaluation

    def evaluation_loop(self, dataloader, *args, **kwargs):
        self._shuffling.manual_seed(self.args.seed + self.args.process_index)
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        bare = self.accelerator.unwrap_model(model)

        def encode_videos(videos, frame_mask):
            return bare.get_video_features(pixel_values_videos=videos, frame_mask=frame_mask).pooler_output

        def encode_images(images):
            return bare.get_image_features(pixel_values=images).pooler_output

        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            if prediction_loss_only:
                return loss.detach().mean(), None, None
            features = {"text": outputs["text_embeds"], "video": outputs["video_embeds"]}
            with self.accelerator.autocast(), unsharded(bare):
                controls = control_features(
                    encode_videos,
                    inputs["pixel_values_videos"],
                    inputs.get("frame_mask"),
                    controls=self.args.eval_controls,
                    encode_images=encode_images,
                    draws=self.args.eval_shuffle_draws,
                    generator=self._shuffling,
                )
                features.update((name, values.float()) for name, values in controls)
        return loss.detach().mean(), features, inputs["pair_ids"]

    @staticmethod
    def _compute_recall(prediction: EvalPrediction) -> dict[str, float]:
        ids = prediction.label_ids
        kept = ids >= 0  # -1: the item stands in for a broken one
        if not kept.any():
            raise ValueError(f"All {len(ids)} validation items are broken: there is nothing to evaluate.")
        features = {name: values[kept] for name, values in prediction.predictions.items()}
        ids = ids[kept]
        text, video = features.pop("text"), features.pop("video")
        controls = control_metrics(text, features, ids, ids)
        return {
            **retrieval_metrics(text, video, ids, ids),
            **{name: value for name, value in controls.items() if name.endswith("_R1")},
            "pairs": len(ids),
        }
