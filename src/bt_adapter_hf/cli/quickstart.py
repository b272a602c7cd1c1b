"""`bt-adapter quickstart`: the whole package on fresh clips of moving digits, offline."""

import argparse
import json
import time
from functools import lru_cache
from pathlib import Path

from ._options import add_device_option, path, progress, quiet_transformers


CLIPS = 360  # one for each caption
SEED = 77  # of no clip in training or in the recipe's evaluation
QUERIES = (
    "a red seven moves from the left to the right",
    "a red seven moves from the right to the left",
    "a blue two grows from small to big",
    "a yellow five moves from the bottom to the top",
)
CHAT_QUESTION = "How does it move?"
MOMENT_SYSTEMS = {
    "bt_adapter": "BT-Adapter",
    "frame_average": "frame-averaged CLIP",
    "one_frame": "one frame only",
    "reversed": "frames reversed",
}


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "quickstart",
        help="see it work: write clips, index, search, label and score them (offline, about a minute on two cores)",
        description="Writes short clips of moving handwritten digits as mp4 and GIF files, none of which the model "
        "has seen, indexes them with the model inside the package, searches them by text, names their motions, and "
        "compares its scores with those of frame-averaged CLIP and of clips with their frames shuffled or reversed; "
        "then asks the chat model inside the package how some of them move.",
        epilog="example: bt-adapter quickstart -o quickstart",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-o",
        "--output",
        default="bt-adapter-quickstart",
        type=path,
        metavar="DIR",
        help="folder to fill (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_device_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..import_utils import require_package

    require_package("sklearn", "quickstart")
    require_package("lancedb", "quickstart")
    quiet_transformers()
    import torch

    from ..data.moving_digits import MOTIONS, clip_caption, write_clips
    from ..evaluation.moving_digits import evaluate_moving_digits, format_scores
    from ..search.contact_sheet import write_contact_sheet
    from ..search.encoding import VideoEncoder
    from ..search.index import VideoIndex
    from ..search.moments import span_text
    from ..search.table import check_writable
    from ..search.writer import IndexWriter

    def say(text: str = "") -> None:
        if not args.json:
            print(text, flush=True)

    start = time.monotonic()
    folder = Path(args.output)
    clips_folder, index_folder, sheet = folder / "clips", folder / "index", folder / "contact-sheet.png"
    check_writable(index_folder)
    torch.set_num_threads(1)  # the models are so small that several would mostly wait for each other
    encoder = VideoEncoder.from_pretrained(device=args.device)

    say(f"1. {CLIPS} clips, one for each caption, of digits that no training has seen")
    table = write_clips(
        clips_folder, "test", CLIPS, SEED, progress=lambda items: progress(items, total=CLIPS, description="write")
    )
    rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
    paths = [str((clips_folder / row["file_name"]).resolve()) for row in rows]
    say(f"   {clips_folder}/ (mp4 and GIF, captions in metadata.jsonl)")

    say("\n2. Index and search: bt-adapter index, bt-adapter search")
    with IndexWriter(index_folder, encoder) as writer:
        writer.update(paths, batch_size=32, progress=lambda videos, total: progress(videos, total, "index"))
    index = VideoIndex.load(index_folder)
    caption_of = {path: row["text"] for path, row in zip(paths, rows, strict=True)}
    texts = encoder.encode_texts(QUERIES)
    found = dict(zip(QUERIES, index.search(texts, k=3), strict=True))
    for query, hits in found.items():
        say(f'   "{query}"')
        for hit in hits:
            say(f"      {hit.score:.3f}  {Path(hit.row['path']).name:<20}  {caption_of[hit.row['path']]}")
    write_contact_sheet(sheet, QUERIES[0], index.search(texts[:1], k=6)[0], index, index.median_score(texts[0]))
    say(f"   contact sheet: {sheet}")

    say("\n3. Label: bt-adapter classify")
    features = {row["path"]: feature for row, feature in zip(index.rows, index.features, strict=True)}
    labels = []
    for number in range(len(MOTIONS)):
        row, path = rows[number * 61 % CLIPS], paths[number * 61 % CLIPS]
        candidates = [clip_caption(row["digit"], row["colour"], motion) for motion in MOTIONS]
        best, probability, _ = encoder.label_scores(features[path], encoder.encode_texts(candidates))[0]
        label = candidates[best]
        labels.append({"file": row["file_name"], "label": label, "probability": probability, "caption": row["text"]})
        say(f"   {row['file_name']:<20}  {label} ({probability:.2f}){'' if label == row['text'] else '  (wrong)'}")

    say(f"\n4. Scores on the {CLIPS} clips")
    batches = [paths[first : first + 36] for first in range(0, CLIPS, 36)]
    scores = evaluate_moving_digits(
        encoder.model, encoder.processor, progress(batches, len(batches), "score"), rows, draws=3
    )
    say("   " + format_scores(scores).replace("\n", "\n   "))
    say("   motion: which of the 6, given digit and colour. order: against the same motion backwards. object: digit")
    say("   and colour of the nearest caption. R@1: each caption finds its clip. Frame-averaged CLIP is the same CLIP")
    say("   without the branch; shuffled frames come in a new order for every clip, three times over.")

    say("\n5. Moments: bt-adapter index --window 2 --stride 0.5")
    moments = _moments(folder / "film", encoder)
    hit = moments["hit"]
    say(f'   "{moments["query"]}"')
    place, shown = span_text(hit["start"], hit["end"]), span_text(*moments["shown"])
    say(f"      {hit['score']:.3f}  {moments['file']}  {place}  (shown at {shown})")
    row = ", ".join(f"{name} {moments['R1_iou50'][key]:.1f}" for key, name in MOMENT_SYSTEMS.items())
    say(f"   R@1 at IoU 0.5, %, of the film's {moments['count']} moments: {row}")

    say("\n6. Chat: bt-adapter chat")
    answers = []
    for number in range(len(MOTIONS)):
        row, path = rows[number * 67 % CLIPS], paths[number * 67 % CLIPS]
        answer = _ask(path, CHAT_QUESTION, encoder.model.device)
        answers.append({"file": row["file_name"], "question": CHAT_QUESTION, "answer": answer, "caption": row["text"]})
        say(f"   {row['file_name']:<20}  {CHAT_QUESTION}  {answer}  (shows: {row['text']})")

    seconds = time.monotonic() - start
    summary = {
        "folder": str(folder),
        "contact_sheet": str(sheet),
        "search": {
            query: [
                {"file": Path(hit.row["path"]).name, "score": hit.score, "caption": caption_of[hit.row["path"]]}
                for hit in hits
            ]
            for query, hits in found.items()
        },
        "labels": labels,
        "scores": scores,
        "moments": moments,
        "chat": answers,
        "seconds": round(seconds, 1),
    }
    (folder / "scores.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(summary, indent=2))
    say(f"\nDone in {seconds:.0f} s. Look at {sheet}; then try your own sentence:")
    say(f'   bt-adapter search {index_folder} "a green nine shrinks from big to small" --sheet hits.png')
    return 0


def _moments(folder: Path, encoder) -> dict:
    """A film of half a minute, cut into windows: where one of its captions is found, and the score of all."""
    from ..data.moving_digits_films import FilmMoment, write_films
    from ..evaluation.moments import evaluate_films
    from ..search.index import VideoIndex
    from ..search.moments import Windows
    from ..search.writer import IndexWriter

    windows = Windows(2.0, 0.5)
    table = write_films(folder, "test", 1, SEED, minutes=(0.5, 0.5), moments=(8, 8))
    shown = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
    name = shown[0]["file_name"]
    film = str((folder / name).resolve())
    with IndexWriter(folder / "index", encoder, windows) as writer:
        writer.update([film])
    wanted = shown[0]
    ((best,),) = VideoIndex.load(folder / "index").search(encoder.encode_texts([wanted["text"]]), k=1)
    moments = [FilmMoment(**{key: row[key] for key in FilmMoment._fields}) for row in shown]
    scores = evaluate_films(encoder, [(film, moments)], windows)
    return {
        "file": name,
        "query": wanted["text"],
        "hit": {"start": best.row["start"], "end": best.row["end"], "score": best.score},
        "shown": [wanted["start"], wanted["end"]],
        "count": len(shown),
        "R1_iou50": {key: scores[key]["R1_iou50"] for key in MOMENT_SYSTEMS},
    }


def _ask(path: str, question: str, device) -> str:
    """The answer of the chat model inside the package to a question about a video."""
    model, processor = _chat_model(device)
    content = [{"type": "video", "path": path}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(device)
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@lru_cache(maxsize=1)
def _chat_model(device):
    from .. import BTAdapterLlavaForConditionalGeneration, BTAdapterLlavaProcessor
    from ..assets import default_chat_model_path

    path = default_chat_model_path()
    model = BTAdapterLlavaForConditionalGeneration.from_pretrained(path).to(device).eval()
    return model, BTAdapterLlavaProcessor.from_pretrained(path)
