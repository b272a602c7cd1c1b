"""Questions about videos with reference answers: benchmarks as they are published, and any table."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters.writing import no_character
from ..data.media import Media
from ..data.moving_digits_chat import QUESTIONS, answers, write_chat_clips
from ..data.readers import digest
from ..data.sources import PairTable
from .benchmark_files import VIDEO_ENDINGS, BenchmarkFiles, field, number_field
from .clips import Clips, ListedClip, ListedClips, TableClips


@dataclass(frozen=True)
class Question:
    """One question about a clip.

    Attributes:
        row: of the clip.
        texts: the question; of the consistency score two wordings of it.
        references: answers, any of which is right.
        kind: scores are also given by it.
        problem: why it cannot be asked; it counts as failed.
    """

    row: int
    texts: tuple[str, ...]
    references: tuple[str, ...]
    kind: str = ""
    problem: str | None = None


@dataclass
class QuestionSet:
    """Clips, and the questions about them."""

    clips: Clips
    questions: list[Question]

    def by_row(self) -> dict[int, list[str]]:
        """The texts of all questions of each row that can be asked, in order."""
        found: dict[int, list[str]] = {}
        for question in self.questions:
            if question.problem is None:
                found.setdefault(question.row, []).extend(question.texts)
        return found

    def describe(self) -> dict[str, Any]:
        """Which clips and questions, at which state."""
        return {**self.clips.describe(), "questions_fingerprint": digest(*sorted(self.by_row().items()))}


Asked = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], str]  # paths of the video, wordings, references, kind


def msvd_qa(files: BenchmarkFiles, split: str) -> Iterator[Asked]:
    """The authors' json, with youtube_mapping.txt that says which clip "vid7" is."""
    (path,) = files.find(f"{split}_qa.json", f"**/{split}_qa.json")
    (mapping,) = files.find("youtube_mapping.txt", "**/youtube_mapping.txt")
    names = {number: name for name, _, number in (line.strip().partition(" ") for line in files.lines(mapping))}
    for row in files.read(path):
        number = str(field(row, ["video_id"], path))
        name = names.get(number if number.startswith("vid") else f"vid{number}")
        if name is None:
            raise ValueError(f"{path} asks about the video {number}, which {mapping} does not list.")
        yield _any_ending(name), *_question(row, path), ""


def msrvtt_qa(files: BenchmarkFiles, split: str) -> Iterator[Asked]:
    """The authors' json: video 7010 is video7010.mp4."""
    (path,) = files.find(f"{split}_qa.json", f"**/{split}_qa.json")
    for row in files.read(path):
        number = str(field(row, ["video_id"], path)).removeprefix("video")
        yield _any_ending(f"video{number}"), *_question(row, path), ""


ACTIVITYNET_KINDS = ("motion", "spatial", "temporal", "yes or no", "colour", "object", "location", "number", "other")


def activitynet_qa(files: BenchmarkFiles, split: str) -> Iterator[Asked]:
    """The copy on the Hub, or the authors' pair of json files."""
    paths = files.find(f"**/{split}*.parquet", f"{split}_q.json", f"**/{split}_q.json")
    for path in paths:
        of_question = {}
        if path.endswith(".json"):
            other = path.removesuffix("_q.json") + "_a.json"
            of_question = {field(row, ["question_id"], other): row for row in files.read(other)}
        for place, row in enumerate(files.read(path)):
            name = field(row, ["video_name"], path)
            row = {**row, **of_question.get(row.get("question_id"), {})}
            kind = -1 if row.get("type") is None else int(number_field(row, "type", path, place))
            named = ACTIVITYNET_KINDS[kind] if 0 <= kind < len(ACTIVITYNET_KINDS) else ""
            yield _any_ending(f"v_{name.removeprefix('v_')}"), *_question(row, path), named


def tgif_qa(files: BenchmarkFiles, split: str) -> Iterator[Asked]:
    """The authors' csv files of open answers: FrameQA and counting."""
    table = f"*[{split[0].upper()}{split[0]}]{split[1:]}_*question.csv"
    for path in files.find(table, f"**/{table}"):
        kind = next((kind for kind in ("frameqa", "count") if kind in path.lower()), None)
        if kind is not None:  # the others are multiple choice
            for row in files.read(path):
                name = str(field(row, ["gif_name"], path))
                yield (f"{name}.gif", f"{name}.mp4"), *_question(row, path), kind


