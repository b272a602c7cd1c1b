# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Search your videos
#
# Offline, with the model inside the package. It knows moving digits; for real videos name your model.
# Install in the clone: `pip install -c constraints.txt '.[quickstart]'`. As a notebook:
# `jupytext --to ipynb search_your_videos.py`.

# %%
from pathlib import Path

from PIL import Image

from bt_adapter_hf.data.moving_digits import write_clips
from bt_adapter_hf.search.contact_sheet import draw_contact_sheet
from bt_adapter_hf.search.encoding import VideoEncoder
from bt_adapter_hf.search.files import find_videos
from bt_adapter_hf.search.index import VideoIndex
from bt_adapter_hf.search.writer import IndexWriter


VIDEOS = None  # a folder of yours, with MODEL
MODEL = None  # id or folder; None: the one inside the package

# %% [markdown]
# Without videos of yours, thirty-six clips of handwritten digits that move.

# %%
if VIDEOS is None:
    VIDEOS = "clips"
    write_clips(VIDEOS, "test", 36, seed=5, formats=("mp4",))
paths = find_videos([VIDEOS])
len(paths)

# %% [markdown]
# ## An index
#
# Features of all videos, in a folder. Run it again later: it adds what is new, and what is gone is marked in the hits.

# %%
encoder = VideoEncoder.from_pretrained(MODEL)
with IndexWriter("videos.index", encoder) as writer:
    print(writer.update(paths, [VIDEOS]))
index = VideoIndex.load("videos.index")

# %% [markdown]
# ## A sentence

# %%
QUERY = "a blue zero moves from the left to the right"
query = encoder.encode_texts([QUERY])
(hits,) = index.search(query, k=4)
for hit in hits:
    print(f"{hit.score:.3f}  {Path(hit.row['path']).name}")

# %% [markdown]
# The second and third often show the same digit moving another way: an image model sees no difference, the branch
# does.
# These are the frames that the model saw:

# %%
sheet: Image.Image = draw_contact_sheet(QUERY, hits, index, index.median_score(query[0]))
sheet
