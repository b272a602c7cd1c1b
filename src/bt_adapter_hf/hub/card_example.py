"""The examples of model cards: code that runs as it stands, for each kind of repository."""

from .card_text import is_hub_id
from .contents import CHAT_CLASSES, Contents


_TEXTS = """inputs = processor(videos=["video.mp4"], text=["a caption", "another"], padding=True, return_tensors="pt")
print(model(**inputs).logits_per_video.softmax(-1))"""
_PIXELS = """videos = torch.randn(1, 8, 3, {size}, {size})  # (B, T, 3, H, W), normalised as the image tower's pixels
print(model{method}(videos).pooler_output.shape)"""
_CHAT = """chat = [
    {
        "role": "user",
        "content": [{"type": "video", "path": "video.mp4"}, {"type": "text", "text": "What happens?"}],
    }
]
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device)
print(processor.batch_decode(model.generate(**inputs, max_new_tokens=64), skip_special_tokens=True)[0])"""


def example(contents: Contents, repo_id: str, base: tuple[str | None, str | None], has_processor: bool) -> str:
    """How to use a repository with this package installed.

    Args:
        base: name and revision of the base model.
        has_processor: whether the repository holds a processor.
    """
    processor = repo_id if has_processor else base[0] if is_hub_id(base[0]) else None
    if contents.kind == "processor":
        imports = "import bt_adapter_hf  # registers the classes\nfrom transformers import AutoProcessor"
        return f'{imports}\n\nprocessor = AutoProcessor.from_pretrained("{repo_id}")'
    if contents.kind in ("dual encoder", "tower"):
        name = "BTAdapterModel" if contents.kind == "dual encoder" else "BTAdapterVisionModel"
        return _encoder(name, repo_id, contents.image_size, has_processor)
    if contents.kind == "chat model":
        return _chat(contents, repo_id, processor)
    if not is_hub_id(base[0]) or contents.model_type is None:
        return (
            "from bt_adapter_hf import load_bt_adapter\n\n"
            f'model = load_bt_adapter(model, "{repo_id}")  # a model in memory, with the image tower named above'
        )
    if contents.kind == "LoRA adapter":
        return _chat(contents, repo_id, processor, base)
    if contents.model_type in CHAT_CLASSES:
        return _chat(contents, repo_id, processor)
    name = "BTAdapterModel" if contents.model_type == "bt_adapter" else "BTAdapterVisionModel"
    return _encoder(name, repo_id, contents.image_size, has_processor)


def example_without_package(contents: Contents, repo_id: str) -> str | None:
    """How to load a repository that carries its code; None for one that this package alone can load."""
    auto = {"dual encoder": "AutoModel", "tower": "AutoModel", "chat model": "AutoModelForImageTextToText"}
    if contents.kind not in auto:
        return None
    name = auto[contents.kind]
    return f'from transformers import {name}\n\nmodel = {name}.from_pretrained("{repo_id}", trust_remote_code=True)'


def _encoder(name: str, repo_id: str, size: int, has_processor: bool) -> str:
    load = f'model = {name}.from_pretrained("{repo_id}").eval()'
    if name == "BTAdapterModel" and has_processor:
        processor = f'processor = BTAdapterProcessor.from_pretrained("{repo_id}")'
        return f"from bt_adapter_hf import BTAdapterModel, BTAdapterProcessor\n\n{load}\n{processor}\n{_TEXTS}"
    method = ".get_video_features" if name == "BTAdapterModel" else ""
    return f"import torch\nfrom bt_adapter_hf import {name}\n\n{load}\n{_PIXELS.format(size=size, method=method)}"


def _chat(
    contents: Contents, repo_id: str, processor: str | None, lora_base: tuple[str, str | None] | None = None
) -> str:
    """Of a whole chat model or an adapter; or with `lora_base`, name and revision, of LoRA that goes into it."""
    host = CHAT_CLASSES[contents.model_type]
    if lora_base is None:
        names = [f"{host}ForConditionalGeneration"]
        load = [f'model = {host}ForConditionalGeneration.from_pretrained("{repo_id}")']
    else:
        name, revision = lora_base
        at = f', revision="{revision}"' if revision else ""
        names = ["load_bt_adapter"]
        load = [
            f'model = AutoModelForImageTextToText.from_pretrained("{name}"{at})',
            f'model = load_bt_adapter(model, "{repo_id}")',
        ]
    if processor is not None:
        names.append(f"{host}Processor")
        load += [f'processor = {host}Processor.from_pretrained("{processor}")', _CHAT]
    imports = [f"from bt_adapter_hf import {', '.join(sorted(names))}"]
    if lora_base is not None:
        imports.append("from transformers import AutoModelForImageTextToText")
    return "\n".join([*imports, "", *load])
