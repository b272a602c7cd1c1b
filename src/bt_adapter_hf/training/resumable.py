"""`Trainer` that resumes exactly: one order of the data, small checkpoints, learning rates per part, broken items."""

import logging
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging as transformers_logging

from ..adapters.files import AdapterConfig, write_adapter
from ..adapters.host_modules import find_tower, is_peft_model
from ..adapters.verbs import describe_adapter
from ..data.broken import BrokenItemsLog
from ..data.chunk_store import discard
from ..data.order import EpochOrder, OrderSampler
from ..hub.machine import available_cores, torch_threads
from ..models.modeling_bt_adapter_branch import hashed
from .arguments import RELEASED_LR_MULTIPLIERS, ResumableArguments
from .checkpoint import (
    DataState,
    is_complete,
    last_checkpoint,
    load_data_state,
    load_trained,
    save_data_state,
    save_trained,
)
from .compat import TRAINER_STATE_NAME
from .configuration import check_configuration, configuration_of
from .hub_push import HubPushMixin
from .observability import ObservabilityMixin
from .sharding import check_optimizer_state, check_sharding, save_sharded_optimizer, whole, whole_state
from .trained_frames import record_trained_frames


logger = logging.getLogger(__name__)


def warn_of_warmup(args: ResumableArguments, steps: int) -> None:
    """A share of few steps is rounded up to a whole one, and the first step of a warm-up has the rate 0."""
    warmup = args.get_warmup_steps(steps)
    if 0 < steps <= warmup and args.lr_scheduler_type != "constant":
        logger.warning(
            "All %d steps of the run lie in its warm-up (of %d), so that the learning rate stays below its peak%s. "
            "Train longer, or set warmup_steps=0 (--set warmup_steps=0).",
            *(steps, warmup, ": it is 0, and nothing is learned" if steps == 1 else ""),
        )


def lr_multiplier(name: str, multipliers: dict[str, float]) -> float:
    """The factor of the longest key of `multipliers` that occurs in the parameter's name (`*`: anything but a dot)."""
    matching = [key for key in multipliers if occurs(key, name)]
    return multipliers[max(matching, key=len)] if matching else 1.0


def occurs(key: str, name: str) -> bool:
    return re.search(re.escape(key).replace(r"\*", "[^.]*"), name) is not None


