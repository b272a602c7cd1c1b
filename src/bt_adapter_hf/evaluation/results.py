"""Result files: scores with intervals, the same under every control, what they were measured with, and what failed."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..adapters.writing import written_whole
from ..data.broken import BrokenItem, count_reasons
from ..hub.result_files import CONTROL_NAMES, HEADLINES, RESULT_NAME, p_values
from .statistics import Comparison, Interval


@dataclass
class EvaluationResult:
    """What an evaluation found.

    Attributes:
        task: "retrieval", "recognition", ...
        scores: of the model, by name.
        controls: the same scores under each control that was run; draws of `shuffled` are averaged per item.
        against_frame_average: paired tests of the model against the frame-averaged image tower on the same items.
        chance: what guessing gives, where it can be said.
        items: how many of what the scores are over.
        failed: names and reasons of what could not be used; the scores are over the rest.
        unjudged: answers that a judge gave no score, under any control; they are in all scores but the judge's.
        to_judge: how many answers the judge was asked about.
        protocol: everything that decides the scores.
        reference_ties: of retrieval, the scores under the tie rule of the released code.
        aspects: the scores of parts of the items, by what they test.
    """

    task: str
    scores: dict[str, Interval]
    controls: dict[str, dict[str, Interval]]
    against_frame_average: dict[str, Comparison]
    chance: dict[str, float]
    items: dict[str, int]
    protocol: dict[str, Any]
    failed: list[BrokenItem] = field(default_factory=list)
    unjudged: list[BrokenItem] = field(default_factory=list)
    to_judge: int = 0
    reference_ties: dict[str, float] = field(default_factory=dict)
    aspects: dict[str, dict[str, Interval]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        fields = asdict(self)
        fields["failed"] = {"items": len(self.failed), "reasons": count_reasons(self.failed), "list": self.failed}
        del fields["to_judge"]
        fields["unjudged"] = {
            "answers": len(self.unjudged),
            "of": self.to_judge,
            "reasons": count_reasons(self.unjudged),
            "list": self.unjudged,
        }
        return fields

    def write(self, folder: Path) -> Path:
        """`folder/result.json`, whole or not at all."""
        path = folder / RESULT_NAME
        with written_whole(path) as temporary:
            text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
            # what of a name is no text comes out as \udc80, which is JSON
            temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
        return path

    def table(self) -> str:
        """For people: a line for the model and for each control, then the test against averaged frames."""
        names = [name for name in HEADLINES if name in self.scores]
        lines = [f"{self.task:<22}" + "".join(f"{name:>22}" for name in names)]
        rows = [("model", self.scores)]
        rows += [(CONTROL_NAMES.get(control, control), scores) for control, scores in self.controls.items()]
        for label, scores in rows:
            cells = (_cell(scores[name]) if name in scores else "" for name in names)
            lines.append(f"{label:<22}" + "".join(f"{cell:>22}" for cell in cells))
        if self.chance:
            cells = (f"{self.chance[name]:.1f}" if name in self.chance else "" for name in names)
            lines.append(f"{'(chance)':<22}" + "".join(f"{cell:>22}" for cell in cells))
        for aspect, scores in self.aspects.items():
            cells = (_cell(scores[name]) if name in scores else "" for name in names)
            lines.append(f"  {aspect[:20]:<20}" + "".join(f"{cell:>22}" for cell in cells))
        for name in names:
            if name in self.against_frame_average:
                lines.append(f"{name}: {_sentence(self.against_frame_average[name])}")
        if self.protocol.get("dual_softmax"):
            lines.append("scores are weighed by all queries at once (dual softmax), which a search cannot do")
        counts = ", ".join(f"{count} {what}" for what, count in self.items.items())
        lines.append(f"over {counts}; in brackets 95 % intervals over videos")
        lines += _reasons(f"{len(self.failed)} could not be used and are not in the scores", self.failed)
        said = f"{len(self.unjudged)} of {self.to_judge} answers got no score from the judge and are not in its means"
        return "\n".join(lines + _reasons(said, self.unjudged))


def _reasons(said: str, items: list[BrokenItem]) -> list[str]:
    """The most frequent reasons, if there is anything to say."""
    reasons = Counter(count_reasons(items)).most_common(3)
    return [f"{said}:", *(f"  {count:>5}  {reason}" for reason, count in reasons)] if items else []


def _cell(score: Interval) -> str:
    return f"{score.value:.1f} [{score.low:.1f}, {score.high:.1f}]"


def _sentence(test: Comparison) -> str:
    return f"{_cell(test.difference)} above frame-averaged CLIP ({p_values(test.p_bootstrap, test.p_mcnemar)})"
