"""The tabs of the page: what each shows, and what answers it."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch

from ..models.image_io import load_image
from ..models.video_errors import VideoError
from ..search.film import Film
from ..search.label_plot import both_ways
from ..search.moments import span_text
from .answers import in_and_out, part
from .clips import STILLS, say
from .guard import clear_errors
from .material import Material
from .over_time import FOLLOW, plot, similarity_over_time


HITS = 8
_GREY = np.full((90, 160, 3), 230, np.uint8)
# A reader of the screen hears what a hit is; gradio's own name is "Thumbnail 1 of 8".
_NAME_HITS = """() => setTimeout(() => document.querySelectorAll("button.thumbnail-item").forEach(hit => {
    const words = hit.querySelector("img")?.alt; if (words) hit.setAttribute("aria-label", words)}), 50)"""
VIDEO_FILES = ["video", ".gif"]
ANY_FILES = ["video", "image"]


def search(page: Material) -> None:
    gr.Markdown(f"Finds the clips that fit a sentence, a clip or a picture, among {len(page.index)}.")
    with gr.Row():
        with gr.Column():
            text = gr.Textbox(
                label="Sentence", placeholder="a red zero moves from the left to the right", max_length=500
            )
            file = gr.File(label="Or a clip or picture that it should look like", file_types=ANY_FILES)
            button = gr.Button("Search", variant="primary")
            if page.texts:
                gr.Examples([[text] for text in page.texts], [text], label="For example")
        with gr.Column():
            player = gr.HTML()
            told = gr.Markdown()
    gallery = gr.Gallery(
        label="Best first; a click plays it", columns=4, allow_preview=False, object_fit="contain", buttons=[]
    )
    found = gr.State([])

    @clear_errors
    def run(text: str, file: str | None):
        if file:
            (query,) = _query(page, page.upload(file))[None]
        else:
            (query,) = page.encoder.encode_texts([page.text(text, "sentence")])
        (hits,) = page.index.search(query[None], HITS)
        moments = [(hit.row["path"], *_moment(page, hit.row), hit.score) for hit in hits]
        captions = [_caption(*moment) for moment in moments]
        answer = moments, *_play(page, moments[0])

        def pictures():
            yield [(_GREY, caption) for caption in captions], *answer  # the best one plays while these are decoded
            with ThreadPoolExecutor(2) as pool:
                yield list(zip(pool.map(lambda hit: _thumbnail(page, hit.row), hits), captions, strict=True)), *answer

        return pictures()

    def stream(text: str, file: str | None):
        yield from run(text, file)

    def play(moments: list, event: gr.SelectData):
        return _play(page, moments[event.index])

    outputs = [gallery, found, player, told]
    gr.on([button.click, text.submit], stream, [text, file], outputs, api_name="search", concurrency_id="search")
    gallery.change(None, js=_NAME_HITS)
    gallery.select(play, [found], [player, told], api_visibility="private", concurrency_id="search")


def label(page: Material) -> None:
    gr.Markdown(
        "Labels of your own, without training. **Beside them those of the same clip played backwards**: a model that "
        "only looks at frames cannot tell the two apart."
    )
    with gr.Row():
        with gr.Column():
            file = gr.File(label="Clip", file_types=VIDEO_FILES)
            labels = gr.Textbox(
                "\n".join([*page.texts[:1], *page.texts[-1:], *page.texts[1:2]]),
                label="Labels, one a line",
                lines=5,
                max_lines=20,
                max_length=2000,
            )
            button = gr.Button("Label", variant="primary")
            if page.examples:
                gr.Examples([[path] for path in page.examples[:6]], [file], label="For example")
        with gr.Column():
            player = gr.HTML()
            with gr.Row():
                forward, backward = gr.Label(label="As it is"), gr.Label(label="Played backwards")

    @clear_errors
    def run(file: str | None, labels: str):
        path = page.upload(file, "clip")
        names = list(dict.fromkeys(filter(None, map(str.strip, (labels or "").splitlines()))))
        if len(names) < 2:
            raise gr.Error("Type at least two labels, one a line: a choice needs as many.", print_exception=False)
        texts = page.encoder.encode_texts([page.text(name, "label") for name in names])
        scores = [page.encoder.label_scores(feature, texts) for feature in both_ways(page.encoder, path)]
        return page.clips.player(path), *({names[i]: p for i, p, _ in of} for of in scores)

    button.click(run, [file, labels], [player, forward, backward], api_name="label", concurrency_id="label")


def chat(page: Material) -> None:
    gr.Markdown(
        f"Videos and images, up to {page.limits.files} a message, and questions about them. A video costs as many "
        "tokens as an image, whatever its length."
    )
    talk = gr.Chatbot(label="Conversation", height=420, buttons=["copy"])
    tokens = gr.Markdown()
    box = gr.MultimodalTextbox(
        label="Message",
        file_count="multiple",
        file_types=ANY_FILES,
        placeholder="How does it move?",
        sources=["upload"],
    )
    clear = gr.Button("New conversation")
    if page.examples:
        gr.Examples([[{"text": "How does it move?", "files": page.examples[:2]}]], [box], label="For example")
    messages = gr.State([])

    @clear_errors
    def run(message: dict[str, Any], shown: list, messages: list):
        files = message.get("files") or []
        if len(files) > page.limits.files:
            raise gr.Error(f"{len(files)} files; {page.limits.files} a message are taken here.", print_exception=False)
        question = page.text(message.get("text"), "question")
        parts = [part(page.upload(path)) for path in files]
        asked = [*messages, {"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
        inputs = page.chat.inputs(asked)  # every file is read before anything is answered
        shown = [*shown, *({"role": "user", "content": {"path": path}} for path in files)]
        shown.append({"role": "user", "content": question})
        cost = _cost(page, asked, inputs["input_ids"])

        def answers():
            answer = ""
            for answer in page.chat.stream(inputs):
                yield None, [*shown, {"role": "assistant", "content": answer}], asked, cost
            said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
            yield None, [*shown, {"role": "assistant", "content": answer}], [*asked, said], cost

        return answers()

    def stream(message, shown, messages):
        yield from run(message, shown, messages)

    box.submit(stream, [box, talk, messages], [box, talk, messages, tokens], api_name="chat", concurrency_id="chat")
    clear.click(lambda: ([], [], ""), None, [talk, messages, tokens], api_visibility="private")


def adapter(page: Material) -> None:
    gr.Markdown(
        "The same question with the branch and without it. Without it the model sees images: of a video the middle "
        "frame. **Images are answered exactly as before**, which is checked each time."
    )
    with gr.Row():
        with gr.Column():
            file = gr.File(label="Video or image", file_types=ANY_FILES)
            question = gr.Textbox("How does it move?", label="Question", max_length=500)
            button = gr.Button("Ask both", variant="primary")
            if page.examples:
                gr.Examples([[path] for path in page.examples[:4]], [file], label="For example")
        with gr.Column():
            player = gr.HTML()
            with_branch = gr.Textbox(label="With the branch")
            without = gr.Textbox(label="Without it")
            check = gr.Markdown()

    @clear_errors
    def run(file: str | None, question: str):
        path = page.upload(file, "video or image")
        both = in_and_out(page.chat, path, page.text(question, "question"))
        told = f"Of {both.shown_without}, as an image, the two models gave "
        if both.image_is_equal:
            told += f"**the same {both.numbers:,} numbers, bit by bit**."
        else:
            told += "**different numbers**, which must not be: please report it."
        return page.clips.player(path), both.with_branch, both.without_branch, told

    outputs = [player, with_branch, without, check]
    button.click(run, [file, question], outputs, api_name="adapter", concurrency_id="chat")


def over_time(page: Material) -> None:
    gr.Markdown("How well a sentence fits a video over time. A click into the curve goes to that moment.")
    with gr.Row():
        with gr.Column():
            file = gr.File(label="Video", file_types=VIDEO_FILES)
            text = gr.Textbox(page.texts[0] if page.texts else "", label="Sentence", max_length=500)
            button = gr.Button("Look", variant="primary")
            if page.film:
                gr.Examples([[page.film, text] for text in page.texts[:3]], [file, text], label="For example")
        with gr.Column():
            shown = gr.HTML()

    @clear_errors
    def run(file: str | None, text: str):
        path = page.upload(file)
        text = page.text(text, "sentence")
        curve = similarity_over_time(page.encoder, path, text)
        return f"<div>{page.clips.player(path, element=FOLLOW)}{plot(curve, text)}</div>"

    button.click(run, [file, text], shown, api_name="over_time", concurrency_id="label")


TABS = {"Search": search, "Label": label, "Chat": chat, "Adapter in/out": adapter, "Over time": over_time}


@torch.inference_mode()
def _query(page: Material, path: str) -> np.ndarray:
    """The unit feature (P,) of a clip or a picture."""
    if Path(path).suffix.lower() not in STILLS:
        (video,) = page.encoder.with_settings(page.index.info["settings"]).encode_videos([path])
        if video.error is not None:
            raise video.error
        return video.feature
    model = page.encoder.model
    pixels = page.encoder.processor(images=[load_image(path)], return_tensors="pt")["pixel_values"]
    feature = model.get_image_features(pixels.to(model.device, model.dtype)).pooler_output[0]
    return torch.nn.functional.normalize(feature.float(), dim=-1).cpu().numpy()


def _moment(page: Material, row: dict[str, Any]) -> tuple[float | None, float | None]:
    """Of an index without moments a row is a whole video."""
    return (None, None) if page.index.info["moments"] is None else (row["start"], row["end"])


def _caption(path: str, start: float | None, end: float | None, score: float) -> str:
    moment = "" if start is None else f" {span_text(start, end)}"
    return f"{Path(path).name}{moment} ({score:.2f})"


def _thumbnail(page: Material, row: dict[str, Any]) -> np.ndarray:
    """The frame in the middle of what the model saw."""
    settings = page.index.info["settings"]
    try:
        with closing(Film(row["path"], settings["on_damage"], tuple(settings["background"]))) as film:
            return film.at([row["timestamps"][len(row["timestamps"]) // 2]])[0]
    except VideoError:  # moved or damaged since it was indexed: its caption still says what was there
        return _GREY


def _play(page: Material, moment: tuple) -> tuple[str, str]:
    path, start, end, score = moment
    return page.clips.player(path, start, end), f"**{say(ValueError(_caption(path, start, end, score)))}**"


def _cost(page: Material, messages: list, input_ids: torch.Tensor) -> str:
    kinds = [part["type"] for message in messages for part in message["content"] if part["type"] != "text"]
    costs = []
    for kind, tokens in zip(("image", "video"), page.chat.visual_tokens(input_ids), strict=True):
        if count := kinds.count(kind):
            costs.append(f"{count} {kind}{'s' * (count > 1)}, {tokens // count} tokens each")
    return f"{'; '.join(costs)}; {input_ids.shape[1]} tokens in all" if costs else ""