def check_multipliers(model: nn.Module, multipliers: dict[str, float]) -> None:
    """A misspelt one would do nothing. The released ones are for parts that not every branch has."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for key in multipliers.keys() - RELEASED_LR_MULTIPLIERS.keys():
        if trained and not any(occurs(key, name) for name in trained):
            parts = sorted({".".join(name.split(".")[:2]) for name in trained})
            raise ValueError(
                f"lr_multipliers: {key!r} occurs in the name of no parameter that is trained. Their names begin with "
                f"{', '.join(parts[:5])}; one is {trained[0]}."
            )


def parameter_groups(model: nn.Module, args: ResumableArguments) -> list[dict[str, Any]]:
    """One optimizer group per learning rate over the trainable parameters, slowest first; weight decay on all of them.

    Raises:
        ValueError: if nothing is trainable, or a multiplier of none of the released parts is of nothing trainable.
    """
    check_multipliers(model, args.lr_multipliers)
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


class ResumableTrainer(ObservabilityMixin, HubPushMixin, Trainer):
    """What pretraining and instruction tuning share beyond `Trainer`.

    **Order.** The rows of the training table come in the order of an `EpochOrder` with `args.data_seed` (or
    `args.seed`) and `args.chunk_rows`, in one sequence over all epochs: a batch may hold the last rows of one epoch
    and the first of the next, every batch is full, and every row comes once per epoch. A run over `num_train_epochs`
    takes as many whole steps as there are rows for; with `dataloader_drop_last=False` one more, filled up with rows
    of a further epoch. `state.epoch` is the number of rows trained on, over the rows of the table; what should happen
    at the end of an epoch (strategy "epoch", `on_epoch_end` of a callback) happens after the step that completes it.

    **Resume.** A checkpoint holds only what is trained, and the position in that order. A resumed run goes on at that
    position with the same losses as an uninterrupted one, and reads nothing before it. The number of processes and the
    batch size may change: the order stays, and the number of steps to come is computed anew, over which the schedule
    goes on from the step it was at. What the model, LoRA and the preparation of videos are configured as may not.
    `save_model()` writes the full model and the processor.

    **Chance** in a step (dropout, stochastic depth) is a function of `args.seed` and of the position of the batch in
    that order: it differs between processes, and a resumed run draws what an uninterrupted one does.

    **Time embeddings.** Where the tower's config does not say yet which rows of the table are trained, it does now.

    **Broken items** are counted, listed in `output_dir/broken_items.jsonl` (`broken_items-rank1.jsonl`, ... of further
    processes) and stop the run at `args.max_broken`: a subclass calls `take_broken` in `compute_loss`.

    **Learning rates** per part of the model, by `args.lr_multipliers`.

    **The log** says more, see `ObservabilityMixin`.

    The training data set is map-style: `dataset[epoch, row]` is an item, a function of that pair and of `dataset.seed`
    alone; `dataset.table` is its `PairTable`, `dataset.num_frames` the frames per video, `dataset.item_timeout` the
    seconds that fetching one video may take.

    Raises:
        ValueError: for arguments that ask for another order, and for one process on several GPUs.
    """

    args: ResumableArguments

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs are visible to one process, which would take them by nn.DataParallel. That "
                f"is not supported: start one process for each (torchrun --nproc-per-node {self.args.n_gpu} ...), or "
                "choose one GPU (--device cuda:0, or CUDA_VISIBLE_DEVICES=0 before Python starts)."
            )
        check_sharding(self.accelerator, self.model)
        accelerator_config = self.args.accelerator_config
        unsupported = {
            "train_sampling_strategy": (self.args.train_sampling_strategy, "random"),
            "ignore_data_skip": (self.args.ignore_data_skip, False),
            "accelerator_config.split_batches": (accelerator_config.split_batches, False),
            "accelerator_config.dispatch_batches": (accelerator_config.dispatch_batches or False, False),
        }
        for name, (value, expected) in unsupported.items():
            if value != expected:
                raise ValueError(f"{name}={value!r} would change the order of the data; leave it at {expected!r}.")
        if self.args.device.type == "cpu":
            self.args.dataloader_pin_memory = False  # torch warns in every epoch that there is nothing to pin for
        self._start = DataState(consumed=0, steps=0, processes=self.args.world_size, data={})
        self._epoch = 0  # of the table, as told to callbacks
        self._epoch_ended_at = -1  # the step after which they were last told of an end
        self._evaluated = 0  # batches of this evaluation
        self._batches = (-1, 0)  # the step that is being taken, and how many of its accumulated batches have begun
        self._broken_logs: dict[str, BrokenItemsLog] = {}
        self._adapter_config: AdapterConfig | None = None
        self._configuration: dict[str, Any] | None = None  # once training begins
        # First of all callbacks, so that the others see the epoch.
        self.callback_handler.callbacks.insert(0, _Progress(self))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            cls, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)
            if not isinstance(cls, type) or not issubclass(cls, torch.optim.Optimizer) or "params" in kwargs:
                raise ValueError(f"optim={self.args.optim!r} makes its own parameter groups; use one that takes ours.")
            self.optimizer = cls(parameter_groups(model, self.args), **kwargs)
        return self.optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As `Trainer.train`; `resume_from_checkpoint=True` takes the newest checkpoint written to its end.

        Raises:
            ValueError: for a checkpoint that is not complete, or of another run; for a table with fewer rows than a
                batch.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir} holds no complete checkpoint to resume from.")
        num_frames = self.train_dataset.num_frames
        self._configuration = configuration_of(self.model, self.processing_class, num_frames)
        if resume_from_checkpoint:
            self._start = load_data_state(resume_from_checkpoint, self._data())
            if not is_complete(resume_from_checkpoint):
                raise ValueError(f"{resume_from_checkpoint} was not written to its end: use an earlier checkpoint.")
            check_optimizer_state(self.accelerator, resume_from_checkpoint)
            check_configuration(resume_from_checkpoint, self._configuration)
        else:
            self._start = DataState(consumed=0, steps=0, processes=self.args.world_size, data={})
            self._broken_list.unlink(missing_ok=True)  # of another run in this folder
        # Trainer.train writes the special tokens of its processing_class over those of the text config. A CLIP text
        # tower pools by `eos_token_id`, where 2 stands for its original rule: the saved model would pool otherwise.
        processing_class, self.processing_class = self.processing_class, None
        record_trained_frames(self.model, num_frames)
        if self._adapter_modules() is not None:
            self._adapter_config = describe_adapter(self.model)  # while all weights are here, whole
        start = self._start.consumed
        stop = start + self._remaining_steps() * self._step_rows
        try:
            with self._fetching(self.train_dataset, "train", self._order(), start, stop), self._cores():
                return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        finally:
            self.processing_class = processing_class
            if self.accelerator.is_local_main_process:
                self._discard_store("eval")

    def evaluate(self, *args, **kwargs):
        with self._cores():
            return super().evaluate(*args, **kwargs)

    def _cores(self) -> AbstractContextManager[None]:
        """Torch computes with what the loader's workers leave of the cores."""
        return torch_threads(available_cores() - self.args.dataloader_num_workers)

    # Order. Trainer sees one epoch, as long as what remains of the run.

    @property
    def consumed(self) -> int:
        """Rows trained on by all processes."""
        return self._consumed_after(self.state.global_step)

    def _consumed_after(self, steps: int) -> int:
        return self._start.consumed + (steps - self._start.steps) * self._step_rows

    @property
    def _step_rows(self) -> int:
        """Rows of one optimizer step: all processes, all accumulated batches."""
        return self.get_total_train_batch_size(self.args)

    @property
    def _order_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _order(self) -> EpochOrder:
        return EpochOrder(self.train_dataset.table.shard_rows, self._order_seed, self.args.chunk_rows)

    def _data(self) -> dict[str, Any]:
        """What makes the order and the items, for the checkpoint."""
        table = self.train_dataset.table
        return {
            "source": str(table.source),
            "fingerprint": table.fingerprint,
            "rows": len(table),
            "shards": len(table.shard_rows),
            "order_seed": self._order_seed,
            "item_seed": self.train_dataset.seed,
            "chunk_rows": self.args.chunk_rows,
        }

    def _remaining_steps(self) -> int:
        if self.args.max_steps > 0:
            return max(0, self.args.max_steps - self._start.steps)
        rows = int(self.args.num_train_epochs * len(self.train_dataset)) - self._start.consumed
        steps = rows // self._step_rows if self.args.dataloader_drop_last else math.ceil(rows / self._step_rows)
        return max(0, steps)

    def _get_train_sampler(self, train_dataset=None) -> OrderSampler:
        return OrderSampler(self._order(), self._start.consumed, self._remaining_steps() * self._step_rows)

    def _get_dataloader(self, *args, **kwargs):
        # Trainer would drop the last batch of the validation set too; the training order ends with a whole batch.
        # Workers that outlive an evaluation would read from a store that is closed; training starts its own but once.
        for_all = {"dataloader_drop_last": False, "dataloader_persistent_workers": False}
        given = {name: getattr(self.args, name) for name in for_all}
        vars(self.args).update(for_all)
        try:
            loader = super()._get_dataloader(*args, **kwargs)
        finally:
            vars(self.args).update(given)
        # A generator of its own: a loader draws from torch's when it starts, which a resumed run does once more.
        loader.base_dataloader.generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def _store_folder(self, name: str) -> Path:
        # of each node one, told apart where they share the output folder
        node = self.args.process_index - self.args.local_process_index
        return Path(self.args.output_dir) / "chunks" / f"{name}-{node}"

    def _discard_store(self, name: str) -> None:
        folder = self._store_folder(name)
        discard(folder)
        with suppress(OSError):  # not there, or another store is in it
            folder.parent.rmdir()

    @contextmanager
    def _fetching(
        self, dataset, name: str, order: EpochOrder | None = None, position: int = 0, stop: int | None = None
    ) -> Iterator[None]:
        """While rows are read: a table that is not on the disk is fetched, within `args.max_disk`, ahead of them."""
        table = dataset.table
        if not table.needs_store:
            yield
            return
        if order is not None and self._step_rows > self.args.chunk_rows:
            raise ValueError(
                f"A step takes {self._step_rows} rows, more than chunk_rows={self.args.chunk_rows}, which are fetched "
                f"together: set chunk_rows to at least {self._step_rows}."
            )
        outer = table.store  # of the training on a table that is evaluated too
        with self.accelerator.local_main_process_first():
            is_main = self.accelerator.is_local_main_process
            folder = self._store_folder(name)
            limit = dataset.item_timeout
            store = table.use_store(folder, self.args.max_disk, order, position, stop, is_main, limit)
        try:
            yield
        finally:
            table.store = outer
            store.close(keep=True)
            # an evaluation in training leaves what there was room for to the next one
            if is_main and not (name == "eval" and self.is_in_train):
                self._discard_store(name)

    def evaluation_loop(self, dataloader, *args, **kwargs):
        self._evaluated = 0
        dataset = dataloader.dataset
        with self._fetching(dataset, "eval", stop=len(dataset.table)):
            return super().evaluation_loop(dataloader, *args, **kwargs)

    def set_initial_training_values(self, args, dataloader):
        rows, accumulated = len(self.train_dataset), args.gradient_accumulation_steps
        batch = self._step_rows // accumulated
        if rows < batch:
            raise ValueError(
                f"The training table has {rows} rows, fewer than one batch over all processes ({batch}): "
                "give a smaller per_device_train_batch_size, or more rows."
            )
        steps = self._remaining_steps()
        if steps == 0 and self._start.steps == 0:
            raise ValueError(
                f"num_train_epochs={args.num_train_epochs} over {rows} rows is less than one step of "
                f"{self._step_rows} rows ({accumulated} accumulated batches of {batch}): nothing would be trained."
            )
        max_steps = self._start.steps + steps
        # epochs, steps per epoch, rows, rows of the run, rows per step, batches per epoch, steps
        return 1, max(1, steps), rows, max_steps * self._step_rows, self._step_rows, steps * accumulated, max_steps

    def _init_training_state(self, max_steps, *args, **kwargs) -> tuple[int, int]:
        super()._init_training_state(max_steps, *args, **kwargs)
        warn_of_warmup(self.args, max_steps)
        end = self._consumed_after(max_steps)
        self.state.num_train_epochs = math.ceil(end / len(self.train_dataset))
        logger.info("Positions %d to %d of the order of the data.", self._start.consumed, end - 1)
        return int(self.state.global_step >= max_steps), 0  # one epoch of Trainer's, or none where all is done

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        if self._epoch_ended_at == self.state.global_step:  # Trainer's one epoch ends where an epoch has just ended
            self.control.should_log = self.control.should_evaluate = self.control.should_save = False
        last = self.control.should_training_stop or self.state.global_step >= self.state.max_steps
        ended = self.consumed // len(self.train_dataset) > self._epoch and not last
        if ended:
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self._epoch_ended_at = self.state.global_step
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if ended:
            self._epoch = self.consumed // len(self.train_dataset)
            self.control = self.callback_handler.on_epoch_begin(self.args, self.state, self.control)

    # Chance

    def training_step(self, *args, **kwargs):
        self.begin_batch()
        return super().training_step(*args, **kwargs)

    def begin_batch(self) -> None:
        """Counts the batches of a step, and seeds torch for the next one."""
        step, begun = self._batches
        self._batches = (self.state.global_step, begun + 1 if step == self.state.global_step else 1)
        torch.manual_seed(int(hashed(self.args.seed, self.positions(1)[0])))

    def positions(self, rows: int) -> torch.LongTensor:
        """Where the rows of the present batch of this process stand in the order of the data: (rows,)."""
        batch = (self._batches[1] - 1) * self.args.world_size + self.args.process_index
        return self.consumed + batch * self.args.per_device_train_batch_size + torch.arange(rows)

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the full model and the processor, for `from_pretrained`.

        `Trainer` comes here for its checkpoints as well (an internal call with a folder): those get only what is
        trained.
        """
        is_checkpoint = _internal_call and output_dir is not None
        output_dir = output_dir or self.args.output_dir
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if is_checkpoint:
            save_trained(model, output_dir, self.args.should_save, self._configuration)
            # without the optimizer's state nothing goes on from here
            if self.args.should_save and not self.args.save_only_model:
                state = DataState(self.consumed, self.state.global_step, self.args.world_size, self._data())
                save_data_state(state, output_dir)
        else:
            self._write_result(Path(output_dir))
            if self.args.should_save and self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _write_result(self, folder: Path, rehearsal: bool = False) -> None:
        """Write what the run is for; all processes come here. A rehearsal writes one tensor of a whole model."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        state = None
        if rehearsal and not is_peft_model(model):  # what peft saves is small
            name, parameter = next(model.named_parameters())
            state = {name: whole(parameter.detach()).cpu()}
        elif self.is_fsdp_enabled:
            state = self.accelerator.get_state_dict(model)
        if self.args.should_save:
            model.save_pretrained(folder, state_dict=state)

    def _adapter_modules(self) -> list[str] | None:
        """Paths of the modules that stand beside the branch in the adapter that is written; None where none is."""
        return None

    def _write_adapter(self, folder: Path) -> None:
        """Write the branch as an adapter; all processes come here."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        config = self._adapter_config or describe_adapter(model)
        config.extra_modules = self._adapter_modules()
        branch = whole_state(find_tower(model).bt_adapter)
        extra = {
            f"{path}.{name}": value
            for path in config.extra_modules
            for name, value in whole_state(model.get_submodule(path)).items()
        }
        if self.args.should_save:
            write_adapter(folder, config, branch, extra)

    def _rehearse(self) -> None:
        """Tries to save, as at the end, so that a run does not fail after its last step.

        Raises:
            ValueError: if it cannot be saved.
        """
        folder, shows_bars = Path(self.args.output_dir) / ".rehearsal", transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            self._write_result(folder, rehearsal=True)
        except Exception as error:
            raise ValueError(
                f"What is to be trained could not be saved in the end, as a rehearsal showed ({type(error).__name__}: "
                f"{error}). Nothing was trained."
            ) from error
        finally:
            if shows_bars:
                transformers_logging.enable_progress_bar()
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:  # one of an earlier run is not complete while it is being written again
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as a RuntimeError
            if is_complete(folder):
                raise  # something after the writing
            raise OSError(
                f"The checkpoint {folder} could not be written ({error}); {shutil.disk_usage(folder.parent).free:,} "
                "bytes are free there. Make room and resume: the last complete checkpoint is "
                f"{last_checkpoint(folder.parent)}."
            ) from error

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            save_sharded_optimizer(self.accelerator, self.model, self.optimizer, self.lr_scheduler, output_dir)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # all processes have written before the trainer state says so

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.accelerator.unwrap_model(self.model if model is None else model), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        logger.info("Loading the best checkpoint, %s.", self.state.best_model_checkpoint)
        load_trained(self.accelerator.unwrap_model(self.model), self.state.best_model_checkpoint)

    # Broken items

    def take_broken(self, inputs: dict[str, Any], seen: int, part: str) -> None:
        """Take the list of `BrokenItem` out of a batch and note it.

        Args:
            inputs: the batch; its key `broken` is removed.
            seen: number of items in the batch.
            part: "train" or "eval".

        Raises:
            BrokenItemsError: when the broken items exceed `args.max_broken`.
        """
        records = inputs.pop("broken", [])
        if part not in self._broken_logs:
            dataset = self.train_dataset if part == "train" else self.callback_handler.eval_dataloader.dataset
            self._broken_logs[part] = BrokenItemsLog(
                self._broken_list,
                part,
                items=len(dataset),
                max_broken=self.args.max_broken,
                seen=self.consumed // self.args.world_size if part == "train" else 0,
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


class _Progress(TrainerCallback):
    """Tells what has been consumed: `state.epoch` in epochs of the table (Trainer counts its one long epoch), and to
    the store of a table that is being fetched."""

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        state.epoch = self.trainer.consumed / len(self.trainer.train_dataset)
        self.trainer._epoch = int(state.epoch)
        self.trainer._epoch_ended_at = -1
        self.trainer._rehearse()

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = self.trainer.consumed / len(self.trainer.train_dataset)
        self._advance(self.trainer.train_dataset.table, self.trainer.consumed)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        self.trainer._evaluated += 1
        self._advance(eval_dataloader.dataset.table, self.trainer._evaluated * eval_dataloader.total_batch_size)

    def _advance(self, table, position: int) -> None:
        if table.needs_store and self.trainer.accelerator.is_local_main_process:
            table.store.advance(position)
