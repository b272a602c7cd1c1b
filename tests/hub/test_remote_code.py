"""Repositories in a fresh process: by id with the package, and with the code that they carry where it is absent."""

import pytest
import torch
from safetensors.torch import save_file

from bt_adapter_hf import BTAdapterModel
from bt_adapter_hf.hub.push import push_to_hub
from tests import tiny_pairs
from tests.chat import saved_hosts, tiny_hosts
from tests.hub.clients import run_python
from tests.hub.test_push import HOSTS


pytestmark = pytest.mark.filterwarnings("ignore:Warnings while validating metadata")

ABSENT = """
import os, sys
sys.modules["bt_adapter_hf"] = None  # as if it were not installed
sys.stdin = open(os.devnull)  # nobody answers questions
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
"""


@pytest.fixture
def dual(hub, tmp_path):
    """Dual encoder "tester/dual" with its processor, its tower "tester/tower", and what they make of two videos."""
    torch.manual_seed(0)
    model = BTAdapterModel(tiny_pairs.model().config).eval()
    tiny_hosts.stir(model.vision_model.bt_adapter)
    push_to_hub(model, "tester/dual", processor=tiny_pairs.processor())
    push_to_hub(model.vision_model, "tester/tower")
    videos = torch.randn(2, 4, 3, 16, 16)
    with torch.no_grad():
        expected = {"videos": videos, "dual": model.get_video_features(videos).pooler_output}
        expected["tower"] = model.vision_model(videos).pooler_output
    save_file(expected, tmp_path / "expected.safetensors")
    return model


COMPARE = """
expected = load_file("expected.safetensors")
with torch.no_grad():
    for kind, features in (("dual", lambda m, v: m.get_video_features(v)), ("tower", lambda m, v: m(v))):
        model = AutoModel.from_pretrained(f"tester/{kind}", **trust).eval()
        found = features(model, expected["videos"]).pooler_output
        torch.testing.assert_close(found, expected[kind], atol=1e-6, rtol=0)
        print(type(model).__module__.split(".")[0])
processor = AutoProcessor.from_pretrained("tester/dual", **trust)
print(tuple(processor(videos=torch.zeros(9, 3, 20, 20), text="red", return_tensors="pt")["pixel_values_videos"].shape))
"""


def test_without_the_package_and_trusted(hub, hf_home, dual):
    done = run_python(ABSENT + "trust = {'trust_remote_code': True}\n" + COMPARE, hub, hf_home)
    assert done.stdout.split("\n")[:3] == ["transformers_modules", "transformers_modules", "(1, 4, 3, 16, 16)"]


def test_without_the_package_and_not_trusted(hub, hf_home, dual):
    """An error, and no line of the repository's code has run or even been fetched."""
    code = """
for load, name in ((AutoModel, "tester/dual"), (AutoModel, "tester/tower"), (AutoProcessor, "tester/dual")):
    try:
        load.from_pretrained(name)
    except (ValueError, OSError) as error:
        print(f"named={'trust_remote_code' in str(error)}")
print(f"loaded={sum('transformers_modules.' in name for name in sys.modules)}")
"""
    done = run_python(ABSENT + code, hub, hf_home)
    assert done.stdout.count("named=True") == 3 and "loaded=0" in done.stdout
    assert not [request for request in hub.requests() if request.method == "GET" and request.path.endswith(".py")]
    assert not list(hf_home.rglob("modeling_bt_adapter.py"))


def test_with_the_package_its_own_code_is_used(hub, hf_home, dual):
    """By id, with and without trust: the repository's code is not even fetched."""
    setup = "import torch, bt_adapter_hf\nfrom safetensors.torch import load_file\n"
    setup += "from transformers import AutoModel, AutoProcessor\n"
    done = run_python(setup + "for trust in ({}, {'trust_remote_code': True}):\n" + indented(COMPARE), hub, hf_home)
    assert done.stdout.split("\n")[:3] == ["bt_adapter_hf", "bt_adapter_hf", "(1, 4, 3, 16, 16)"]
    assert "transformers_modules" not in done.stdout
    assert not [request for request in hub.requests() if request.method == "GET" and request.path.endswith(".py")]


def indented(code: str) -> str:
    return "".join(f"    {line}\n" for line in code.strip().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTS)
def test_chat_hosts_without_the_package(hub, hf_home, name, tmp_path):
    native, adapter = saved_hosts.save(name, tmp_path / "host")
    model_class, processor_class = HOSTS[name]
    model = model_class.from_pretrained(native, bt_adapter=adapter).eval()
    processor = processor_class.from_pretrained(native, num_frames=4)
    push_to_hub(model, "tester/chat", processor=processor)
    tiny_pairs.write_clip(tmp_path / "clip.mp4", (220, 40, 40), step=2)
    code = """
import sys
model = AutoModelForImageTextToText.from_pretrained("tester/chat", **trust).eval()
processor = AutoProcessor.from_pretrained("tester/chat", **trust)
chat = [{"role": "user", "content": [{"type": "video", "path": "clip.mp4"}, {"type": "text", "text": "what happens"}]}]
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
print(processor.batch_decode(model.generate(**inputs, max_new_tokens=8, do_sample=False)))
print(type(model).__module__.split(".")[0])
"""
    ours = "import bt_adapter_hf\nfrom transformers import AutoModelForImageTextToText, AutoProcessor\ntrust = {}\n"
    here = run_python(ours + code, hub, hf_home).stdout.splitlines()
    there = run_python(ABSENT + "trust = {'trust_remote_code': True}\n" + code, hub, hf_home).stdout.splitlines()
    assert here[0] == there[0] and (here[1], there[1]) == ("bt_adapter_hf", "transformers_modules")
