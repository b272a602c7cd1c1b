# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Chat, with the adapter in and out
#
# A LLaVA that sees only images gets a branch that reads the order of frames, and gives it back. Offline, with the chat
# model inside the package, which knows moving digits.

# %%
import torch
from PIL import Image

from bt_adapter_hf import (
    BTAdapterLlavaForConditionalGeneration,
    BTAdapterLlavaProcessor,
    load_bt_adapter,
    load_video,
    save_bt_adapter,
    unload_bt_adapter,
)
from bt_adapter_hf.assets import default_chat_model_path
from bt_adapter_hf.data.moving_digits import write_clips


write_clips("clips", "test", 2, seed=5, formats=("mp4",))
CLIPS = ["clips/test-5-00000.mp4", "clips/test-5-00001.mp4"]  # the second moves the other way
model = BTAdapterLlavaForConditionalGeneration.from_pretrained(default_chat_model_path()).eval()
processor = BTAdapterLlavaProcessor.from_pretrained(default_chat_model_path())


def prepare(part: dict, question: str) -> dict:
    message = [{"role": "user", "content": [part, {"type": "text", "text": question}]}]
    return processor.apply_chat_template(
        message, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def ask(model, part: dict, question: str = "How does it move?") -> str:
    inputs = prepare(part, question)
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


# %% [markdown]
# ## With the branch

# %%
with_branch = [ask(model, {"type": "video", "path": clip}) for clip in CLIPS]
with_branch

# %% [markdown]
# ## Without it
#
# `save_bt_adapter` writes the branch alone; `unload_bt_adapter` gives the native LLaVA. It sees images:
# the middle frame.

# %%
save_bt_adapter(model, "adapter")
image = Image.fromarray(load_video(CLIPS[0], num_frames=3)[0][1])
picture = prepare({"type": "image", "image": image}, "What do you see?")
with torch.no_grad():
    before = model(**picture).logits
llava = unload_bt_adapter(model)
with torch.no_grad():
    native = llava(**picture).logits
type(llava).__name__, ask(llava, {"type": "image", "image": image}, "What do you see?")

# %% [markdown]
# ## In again
#
# Images are answered exactly as before, bit by bit:

# %%
model = load_bt_adapter(llava, "adapter")
with torch.no_grad():
    after = model(**picture).logits
assert torch.equal(before, native) and torch.equal(native, after)
assert [ask(model, {"type": "video", "path": clip}) for clip in CLIPS] == with_branch

# %% [markdown]
# What was asked about: the frames of both clips, in order.

# %%
strips = [load_video(clip, num_frames=8)[0] for clip in CLIPS]
Image.fromarray(torch.cat([torch.cat(list(torch.from_numpy(strip)), dim=1) for strip in strips]).numpy())
