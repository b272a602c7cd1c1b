"""Publishing on the Hub: what goes into a repository, and one commit that puts it there."""

import logging
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    RepoFile,
    constants,
    get_token,
    is_offline_mode,
)
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from ..adapters.description import loaded_from
from .access import check_token, explain, http_cause, is_transient, retried
from .base_names import what_is_missing, without_local_names
from .card import is_generated, model_card
from .compat import git_hash
from .contents import Contents, collect_files
from .remote_code import add_code, code_files, without_code
from .result_files import read_results
from .sentence_files import sentence_files


logger = logging.getLogger(__name__)

# A token of anybody's: the Hub's of users, and those of organisations.
_TOKEN = re.compile(rb"(?<![A-Za-z0-9])(hf_|api_org_)[A-Za-z0-9]{30,}")
_REPLACED_WEIGHTS = re.compile(r"(pytorch_model.*\.bin|model.*\.safetensors)(\.index\.json)?")


class PushError(OSError):
    """Nothing was published; the text says why, and what is on the Hub."""


@dataclass(frozen=True)
class Pushed:
    """What a push did, or would do.

    Args:
        repo_id: of the repository, with its namespace.
        commit: the commit that holds all of it; None of a dry run.
        url: of the commit, or of the pull request; None of a dry run.
        pull_request: its number, if one was opened.
        files: in the commit, by their path.
        left_out: files and folders of the source that were not published.
    """

    repo_id: str
    commit: str | None
    url: str | None
    files: list[str]
    pull_request: int | None = None
    left_out: list[str] = field(default_factory=list)


def push_to_hub(
    source: str | Path | nn.Module | ProcessorMixin,
    repo_id: str,
    *,
    processor: ProcessorMixin | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    with_code: bool = True,
    max_shard_size: int | str = "50GB",
    card: Mapping[str, Any] | None = None,
    include: Sequence[str] = (),
    results: Sequence[str | Path] = (),
    dry_run: bool = False,
) -> Pushed:
    """Publishes a model, an adapter or a processor with a model card, in one commit: all of it or nothing.

    Of a folder goes what has the name of something that a saved model, adapter, processor or run is made of, and
    nothing else unless `include` names it. A base model that was a folder of this machine is named in none of them:
    who loads such an adapter names the model that it goes into. Weights of the repository that would be loaded in
    place of the new ones are deleted in the same commit.

    Args:
        source: a folder with a model, an adapter (also with LoRA) or a processor; or one of these in memory, a peft
            model with a branch among them.
        repo_id: "namespace/name"; created if needed. Without a namespace it is yours.
        processor: published with the model.
        revision: a branch, created from the default one if needed.
        create_pr: open a pull request in place of a commit to the default branch.
        private: of a repository that is created.
        token: by default the one of `hf auth login` or of `HF_TOKEN`.
        commit_message: by default it names what is published.
        with_code: publish the code of model and processor too, for `trust_remote_code=True` where this package is
            not installed.
        max_shard_size: of the weights files of a model in memory.
        card: metadata of the card that the files do not tell, such as `{"license": "mit", "language": "en"}`.
        include: further files of the folder, by their path in it or by a pattern such as "images/*.png".
        results: result files of `bt-adapter eval`, or their folders: their scores go into the card. The files
            themselves, which name paths of yours, are not published.
        dry_run: check the files and list them, without asking the Hub for anything.

    Raises:
        ValueError: if the source is nothing of this package, is incomplete, or has a token of the Hub in one of its
            files; if a public repository exists under this name and `private=True`.
        PushError: if the Hub refuses, or does not answer even when asked again.
    """
    check_token(token)
    validate_repo_id(repo_id)
    if create_pr and revision is not None:
        raise ValueError("A pull request goes to the default branch: pass revision or create_pr, not both.")
    read = read_results(results) if results else []
    with tempfile.TemporaryDirectory() as scratch:
        base = (None, None)
        folder = Path(source) if isinstance(source, str | Path) else Path(scratch, "source")
        if not isinstance(source, str | Path):
            _save(source, folder, max_shard_size)
            if isinstance(source, PreTrainedModel):
                base = loaded_from(source)
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder{'' if folder.exists() else ', it does not exist'}.")
        files, left_out = collect_files(folder, include)
        if processor is not None:
            processor.save_pretrained(Path(scratch, "processor"))
            files |= collect_files(Path(scratch, "processor"))[0]
        described = Path(scratch, "described")  # what the card tells of, the processor included
        described.mkdir()
        for name, path in files.items():
            Path(described, name).parent.mkdir(parents=True, exist_ok=True)
            Path(described, name).symlink_to(path.resolve())

        kind = Contents.of(described).kind

        def make_card(readme: str | None, repo_id: str) -> str:
            if kind == "processor" and readme is not None:
                return readme  # it tells of the model that the processor belongs to
            own = None if readme is None or is_generated(readme) else readme
            coded = with_code and bool(code_files(described))
            return str(
                model_card(
                    described, repo_id, own=own, base=base, with_code=coded, metadata=dict(card or {}), results=read
                )
            )

        changed = code_files(described) if with_code else without_code(described)
        return publish(
            {**files, **changed, **sentence_files(described)},
            repo_id,
            make_card=make_card,
            revision=revision,
            create_pr=create_pr,
            private=private,
            token=token,
            commit_message=commit_message or f"Upload {kind}",
            left_out=[name for name in left_out if name not in changed],
            dry_run=dry_run,
        )


