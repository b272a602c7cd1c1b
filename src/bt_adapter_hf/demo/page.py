"""The page: five tabs, and the server of it."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr
from starlette.routing import Route

from .material import Material
from .tabs import TABS


UPLOADS_ARE_KEPT = 900  # seconds
CSS = """
.player {width: 100%; max-height: 360px; object-fit: contain; background: #111; border-radius: 8px}
.over-time {width: 100%; cursor: crosshair; font-size: 13px}
.over-time text {fill: currentColor}
.over-time polyline {fill: none; stroke: #2f5fd0; stroke-width: 2.5}
.over-time circle {fill: #2f5fd0}
.over-time .axis {stroke: currentColor; opacity: .4}
.over-time .cursor {stroke: #b8651b; stroke-width: 2}
.or {color: inherit !important}
.dark {--color-accent: #a5b4fc}
"""


def build(material: Material) -> gr.Blocks:
    title = "BT-Adapter: an image-language model that sees video"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(60, UPLOADS_ARE_KEPT)) as blocks:
        gr.Markdown(f"# {title}\nA small branch beside a frozen image model reads the order of the frames.")
        with gr.Tabs():
            for name, show in TABS.items():
                with gr.Tab(name):
                    show(material)
    return blocks


@contextmanager
def serve(material: Material, host: str, port: int, queue: int = 16) -> Iterator[str]:
    """Serves the page; yields its address.

    Raises:
        OSError: the port is taken.
    """
    blocks = build(material)
    blocks.queue(max_size=queue, default_concurrency_limit=1)
    app, address, _ = blocks.launch(
        server_name=host,
        server_port=port or _free_port(host),
        max_file_size=f"{material.limits.megabytes}mb",
        theme=_theme(),
        css=CSS,
        footer_links=[],
        share=False,
        ssr_mode=False,
        prevent_thread_lock=True,
        quiet=True,
        show_error=False,  # what is not foreseen stays in the log of this process
    )
    app.router.routes.insert(
        0, Route("/clip/{name}", lambda request: material.clips.response(request.path_params["name"]))
    )
    try:
        yield address
    finally:
        blocks.close(verbose=False)


def _theme() -> gr.themes.Base:
    """Fonts of the visitor's machine, none from elsewhere; colours whose contrast is at least 4.5 to 1."""
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    return theme.set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
        block_label_text_color="*primary_800",
        block_title_text_color="*primary_800",
        color_accent="*primary_600",
        link_text_color_dark="*primary_300",
    )


def wait() -> None:
    """Until Ctrl-C."""
    threading.Event().wait()


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
        server.bind((host, 0))
        return server.getsockname()[1]
