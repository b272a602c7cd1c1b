"""Chat models copied and pickled after they have run."""

import copy
import pickle

import pytest
import torch

from bt_adapter_hf import get_bt_adapter_model
from tests.chat import tiny_hosts


@torch.no_grad()
@pytest.mark.parametrize("host", ["llava", "instructblip", "blip2"])
def test_pickle_and_deepcopy_after_a_forward_pass(host):
    model = get_bt_adapter_model(getattr(tiny_hosts, host)()).eval()
    inputs = tiny_hosts.right_padded(tiny_hosts.video(3))
    expected = features(model, inputs)
    language_model = model.get_decoder() if host == "llava" else model.language_model
    ids = torch.tensor([[4, 5, 6]])
    if not model.config.get_text_config().is_encoder_decoder:
        language_model(input_ids=ids, output_hidden_states=True)
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), model):
        assert type(copied) is type(model)
        assert all(torch.equal(a, b) for a, b in zip(features(copied, inputs), expected, strict=True))


def features(model, inputs) -> list[torch.Tensor]:
    extra = {"qformer_input_ids": torch.tensor([[4, 5]])} if "InstructBlip" in type(model).__name__ else {}
    output = model.get_video_features(**inputs, **extra)
    return list(getattr(output, "pooler_output", output))