def _question(row: Mapping[str, Any], path: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple((str(field(row, [name], path, empty="")),) for name in ("question", "answer"))


READERS: dict[str, tuple[str | None, Callable[[BenchmarkFiles, str], Iterator[Asked]]]] = {
    "msvd-qa": (None, msvd_qa),
    "msrvtt-qa": (None, msrvtt_qa),
    "activitynet-qa": ("lmms-lab/ActivityNetQA", activitynet_qa),
    "tgif-qa": (None, tgif_qa),
}
FOLDERS = ("videos", "YouTubeClips", "MSRVTT_Videos", "video", "all_test", "gifs", "Test_Videos")
ARCHIVES = ("*.zip", "*.tar")


def open_question_set(
    name: str, split: str = "test", root: str | Path | None = None, media_root: str | Path | None = None
) -> QuestionSet:
    """One of `READERS`, from the Hub or from a copy of it.

    Args:
        split: "test", "val" or "train"; published numbers of MSVD-QA and MSR-VTT-QA are on either of the first two.
        root, media_root: see `BenchmarkFiles`.

    Raises:
        ValueError: an unknown name, or files that are not as published.
    """
    if name not in READERS:
        raise ValueError(f"There is no question set {name!r}; there are {', '.join(READERS)}, and tables.")
    repo, reader = READERS[name]
    files = BenchmarkFiles(name, repo, root, media_root)
    return listed_questions(name, files, reader(files, split))


# Parts of the VideoChatGPT benchmark: configuration on the Hub and the authors' file, by part.
BENCH_PARTS = {
    part: (f"{part.capitalize()}/test*.parquet", f"{part}_qa.json", f"**/{part}_qa.json")
    for part in ("generic", "temporal", "consistency")
}


def open_chat_bench(
    parts: tuple[str, ...] = tuple(BENCH_PARTS), root: str | Path | None = None, media_root: str | Path | None = None
) -> QuestionSet:
    """The questions of the VideoChatGPT benchmark; the kind of each is its part.

    Args:
        parts: out of `BENCH_PARTS`.
        root, media_root: see `BenchmarkFiles`.

    Raises:
        ValueError: files that are not as published.
    """
    files = BenchmarkFiles("videochatgpt", "lmms-lab/VideoChatGPT", root, media_root)

    def read() -> Iterator[Asked]:
        for part in parts:
            for path in files.find(*BENCH_PARTS[part]):
                for row in files.read(path):
                    wordings = [("question_1", "Q1"), ("question_2", "Q2")]
                    names = wordings if part == "consistency" else [("question", "Q")]
                    texts = tuple(str(field(row, keys, path, empty="")) for keys in names)
                    answer = str(field(row, ["answer", "A"], path, empty=""))
                    yield _any_ending(str(field(row, ["video_name"], path))), texts, (answer,), part

    return listed_questions("videochatgpt", files, read())


def listed_questions(name: str, files: BenchmarkFiles, asked: Iterator[Asked]) -> QuestionSet:
    """Questions as they come from a reader; a video of several questions has one row."""
    media = files.media(FOLDERS, ARCHIVES)
    rows: dict[tuple[str, ...], int] = {}
    questions = []
    for paths, texts, references, kind in asked:
        row = rows.setdefault(paths, len(rows))
        questions.append(Question(row, texts, references, kind, _problem(texts, references)))
    return QuestionSet(ListedClips(name, [ListedClip(media, paths) for paths in rows], files.revision), questions)


def table_questions(questions: PairTable, references: PairTable, kinds: PairTable | None = None) -> QuestionSet:
    """A table of videos, questions and answers (one, or a list of right ones).

    Args:
        questions, references, kinds: the same table, opened with these columns.

    A row without a question or an answer counts as failed.
    """
    found = []
    first: dict[str, int] = {}
    named = kinds.texts() if kinds is not None else ([] for _ in range(len(questions)))
    for row, (texts, right, kind) in enumerate(zip(questions.texts(), references.texts(), named, strict=True)):
        # of rows in place the video is read once, for the first of its questions
        shown = row if questions.needs_store else first.setdefault(questions.name(row), row)
        problem = _problem(texts[:1], right)
        if problem is not None and not questions.needs_store:
            problem = questions.record(row).problem or problem  # of a row that could not be read at all
        found.append(Question(shown, tuple(texts[:1]), tuple(right), kind[0] if kind else "", problem))
    return QuestionSet(TableClips(questions), found)


def _problem(texts: Sequence[str], references: Sequence[str]) -> str | None:
    """Why a question cannot be asked, or its answer not be judged."""
    for name, found in (("question", texts), ("answer", references)):
        if not found or not all(text.strip() for text in found):
            return f"it has no {name}"
        broken = next(filter(None, map(no_character, found)), None)
        if broken is not None:
            return f"its {name} {broken}"
    return None


def _any_ending(name: str) -> tuple[str, ...]:
    if name.lower().endswith(VIDEO_ENDINGS):
        return (name,)
    return tuple(f"{name}{ending}" for ending in VIDEO_ENDINGS)


def moving_digits_questions(folder: Path, count: int = 120, seed: int = 77) -> QuestionSet:
    """Every kind of question about clips and films of moving digits that no training has seen.

    Args:
        folder: gets the videos, where they are not there yet.
        count: of videos, half of them clips and half films of two motions.
    """
    table = folder / "metadata.jsonl"
    if not table.exists():
        write_chat_clips(folder, "test", count, seed)
    media = Media(str(folder.resolve()))
    clips, questions = [], []
    for line in table.read_text(encoding="utf-8").splitlines()[:count]:
        facts = json.loads(line)
        name = facts.pop("file_name")
        facts.pop("text")
        for kind, answer in answers(facts).items():
            questions.append(Question(len(clips), QUESTIONS[kind][:1], (answer,), kind))
        clips.append(ListedClip(media, (name,)))
    return QuestionSet(ListedClips("moving-digits", clips), questions)
