"""The entry point of lmms-eval, over a task of our own with the tiny chat model."""

import json

import pytest

from bt_adapter_hf import BTAdapterLlavaForConditionalGeneration, BTAdapterLlavaProcessor
from bt_adapter_hf.evaluation.answering import Answerer
from bt_adapter_hf.evaluation.frames import read_frames
from tests.chat import saved_hosts
from tests.evaluation import layouts


lmms_eval = pytest.importorskip("lmms_eval")  # it pins other versions: in an environment of its own

TASK = """\
task: tiny_video
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function tiny_utils.visual
doc_to_text: !function tiny_utils.text
doc_to_messages: !function tiny_utils.messages
doc_to_target: answer
process_results: !function tiny_utils.results
generation_kwargs: {{max_new_tokens: 3, temperature: 0}}
metric_list: [{{metric: words, aggregation: mean, higher_is_better: true}}]
"""
UTILS = """\
def visual(doc): return [doc["video"]]
def text(doc, kwargs=None): return doc["question"]
def messages(doc, kwargs=None):
    parts = [{"type": "video", "url": doc["video"]}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": parts}]
def results(doc, found): return {"words": float(found[0].strip() == doc["answer"])}
"""


def test_a_task_of_our_own(tmp_path):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    native, adapter = saved_hosts.save("llava", tmp_path)
    model = BTAdapterLlavaForConditionalGeneration.from_pretrained(native, bt_adapter=adapter).eval()
    processor = BTAdapterLlavaProcessor.from_pretrained(native, num_frames=4)
    model.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    clips = [str(layouts.clip(tmp_path / f"{step}.mp4", step)) for step in (1, 3)]
    answerer = Answerer(model, processor, "tiny", max_new_tokens=3)
    asked = [("what happens ?", clips[0]), ("where is the red square ?", clips[1])]
    rows = [
        {
            "video": path,
            "question": question,
            "answer": answerer.answer(read_frames(path, processor.video_processor), [question])[0],
        }
        for question, path in asked
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "tiny.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    (tmp_path / "task" / "tiny_utils.py").write_text(UTILS)
    found = simple_evaluate(
        model="bt_adapter",
        model_args=f"pretrained={tmp_path / 'whole'},num_frames=4,device=cpu",
        tasks=["tiny_video"],
        task_manager=TaskManager(include_path=str(tmp_path / "task")),
        batch_size=2,
        bootstrap_iters=0,
    )
    assert found["results"]["tiny_video"]["words,none"] == 1.0
