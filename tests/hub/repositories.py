"""What a Hub keeps: repositories with commits, branches, tags and pull requests, in memory."""

import datetime
import hashlib
from dataclasses import dataclass, field
from functools import cached_property


# Stored as large files (LFS) whatever their size, as `.gitattributes` of a new repository on the Hub says.
LARGE = (
    ".arrow .avi .bin .gif .gz .jpg .mkv .mov .mp4 .npy .npz .onnx .parquet .png .pt .pth .safetensors .tar .webm .zip"
).split()
LARGE_BYTES = 10_000_000
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE).encode()


def is_large(path: str, size: int, sample: bytes) -> bool:
    """Whether a file is kept in the storage, not in git: by its name, its size, or because it is no text."""
    if not size:
        return False
    try:
        sample[:-4].decode()  # a character may be cut at the end of the sample
    except UnicodeDecodeError:
        return True
    return path.lower().endswith(tuple(LARGE)) or size > LARGE_BYTES


@dataclass(frozen=True)
class File:
    """One version of one file."""

    data: bytes
    large: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()
        )

    @cached_property
    def blob_id(self) -> str:
        """The id git gives to what it keeps: the file, or the pointer to a large one."""
        content = self.pointer if self.large else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.blob_id


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, File]


@dataclass
class PullRequest:
    number: int
    title: str
    author: str
    date: str
    status: str = "open"


@dataclass
class Repository:
    """Commits, and the names that point to them: `refs/heads/main`, `refs/tags/v1`, `refs/pr/1`."""

    id: str
    type: str
    private: bool = False
    gated: str | bool = False
    readers: set[str] = field(default_factory=set)  # users who were let in to a gated repository
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pull_requests: list[PullRequest] = field(default_factory=list)

    def __post_init__(self):
        self.commit("refs/heads/main", {".gitattributes": File(GIT_ATTRIBUTES, large=False)}, "initial commit")

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def ref(self, revision: str) -> str | None:
        """Full name of the branch, tag or pull request that `revision` names, if any."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def find(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag, a pull request, or an id of at least 7 characters names."""
        if (ref := self.ref(revision)) is not None:
            return self.commits[self.refs[ref]]
        matches = [oid for oid in self.commits if len(revision) >= 7 and oid.startswith(revision)]
        return self.commits[matches[0]] if len(matches) == 1 else None

    def commit(
        self,
        ref: str,
        files: dict[str, File],
        title: str,
        message: str = "",
        author: str = "",
        parent: str | None = None,
    ) -> Commit:
        """Makes `files`, the whole content, the head of `ref`."""
        parent = parent or self.refs.get(ref)
        # Two commits of the same files are two commits: the count is part of what is hashed.
        content = "".join(f"{path} {file.blob_id}\n" for path, file in sorted(files.items()))
        oid = hashlib.sha1(f"{self.type} {self.id} {parent} {len(self.commits)}\n{content}".encode()).hexdigest()
        date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        self.commits[oid] = Commit(oid, parent, title, message, author, date, dict(files))
        self.refs[ref] = oid
        return self.commits[oid]

    def history(self, commit: Commit) -> list[Commit]:
        """`commit` and what came before it, newest first."""
        commits = [commit]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits
