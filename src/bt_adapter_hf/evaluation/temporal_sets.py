"""Benchmarks of the order of frames, as they are published, and any table of a clip with a right and wrong texts."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field as dataclass_field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from ..adapters.writing import no_character, written_whole
from ..data.media import Media
from ..data.moving_digits import WRITERS
from ..data.moving_digits_temporal import temporal_items
from ..data.sources import PairTable
from .benchmark_files import BenchmarkFiles, field, number_field
from .clips import Clips, ListedClip, ListedClips, TableClips
from .temporal import TemporalItem


@dataclass
class TemporalSet:
    """Clips, and the items over their row numbers.

    Attributes:
        broken: place of an item among all that were read -> its video, and why there is no such item.
    """

    clips: Clips
    items: list[TemporalItem]
    broken: dict[int, tuple[str, str]] = dataclass_field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.items) + len(self.broken)

    def numbered(self) -> list[tuple[int, TemporalItem]]:
        """The items with their places."""
        return list(zip((n for n in range(len(self)) if n not in self.broken), self.items, strict=True))


# clips, texts (clip i shows text i) or why the row has none, aspect
Item = tuple[list[ListedClip], list[str] | str, str]


def vinoground(files: BenchmarkFiles) -> Iterator[Item]:
    """500 pairs of clips with each other's caption, by major category."""
    media = files.media(("vinoground_videos",), ("vinoground_videos.zip",))
    for number, row in enumerate(files.read("vinoground.csv")):
        index = row.get("index") or str(number)
        clips = [ListedClip(media, (f"{index}_{side}.mp4",)) for side in ("pos", "neg")]
        texts = [field(row, [f"{side}_cap"], "vinoground.csv", empty="") for side in ("pos", "neg")]
        yield clips, texts, row.get("major") or ""


def rtime(files: BenchmarkFiles) -> Iterator[Item]:
    """RTime-Binary: each video and its reverse, with the caption of either."""
    for forward, backward in _rtime_clips(files):
        yield [forward, backward], [forward.texts[0], backward.texts[0]], ""


def rtime_hard(files: BenchmarkFiles) -> ListedClips:
    """RTime-Hard: retrieval among the videos and their reverses."""
    return ListedClips("rtime-hard", list(chain.from_iterable(_rtime_clips(files))), files.revision)


def _rtime_clips(files: BenchmarkFiles) -> Iterator[tuple[ListedClip, ListedClip]]:
    """The released videos are played forwards only; what is not annotated backwards is left out."""
    media = files.media(("videos", "RTime_videos"), ("*.zip", "*.tar"))
    (path,) = files.find("test.json")
    content = files.read(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a list where an object with a row for each video is expected.")
    for name, row in content.items():
        forward_captions = field(row, ["forward_captions"], path, empty="")
        if row.get("reverse") and row.get("reverse_captions"):
            forward = str((forward_captions or [""])[0])
            paths = (f"{name}.mp4", f"{name}.webm", f"{name}.mov")
            yield (
                ListedClip(media, paths, (forward,)),
                ListedClip(media, paths, (str(row["reverse_captions"][0]),), backwards=True),
            )


def vitatecs(files: BenchmarkFiles) -> Iterator[Item]:
    """A caption and its counterfactual in one aspect of time. The videos are those of MSR-VTT and VATEX."""
    media = files.media(("videos",), ("videos.zip",))
    for path in files.find("*.jsonl", "data/*.jsonl"):
        for row in files.read(path):
            name = f"{field(row, ['src_dataset'], path)}/{field(row, ['video_name'], path)}"
            clip = ListedClip(media, _with_endings(name))
            texts = [field(row, [name], path, empty="") for name in ("caption", "counterfactual")]
            yield [clip], texts, field(row, ["aspect"], path)


def tempcompass(files: BenchmarkFiles) -> Iterator[Item]:
    """Multiple choice: the texts are the question with each of its choices."""
    media = files.media(("videos",), ("tempcompass_videos.zip",))
    for path in files.find("multi-choice/*.parquet", "multi-choice.json"):
        for row in files.read(path):
            question, *lines = str(field(row, ["question"], path)).strip().split("\n")
            choices = [
                match[2].strip() for match in (re.match(r"\s*([A-Z])[.)]\s*(.+)", line) for line in lines) if match
            ]
            answer = re.sub(r"^[A-Z][.)]\s*", "", str(field(row, ["answer"], path))).strip()
            clip = ListedClip(media, (f"{field(row, ['video_id'], path)}.mp4",))
            yield [clip], _choices(question, choices, answer), row.get("dim") or ""


def tvbench(files: BenchmarkFiles) -> Iterator[Item]:
    """Multiple choice, by task; some questions are about a part of the video."""
    for path in files.find("json/*.json"):
        task = Path(path).stem
        media = files.media((f"video/{task}",), (f"video/{task}.zip", f"video/{task}*.zip"))
        for place, row in enumerate(files.read(path)):
            clip = ListedClip(media, (str(field(row, ["video"], path)),))
            if row.get("start") is not None and row.get("end") is not None:
                clip = replace(clip, span=tuple(number_field(row, name, path, place) for name in ("start", "end")))
            candidates = [str(choice) for choice in field(row, ["candidates"], path)]
            question, answer = str(field(row, ["question"], path)), str(field(row, ["answer"], path))
            yield [clip], _choices(question, candidates, answer), task.replace("_", " ")


# Templates of Something-Something-v2 that the other one of a pair undoes.
_DIRECTIONS = (
    ("Pushing [something] from left to right", "Pushing [something] from right to left"),
    ("Pulling [something] from left to right", "Pulling [something] from right to left"),
    ("Moving [something] up", "Moving [something] down"),
    ("Moving [something] towards the camera", "Moving [something] away from the camera"),
    ("Moving [something] closer to [something]", "Moving [something] away from [something]"),
    (
        "Moving [something] and [something] closer to each other",
        "Moving [something] and [something] away from each other",
    ),
    ("Approaching [something] with your camera", "Moving away from [something] with your camera"),
    ("Turning the camera left while filming [something]", "Turning the camera right while filming [something]"),
    ("Turning the camera upwards while filming [something]", "Turning the camera downwards while filming [something]"),
    ("Opening [something]", "Closing [something]"),
    ("Folding [something]", "Unfolding [something]"),
    ("Putting [something] into [something]", "Taking [something] out of [something]"),
)
OPPOSITES = {a: b for pair in _DIRECTIONS for a, b in (pair, pair[::-1])}


def ssv2(files: BenchmarkFiles) -> Iterator[Item]:
    """Something-Something-v2's validation clips whose template has an opposite, with the label of either."""
    media = files.media(("20bn-something-something-v2", "videos"), ("*.zip", "*.tar"))
    (path,) = files.find("*validation.json", "labels/validation.json", "**/*validation.json")
    for row in files.read(path):
        template = str(field(row, ["template"], path))
        wrong = OPPOSITES.get(template)
        if wrong is None:
            continue
        clip = ListedClip(media, (f"{field(row, ['id'], path)}.webm",))
        things = list(field(row, ["placeholders"], path, empty=[]))
        texts = [_filled(text, things) for text in (template, wrong)]
        if len(things) != template.count("["):
            texts = f"{template!r} has {len(things)} placeholders: {things}"
        yield [clip], texts, template.partition(" ")[0].lower()


READERS: dict[str, tuple[str | None, Callable[[BenchmarkFiles], Iterator[Item]]]] = {
    "vinoground": ("HanSolo9682/Vinoground", vinoground),
    "rtime": (None, rtime),
    "vitatecs": ("lscpku/VITATECS", vitatecs),
    "tempcompass": ("lmms-lab/TempCompass", tempcompass),
    "tvbench": ("FunAILab/TVBench", tvbench),
    "ssv2": (None, ssv2),
}


def open_temporal_set(name: str, root: str | Path | None = None, media_root: str | Path | None = None) -> TemporalSet:
    """One of `READERS`, from the Hub or from a copy of it.

    Args:
        root: the copy; see `BenchmarkFiles`.
        media_root: where the videos lie, if elsewhere.

    Raises:
        ValueError: an unknown name, or files that are not as published.
    """
    if name not in READERS:
        raise ValueError(f"There is no temporal benchmark {name!r}; there are {', '.join(READERS)}, and tables.")
    repo, reader = READERS[name]
    files = BenchmarkFiles(name, repo, root, media_root)
    return listed(name, reader(files), files.revision)


def listed(name: str, read: Iterator[Item], revision: str | None = None) -> TemporalSet:
    """Items as they come from a reader; a clip of several items has one row.

    Raises:
        ValueError: there are none.
    """
    rows: dict[tuple[int, str], int] = {}
    clips: list[ListedClip] = []
    items: list[TemporalItem] = []
    broken: dict[int, tuple[str, str]] = {}
    for place, (shown, texts, aspect) in enumerate(read):
        problem = _problem(texts)
        if problem is not None:
            broken[place] = shown[0].name, problem
            continue
        numbers = []
        for clip in shown:
            number = rows.setdefault((id(clip.media), clip.name), len(clips))
            if number == len(clips):
                clips.append(clip)
            numbers.append(number)
        items.append(TemporalItem(tuple(numbers), tuple(texts), aspect, shown[0].paths[0]))
    if broken and not items:
        video, problem = next(iter(broken.values()))
        raise ValueError(f"No item of {name} can be used. The first of {len(broken)}: {video}: {problem}.")
    return TemporalSet(ListedClips(name, clips, revision), items, broken)


def table_set(right: PairTable, wrong: PairTable, aspects: PairTable | None = None) -> TemporalSet:
    """A table of clips with a right and one or more wrong texts.

    Args:
        right, wrong, aspects: the same table, opened with the column of right texts, of wrong ones, and of what each
            row tests.

    A row without a right or a wrong text, or with the same twice, counts as failed.

    Raises:
        ValueError: no row can be used.
    """
    items: list[TemporalItem] = []
    broken: dict[int, tuple[str, str]] = {}
    named = aspects.texts() if aspects is not None else ([] for _ in range(len(right)))
    for row, (texts, others, aspect) in enumerate(zip(right.texts(), wrong.texts(), named, strict=True)):
        missing = "right" if not texts else "wrong" if not others else None
        problem = f"it has no {missing} text" if missing else _problem([texts[0], *others])
        if problem is None:
            items.append(TemporalItem((row,), (texts[0], *others), aspect[0] if aspect else ""))
        else:
            broken[row] = f"row {row}", problem
    if not items:
        row, (_, problem) = next(iter(broken.items()))
        raise ValueError(f"No row of {right.source} can be used. The first of {len(broken)}, row {row}: {problem}.")
    return TemporalSet(TableClips(right), items, broken)


def _problem(texts: list[str] | str) -> str | None:
    """Why the texts of an item tell nothing."""
    if isinstance(texts, str):
        return texts
    if not all(text.strip() for text in texts):
        return "one of its texts is empty"
    if len(texts) < 2 or len(set(texts)) < len(texts):
        return f"its texts must be two or more, and differ: {texts}"
    return next((f"a text {found}" for found in map(no_character, texts) if found), None)


def _choices(question: str, candidates: list[str], answer: str) -> list[str] | str:
    """The texts of a question, the right one first; or why there are none."""
    if answer not in candidates:
        return f"the answer {answer!r} to {question!r} is none of the choices {candidates}"
    others = [choice for choice in dict.fromkeys(candidates) if choice != answer]
    return [f"{question} {choice}" for choice in (answer, *others)]


def _filled(template: str, things: list[Any]) -> str:
    """ "Moving [something] up", ["a pen"] -> "Moving a pen up"."""
    left = iter(things)
    return re.sub(r"\[[^]]*\]", lambda _: str(next(left, "")), template)


def _with_endings(name: str) -> tuple[str, ...]:
    return (name,) if re.search(r"\.\w{2,4}$", name) else (f"{name}.mp4", name)


def moving_digits_set(board: str, folder: Path, count: int = 360, seed: int = 77) -> TemporalSet:
    """A board of moving digits; its clips are written into `folder`, where they are not there yet.

    Args:
        board: "order", "sequence" or "count"; see `temporal_item`.
        count: of items.
        seed: of the clips; none of them was trained on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    media = Media(str(folder.resolve()))

    def read() -> Iterator[Item]:
        for place, (shown, texts, kind) in enumerate(temporal_items(board, count, seed)):
            suffix = ("mp4", "gif")[place % 2]
            clips = []
            for name, frames, backwards in shown:
                path = folder / f"{board}-{name}.{suffix}"
                if not path.exists():
                    with written_whole(path) as temporary:
                        WRITERS[suffix](temporary, frames)
                clips.append(ListedClip(media, (path.name,), backwards=backwards))
            yield clips, texts, kind

    return listed(f"moving-digits-{board}", read())
