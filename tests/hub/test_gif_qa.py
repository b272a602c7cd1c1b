"""Publishing GIF question answering: whole models with their code and card, and LoRA of a model without a branch."""

import peft
import pytest

from bt_adapter_hf import lora_config
from bt_adapter_hf.hub.card import model_card
from bt_adapter_hf.hub.contents import Contents, collect_files
from bt_adapter_hf.hub.remote_code import code_files
from tests.chat import tiny_gif_qa


pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


def test_a_whole_model(tmp_path):
    model = tiny_gif_qa.model()
    model.save_pretrained(tmp_path)
    tiny_gif_qa.processor(model.config).save_pretrained(tmp_path)
    assert Contents.of(tmp_path).kind == "chat model"
    files, _ = collect_files(tmp_path)
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json"} <= files.keys()
    card = str(model_card(tmp_path, "org/gif-qa"))
    assert "A frozen X-CLIP" in card and "BTAdapterGifQAForConditionalGeneration" in card and "branch" not in card
    code = code_files(tmp_path)
    assert {"modeling_bt_adapter_gif_qa.py", "modeling_xclip_frames.py", "processing_bt_adapter_gif_qa.py"} <= set(
        code
    )


def test_lora_of_a_model_without_a_branch(tmp_path):
    model = tiny_gif_qa.model()
    peft.get_peft_model(model, lora_config(model, r=2)).save_pretrained(tmp_path)
    assert Contents.of(tmp_path).kind == "LoRA adapter"
    files, _ = collect_files(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files.keys()
    assert "LoRA and the connector of a frozen X-CLIP" in str(model_card(tmp_path, "org/gif-qa-lora"))