def save_with_code(directory: str | Path, model: PreTrainedModel, processor: ProcessorMixin | None = None, **kwargs):
    """Saves a model, and its processor, together with the files that define them.

    Such a directory loads with `trust_remote_code=True` where this package is not installed. Where it is installed,
    the package's own code is used.

    Args:
        directory: where to save; created if needed.
        model: a tower, a dual encoder or a chat model.
        processor: saved beside it.
        kwargs: passed to `model.save_pretrained`, e.g. `max_shard_size`.
    """
    model.save_pretrained(directory, **kwargs)
    if processor is not None:
        processor.save_pretrained(directory)
    add_code(Path(directory))


def publish(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    *,
    make_card: Callable[[str | None, str], str],
    revision: str | None = None,
    create_pr: bool = False,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str,
    left_out: Sequence[str] = (),
    dry_run: bool = False,
) -> Pushed:
    """One commit of files, by their path in the repository, and of a card; see [`push_to_hub`].

    Args:
        make_card: gives the README, from the one in `files` or else in the repository, and the repository's full name.
    """
    nameless, bases = without_local_names(files)
    files = {**files, **nameless}
    if bases:
        logger.warning(what_is_missing(bases, repo_id))
    if dry_run:
        readme = _read_readme(files["README.md"]) if "README.md" in files else None
        contents = {**files, "README.md": make_card(readme, repo_id).encode()}
        _refuse_tokens(contents, token)
        return Pushed(repo_id, None, None, sorted(contents), left_out=list(left_out))
    if is_offline_mode():
        raise PushError(f"HF_HUB_OFFLINE is set, so nothing can be published as {repo_id}: unset it.")
    api = HfApi(token=token)
    target = _Target(api, repo_id, revision, create_pr)
    try:
        readme = _read_readme(files["README.md"]) if "README.md" in files else None
        make_card(readme, repo_id)  # what is wrong in the files shows before anything is done on the Hub
        target.prepare(private)
        if readme is None or is_generated(readme):
            readme = target.readme() or readme  # someone may have written one on the Hub
        contents = {**files, "README.md": make_card(readme, target.repo_id).encode()}
        _refuse_tokens(contents, token)
        additions = [CommitOperationAdd(name, content) for name, content in contents.items()]
        commit, url, number = target.commit(additions, commit_message)
        target.verify(additions, commit)
    except PushError:
        raise
    except Exception as error:
        if http_cause(error) is None:
            raise
        raise PushError(f"{explain(error, target.repo_id, revision)}. {target.state()}") from error
    if left_out:
        logger.info("Not published: %s", ", ".join(left_out))
    return Pushed(target.repo_id, commit, url, sorted(contents), number, list(left_out))


