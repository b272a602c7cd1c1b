"""Search hits as a page: for each its score, the frames that the model saw, and a player that starts at the moment."""

import base64
import html
import io
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from ..adapters.writing import printable, written_whole
from .contact_sheet import load_strip
from .index import Hit, VideoIndex
from .moments import span_text


_STYLE = """
body {font: 16px system-ui, sans-serif; background: #fbfaf7; color: #1d1d1f}
body {max-width: 1100px; margin: 2em auto; padding: 0 1em}
article {border-top: 1px solid #e3e0d8; padding: 1em 0}
article {display: grid; grid-template-columns: minmax(0, 1fr) 360px; gap: 1em}
video, .still {width: 100%; max-height: 240px; background: #111; border-radius: 6px; object-fit: contain}
.frames {display: flex; gap: 4px} .frames img {min-width: 0; flex: 1 1 0; border-radius: 3px; object-fit: contain}
meter {width: 100%} h2 {font-size: 1em; overflow-wrap: anywhere} p {color: #55535c} .alarm {color: #b3261e}
@media (max-width: 700px) {article {grid-template-columns: 1fr}}
@media (prefers-color-scheme: dark) {body {background: #17171a; color: #eee} p {color: #aaa}}
"""


def write_html_sheet(
    path: str | os.PathLike, query: str, hits: Sequence[Hit], index: VideoIndex, floor: float
) -> None:
    """Write a page, by the arguments of `write_contact_sheet`.

    Frames are inside it; videos are not, and are looked for where they lie, as seen from the page.
    """
    best = hits[0].score if hits else floor
    articles = [_article(hit, index, Path(path).absolute().parent, floor, best) for hit in hits]
    title = html.escape(printable(query))
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1><p>{len(hits)} of {len(index)} "
        f"{'videos' if index.info['moments'] is None else 'moments'}</p>{''.join(articles)}"
    )
    with written_whole(path) as file:
        file.write_text(page, encoding="utf-8")


def _article(hit: Hit, index: VideoIndex, folder: Path, floor: float, best: float) -> str:
    row = hit.row
    name = html.escape(printable(os.path.basename(row["path"])), quote=True)
    strip = load_strip(hit, index.info["settings"])
    is_moment = index.info["moments"] is not None and row["start"] is not None
    span = f" · {span_text(row['start'], row['end'])}" if is_moment else ""
    share = (hit.score - floor) / (best - floor) if best > floor else 1.0
    if strip.error is not None:
        frames, player = f'<p class="alarm">{html.escape(strip.error)}</p>', ""
    else:
        frames = "".join(
            f'<img src="{_inside(picture)}" alt="{name} at {second:.1f} s">'
            for picture, second in zip(strip.frames, strip.seconds, strict=True)
        )
        source = quote(os.fsencode(os.path.relpath(row["path"], folder)))
        if row["path"].lower().endswith(".gif"):
            player = f'<img class="still" src="{source}" alt="{name}" loading="lazy">'
        else:
            moment = (
                f"#t={row['start']:.2f}" + ("" if row["end"] is None else f",{row['end']:.2f}") if is_moment else ""
            )
            player = (
                f'<video src="{source}{moment}" controls muted playsinline preload="none" aria-label="{name}" '
                f'poster="{_inside(strip.frames[len(strip.frames) // 2])}"></video>'
            )
    share = min(1.0, max(0.0, share))
    return (
        f'<article><div><h2>{hit.rank}. {name}{span}</h2><meter min="0" max="1" value="{share:.3f}"></meter>'
        f'<p>cosine {hit.score:.3f}</p><div class="frames">{frames}</div></div><div>{player}</div></article>'
    )


def _inside(picture) -> str:
    """A picture as an address."""
    data = io.BytesIO()
    picture.save(data, format="JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
