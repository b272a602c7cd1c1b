"""`Trainer(push_to_hub=True)` without surprises: one commit per push, no pickles, and no failure in silence."""

from pathlib import Path

from huggingface_hub import HfApi
from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from ..hub.access import check_token, explain, http_cause, retried
from ..hub.card import is_generated, model_card
from ..hub.contents import SUMMARY_NAME, belongs, collect_files, read_json
from ..hub.push import Pushed, PushError, publish
from ..hub.remote_code import code_files
from ..hub.sentence_files import sentence_files
from .checkpoint import DATA_STATE_NAME, TRAINED_WEIGHTS_NAME
from .compat import TRAINER_STATE_NAME


CARD_NAME = "README.md"
# What a run goes on from, besides the trained weights. torch reads these with `weights_only=True`; the arguments of
# the run (training_args.bin) are a pickle that may hold the token, and are not needed.
_STATE = (
    TRAINED_WEIGHTS_NAME,
    TRAINER_STATE_NAME,
    DATA_STATE_NAME,
    "optimizer.pt",
    "scheduler.pt",
    "rng_state*.pth",
    "scaler.pt",
)


class HubPushMixin(Trainer):
    """What a `Trainer` publishes: the full model, the processor, the code of both, and a card of the run's facts.

    `hub_strategy` "end" publishes when `save_model()` or `push_to_hub()` is called; "every_save" the model at each
    checkpoint too, "checkpoint" also the state to go on from under `last-checkpoint`, and "all_checkpoints" under
    `checkpoint-N`, where N is the step. Each push is one commit, and training waits for it.

    Raises:
        PushError: if a push fails, also that of a checkpoint. The checkpoint on the disk is complete: resume from it.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._published_processor = self.processing_class  # `processing_class` may be away while training

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        if not self.is_world_process_zero():
            return
        token = self.args.hub_token if token is None else token
        check_token(token)
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        private = self.args.hub_private_repo if private is None else private
        create = HfApi(token=token).create_repo
        try:
            url = retried(lambda: create(name, private=private, exist_ok=True), f"Creating {name}")
        except Exception as error:
            if http_cause(error) is None:
                raise
            raise PushError(f"push_to_hub=True, and {explain(error, name)}. Nothing was trained.") from error
        self.hub_model_id = url.repo_id
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> Pushed | None:
        """Saves the model and publishes the output folder; see the class.

        Args:
            commit_message, token, revision, private: as in `Trainer`.
            blocking: there is no other way.
            kwargs: fields of the card's metadata, such as `license="apache-2.0"`.

        Returns:
            What was pushed, on the main process; None on others.
        """
        if not blocking:
            raise ValueError("blocking=False would let a push fail unseen: call push_to_hub() without it.")
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        return self._push(commit_message or "End of training", {}, token, revision, **kwargs)

    def create_model_card(self, **metadata) -> None:
        """Writes `README.md` into the output folder: the run's card, or the user's own with its metadata filled in.

        The facts are those of `run_summary.json` in the output folder; before it is written, what the trainer knows.
        """
        if not self.is_world_process_zero():
            return
        metadata = {key: value for key, value in metadata.items() if key != "model_name"}
        path = Path(self.args.output_dir) / CARD_NAME
        readme = path.read_text(encoding="utf-8") if path.is_file() else None
        name = self.hub_model_id or Path(self.args.output_dir).name
        path.write_text(self._card(readme, name, metadata), encoding="utf-8")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        strategy = self.args.hub_strategy
        if strategy == HubStrategy.END:
            return
        folder, files = Path(checkpoint_folder), {}
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else folder.name
            state = {path for pattern in _STATE for path in folder.glob(pattern)}
            state |= {path for path in folder.iterdir() if path.is_file() and belongs(path.name)}
            files = {f"{name}/{path.name}": path for path in sorted(state)}
        self._push(f"Training in progress, step {self.state.global_step}", files)

    def _push(
        self,
        message: str,
        files: dict[str, Path],
        token: str | None = None,
        revision: str | None = None,
        **metadata,
    ) -> Pushed | None:
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)  # the whole model, on all processes
        if not self.is_world_process_zero():
            return None
        if self._published_processor is not None:
            self._published_processor.save_pretrained(self.args.output_dir)
        self.create_model_card(**metadata)
        folder = Path(self.args.output_dir)
        published, left_out = collect_files(folder)
        if self._summary() is not None:  # of an earlier run in this folder
            published.pop(SUMMARY_NAME, None)
        return publish(
            {**published, **code_files(folder), **sentence_files(folder), **files},
            self.hub_model_id,
            make_card=lambda readme, repo_id: self._card(readme, repo_id, metadata),
            revision=revision or self.args.hub_revision,
            token=token or self.args.hub_token,
            commit_message=message,
            left_out=left_out,
        )

    def _finish_current_push(self) -> None:
        """Nothing is ever under way: each push has ended, or raised, when it returns."""

    def _card(self, readme: str | None, repo_id: str, metadata: dict) -> str:
        folder = Path(self.args.output_dir)
        own = None if readme is None or is_generated(readme) else readme
        coded = bool(code_files(folder))
        return str(model_card(folder, repo_id, own=own, with_code=coded, summary=self._summary(), metadata=metadata))

    def _summary(self) -> dict | None:
        """None if `run_summary.json` tells of this run as it stands; else what it is going to say, as far as known."""
        path = Path(self.args.output_dir) / SUMMARY_NAME
        if path.is_file() and read_json(path).get("steps") == self.state.global_step:
            return None
        name, revision = getattr(self.model, "_loaded_from", (None, None))
        evaluated = [entry for entry in self.state.log_history if any(key.startswith("eval_") for key in entry)]
        fields = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "seed")
        return {
            "model": name,
            "revision": revision,
            "training": {field: getattr(self.args, field) for field in fields},
            "processes": self.args.world_size,
            "steps": self.state.global_step,
            "total_steps": self.state.max_steps,
            "finished": self.state.global_step >= self.state.max_steps,
            "metrics": {key: value for key, value in evaluated[-1].items() if key != "step"} if evaluated else {},
        }