class _Target:
    """A branch of a repository, as it was before the push."""

    def __init__(self, api: HfApi, repo_id: str, revision: str | None, create_pr: bool):
        self.api, self.repo_id, self.create_pr = api, repo_id, create_pr
        self.revision = revision or constants.DEFAULT_REVISION
        self.head: str | None = None
        self.new_repo = self.new_branch = False

    def prepare(self, private: bool | None) -> None:
        """Creates repository and branch if needed, and notes where the branch stands."""
        if "/" not in self.repo_id:
            self.repo_id = f"{retried(self.api.whoami, 'Asking who you are')['name']}/{self.repo_id}"
        what = f"Creating {self.repo_id}"
        if not retried(lambda: self.api.repo_exists(self.repo_id), what):
            retried(lambda: self.api.create_repo(self.repo_id, private=private, exist_ok=True), what)
            self.new_repo = True
        elif private and not retried(lambda: self.api.repo_info(self.repo_id), what).private:
            raise ValueError(f"{self.repo_id} exists and is public: publish under another name, or change it first.")
        try:
            self.head = self._head()
        except RevisionNotFoundError:
            if self.revision.startswith("refs/"):
                raise
            create = self.api.create_branch
            retried(lambda: create(self.repo_id, branch=self.revision, exist_ok=True), f"Creating {self.revision}")
            self.new_branch = True
            self.head = self._head()

    def readme(self) -> str | None:
        """The README that is there."""
        if self.new_repo:
            return None
        with tempfile.TemporaryDirectory() as scratch:
            try:
                path = retried(
                    lambda: self.api.hf_hub_download(self.repo_id, "README.md", revision=self.head, local_dir=scratch),
                    "Reading README.md",
                )
            except EntryNotFoundError:
                return None
            return Path(path).read_text(encoding="utf-8")

    def commit(self, additions: list[CommitOperationAdd], message: str) -> tuple[str, str, int | None]:
        """(commit, its address or that of the pull request, the pull request's number)

        A commit that failed may have landed, its answer lost: each further try looks for it first.
        """
        operations = [*additions, *self._outdated({addition.path_in_repo for addition in additions})]
        lost = False

        def attempt() -> tuple[str, str, int | None]:
            nonlocal lost
            found = self._landed(additions) if lost else None
            if found is not None:
                return found
            lost = True
            info = self.api.create_commit(
                self.repo_id,
                operations,
                commit_message=message,
                revision=None if self.create_pr else self.revision,
                create_pr=self.create_pr,
                parent_commit=self.head,
            )
            return info.oid, str(info.pr_url or info.commit_url), info.pr_num and int(info.pr_num)

        try:
            return retried(attempt, f"Committing to {self.repo_id}")
        except Exception as error:
            found = self._landed(additions) if is_transient(error) else None
            if found is not None:
                return found
            cause = http_cause(error)
            if isinstance(cause, HfHubHTTPError) and cause.response.status_code == 412:
                raise PushError(
                    f"{self.repo_id} was changed by someone else meanwhile, and nothing of this push is in it. Look "
                    "at the change, and push again."
                ) from error
            raise

    def verify(self, additions: list[CommitOperationAdd], commit: str) -> None:
        """Compares the hashes that the Hub has with those of the files here."""
        different = retried(lambda: self._different(additions, commit), f"Verifying {self.repo_id}")
        if different:
            raise PushError(
                f"{self.repo_id} at {commit} differs from what was pushed: {', '.join(different)}. Push again, and do "
                "not use this commit."
            )

    def state(self) -> str:
        """What is on the Hub after a push that failed."""
        created = f" {self.repo_id} was created for it." if self.new_repo else ""
        created += f" The branch {self.revision} was created for it." if self.new_branch else ""
        if self.head is None:
            return f"Nothing was published.{created}"
        try:
            head = self.api.repo_info(self.repo_id, revision=self.revision).sha
        except Exception as error:
            return f"Whether it was published could not be asked ({type(error).__name__}): look before you push again."
        if head != self.head:
            return f"{self.revision} of {self.repo_id} has a commit that is not of this push, {head}."
        return f"Nothing was published: {self.revision} of {self.repo_id} is as it was, at {head}.{created}"

    def _head(self) -> str:
        info = retried(lambda: self.api.repo_info(self.repo_id, revision=self.revision), f"Looking at {self.repo_id}")
        return info.sha

    def _outdated(self, files: set[str]) -> list[CommitOperationDelete]:
        """Weights that would be loaded in place of the new ones, or be left over beside them."""
        if self.new_repo or not any(_REPLACED_WEIGHTS.fullmatch(name) for name in files):
            return []
        tree = retried(lambda: list(self.api.list_repo_tree(self.repo_id, revision=self.head)), "Listing files")
        names = [entry.path for entry in tree if isinstance(entry, RepoFile)]
        return [
            CommitOperationDelete(path_in_repo=name, is_folder=False)
            for name in names
            if _REPLACED_WEIGHTS.fullmatch(name) and name not in files
        ]

    def _landed(self, additions: list[CommitOperationAdd]) -> tuple[str, str, int | None] | None:
        """The commit with these files, if the Hub has it: at the head of the branch, or in a pull request."""
        url = f"{constants.ENDPOINT}/{self.repo_id}"
        if not self.create_pr:
            head = self._head()
            if head == self.head or self._different(additions, head):
                return None
            return head, f"{url}/commit/{head}", None
        for request in self.api.list_repo_refs(self.repo_id, include_pull_requests=True).pull_requests or []:
            if not self._different(additions, request.target_commit):
                number = int(request.ref.rpartition("/")[2])
                return request.target_commit, f"{url}/discussions/{number}", number
        return None

    def _different(self, additions: list[CommitOperationAdd], commit: str) -> list[str]:
        """Files that the commit lacks, or has with another content."""
        names = [addition.path_in_repo for addition in additions]
        found = {
            entry.path: entry
            for entry in self.api.get_paths_info(self.repo_id, names, revision=commit)
            if isinstance(entry, RepoFile)
        }
        return sorted(a.path_in_repo for a in additions if not _is_same(found.get(a.path_in_repo), a))


def _is_same(remote: RepoFile | None, local: CommitOperationAdd) -> bool:
    if remote is None:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == local.upload_info.sha256.hex()
    with local.as_file() as file:
        return remote.blob_id == git_hash(file.read())


def _save(source: nn.Module | ProcessorMixin, folder: Path, max_shard_size: int | str) -> None:
    if isinstance(source, ProcessorMixin):
        source.save_pretrained(folder)
    elif isinstance(source, PreTrainedModel):
        source.save_pretrained(folder, max_shard_size=max_shard_size)
    elif hasattr(source, "peft_config"):
        source.save_pretrained(folder)
    else:
        raise ValueError(f"A {type(source).__name__} is no model or processor of this package, and no folder of one.")


def _read_readme(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}. Save it as such, or take it away.") from error


def _refuse_tokens(files: Mapping[str, Path | bytes], token: str | None) -> None:
    own = (token or get_token() or "").encode()
    for name, content in files.items():
        if Path(name).suffix == ".safetensors":
            continue
        content = content if isinstance(content, bytes) else content.read_bytes()
        if _TOKEN.search(content) or (own and own in content):
            raise ValueError(f"{name} holds a token of the Hub: take it out, and make a new one if others saw it.")
