"""`Trainer` for pretraining the branch: learning rates per part, each loss in the log, recall, small checkpoints."""

import logging
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalPrediction, has_length

from ..data.broken import BrokenItem, BrokenItemsLog
from ..evaluation.controls import control_features, control_metrics
from ..evaluation.retrieval import retrieval_metrics
from .arguments import BTAdapterTrainingArguments
from .checkpoint import last_checkpoint, load_trained, save_trained


logger = logging.getLogger(__name__)

LOSSES = ("vtc_loss", "mbta_loss", "mbca_loss")


def lr_multiplier(name: str, multipliers: dict[str, float]) -> float:
    """The factor of the longest key of `multipliers` that occurs in the parameter's name (`*`: anything but a dot)."""
    matching = [key for key in multipliers if re.search(re.escape(key).replace(r"\*", "[^.]*"), name)]
    return multipliers[max(matching, key=len)] if matching else 1.0


def parameter_groups(model: nn.Module, args: BTAdapterTrainingArguments) -> list[dict[str, Any]]:
    """One optimizer group per learning rate over the trainable parameters, slowest first; weight decay on all of them.

    Raises:
        ValueError: if nothing is trainable.
    """
    by_factor: dict[float, list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_factor[lr_multiplier(name, args.lr_multipliers)].append((name, parameter))
    if not by_factor:
        raise ValueError("The model has no trainable parameter: every requires_grad is False.")
    groups = []
    for factor, named in sorted(by_factor.items(), key=lambda item: item[0]):
        lr = args.learning_rate * factor
        count = sum(parameter.numel() for _, parameter in named)
        logger.info("Learning rate %g (x%g), %d values: %s", lr, factor, count, ", ".join(name for name, _ in named))
        groups.append({"params": [parameter for _, parameter in named], "lr": lr, "weight_decay": args.weight_decay})
    return groups


class BTAdapterTrainer(Trainer):
    """Pretrains a `BTAdapterForPreTraining` on the batches of `PairCollator`.

    What it does beyond `Trainer`:

    - learning rates per part of the model, by `args.lr_multipliers`;
    - logs each loss (`vtc_loss`, `mbta_loss`, `mbca_loss`), averaged over the logging window and all processes;
    - evaluates recall in both directions (`eval_t2v_R1`, ..., see `retrieval_metrics`) over the features of all
      processes, and again under the temporal controls (`eval_shuffled_t2v_R1`, `eval_reversed_t2v_R1`, ...).
      `eval_loss` is the loss of the unmasked model, over evaluation batches;
    - checkpoints hold only what is trained, and resume continues with the same losses as an uninterrupted run;
      `save_model()` writes the full model and the processor;
    - broken items are counted, listed in `output_dir/broken_items.jsonl` (`broken_items-rank1.jsonl`, ... of further
      processes) and stop the run at `args.max_broken`.

    Runs on one process or several with DDP (`torchrun`, `accelerate launch`). Pass the `BTAdapterProcessor` as
    `processing_class`.

    Raises:
        ValueError: for FSDP or DeepSpeed, whose checkpoints it does not write.
    """

    args: BTAdapterTrainingArguments

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("BTAdapterTrainer runs with DDP or on one process; FSDP and DeepSpeed are not supported.")
        if self.args.device.type == "cpu":
            self.args.dataloader_pin_memory = False  # torch warns in every epoch that there is nothing to pin for
        # The loss is a mean over the batch, so Trainer has to divide it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        if self.compute_metrics is None:
            self.compute_metrics = self._compute_recall
        self.add_callback(_SetEpoch(self.train_dataset))
        self._loss_sums: dict[str, torch.Tensor] = {}
        self._loss_batches = 0
        self._broken_logs: dict[str, BrokenItemsLog] = {}
        self._shuffling = torch.Generator()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            cls, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)
            if not isinstance(cls, type) or not issubclass(cls, torch.optim.Optimizer) or "params" in kwargs:
                raise ValueError(f"optim={self.args.optim!r} makes its own parameter groups; use one that takes ours.")
            self.optimizer = cls(parameter_groups(model, self.args), **kwargs)
        return self.optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As `Trainer.train`; `resume_from_checkpoint=True` takes the newest checkpoint written to its end."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir} holds no complete checkpoint to resume from.")
        if not resume_from_checkpoint:
            self._broken_list.unlink(missing_ok=True)  # of another run in this folder
        # Trainer.train writes the special tokens of its processing_class over those of the text config. A CLIP text
        # tower pools by `eos_token_id`, where 2 stands for its original rule: the saved model would pool otherwise.
        processing_class, self.processing_class = self.processing_class, None
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self.processing_class = processing_class

    def _get_dataloader(self, *args, is_training: bool = False, **kwargs):
        # Trainer would drop the last batch of the validation set too.
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def set_initial_training_values(self, args, dataloader):
        if has_length(dataloader) and len(dataloader) == 0:
            raise ValueError(
                f"An epoch yields no batch: the training table has {self.num_examples(dataloader)} items and a batch "
                f"{args.train_batch_size * args.world_size}, with dataloader_drop_last={args.dataloader_drop_last}."
            )
        return super().set_initial_training_values(args, dataloader)

    # Losses

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        inputs.pop("pair_ids", None)
        self._note_broken("train" if model.training else "eval", inputs.pop("broken", []), len(inputs["input_ids"]))
        outputs = model(**inputs)
        if model.training:
            for name in LOSSES:
                if outputs.get(name) is not None:
                    self._loss_sums[name] = self._loss_sums.get(name, 0) + outputs[name].detach().float().mean()
            self._loss_batches += 1
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._loss_batches:  # the end of a logging window, on every process
            means = torch.stack(list(self._loss_sums.values())) / self._loss_batches
            means = self.accelerator.reduce(means, reduction="mean").tolist()
            logs |= dict(zip(self._loss_sums, means, strict=True))
            self._loss_sums, self._loss_batches = {}, 0
        super().log(logs, start_time)

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
            with self.accelerator.autocast():
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

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the full model and the processor, for `from_pretrained`.

        `Trainer` comes here for its checkpoints as well (an internal call with a folder): those get only what is
        trained.
        """
        is_checkpoint = _internal_call and output_dir is not None
        output_dir = output_dir or self.args.output_dir
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self.args.should_save:
            if is_checkpoint:
                save_trained(model, output_dir)
            else:
                model.save_pretrained(output_dir)
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.accelerator.unwrap_model(self.model if model is None else model), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        logger.info("Loading the best checkpoint, %s.", self.state.best_model_checkpoint)
        load_trained(self.accelerator.unwrap_model(self.model), self.state.best_model_checkpoint)

    # Broken items

    def _note_broken(self, part: str, records: list[BrokenItem], seen: int) -> None:
        if part not in self._broken_logs:
            dataset = self.train_dataset if part == "train" else self.callback_handler.eval_dataloader.dataset
            steps = self.state.global_step * self.args.gradient_accumulation_steps
            self._broken_logs[part] = BrokenItemsLog(
                self._broken_list,
                part,
                items=len(dataset),
                max_broken=self.args.max_broken,
                seen=steps * self.args.per_device_train_batch_size if part == "train" else 0,
            )
        self._broken_logs[part].add(records, seen)

    @property
    def _broken_list(self) -> Path:
        rank = f"-rank{self.args.process_index}" if self.args.process_index else ""
        return Path(self.args.output_dir) / f"broken_items{rank}.jsonl"

    @property
    def broken_items(self) -> dict[str, int]:
        """Distinct broken items this process has met, by part (`train`, `eval`)."""
        return {part: len(log.broken) for part, log in self._broken_logs.items()}


class _SetEpoch(TrainerCallback):
    """Tells the data set its epoch: accelerate does so only on one process, and not in a resumed epoch."""

    def __init__(self, train_dataset: Any):
        self.train_dataset = train_dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        if hasattr(self.train_dataset, "set_epoch"):
            self.train_dataset.set_epoch(int(state.epoch))
