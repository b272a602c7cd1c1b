# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Train a branch on your clips
#
# From a plain CLIP, which has only seen stills, to one that reads the order of frames, on a CPU. Needs
# `pip install -c constraints.txt '.[quickstart,train]'` in the clone. More clips and epochs teach it more: the model
# inside the package was made so, by `recipes/moving_digits`.

# %%
import json
from pathlib import Path

from PIL import Image

from bt_adapter_hf import BTAdapterModel, BTAdapterProcessor, unload_bt_adapter
from bt_adapter_hf.assets import default_model_path
from bt_adapter_hf.cli.main import main
from bt_adapter_hf.data.moving_digits import write_clips


CLIPS, EPOCHS = 720, 10

# %% [markdown]
# ## A CLIP without a branch
#
# Of yours it would be an id such as `openai/clip-vit-large-patch14`. Here the one inside the package, its branch
# taken away.

# %%
clip = unload_bt_adapter(BTAdapterModel.from_pretrained(default_model_path()))
processor = BTAdapterProcessor.from_pretrained(default_model_path())
clip.save_pretrained("clip")
processor.image_processor.save_pretrained("clip")
processor.tokenizer.save_pretrained("clip")
type(clip).__name__

# %% [markdown]
# ## Clips with captions
#
# A folder with a `metadata.jsonl`, one line a clip: `{"file_name": "clip1.mp4", "text": "what it shows"}`.

# %%
write_clips("videos/train", "train", CLIPS, seed=1, formats=("mp4",))
write_clips("videos/validation", "test", 36, seed=2, formats=("mp4",))
assert main(["check-data", "videos/train", "--model", "clip"]) == 0

# %% [markdown]
# ## Train
#
# Interrupt it when you like; the same line with `--resume` goes on with the same losses.

# %%
settings = f"--batch-size 36 --workers 0 --device cpu --epochs {EPOCHS} --learning-rate 1e-3 --logging-steps 1"
command = ["pretrain", "--model", "clip", "--train", "videos/train", "--validation", "videos/validation"]
assert main([*command, "--output-dir", "run", *settings.split()]) == 0

# %% [markdown]
# ## What it has learned
#
# Recall of the clips that no training has seen, and the same with their frames reversed: a branch that reads time
# falls there.

# %%
metrics = json.loads(Path("run/run_summary.json").read_text())["metrics"]
{name: value for name, value in metrics.items() if "R1" in name}

# %%
Image.open("run/losses.png")
