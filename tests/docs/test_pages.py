"""The code blocks of the pages, as they stand: `bash` and `python` are run, what is only a form is `text`.

In one process, on the models inside the package, or on tiny ones under the ids that the pages name.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from bt_adapter_hf import BTAdapterLlavaForConditionalGeneration, BTAdapterLlavaProcessor, save_bt_adapter
from bt_adapter_hf.cli.main import main
from bt_adapter_hf.data.moving_digits import write_clips
from tests import clip_tools, tiny_instructions, tiny_pairs
from tests.chat import saved_hosts
from tests.evaluation import layouts
from tests.evaluation.judge_server import JudgeServer
from tests.hub.conftest import hf_home, hub  # noqa: F401 (fixtures)
from tests.hub.server import TOKEN


DOCS = Path(__file__).parents[2] / "docs"
SHIPPED = (
    "how_it_works.md",
    "install.md",
    "labels.md",
    "many_machines.md",
    "quicktour.md",
    "search.md",
    "serving.md",
)  # these run on what is inside the package
LLAVA = "llava-hf/llava-1.5-7b-hf"


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, code) of a page, in order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return [found for found in re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL) if found[0] in ("bash", "python")]


def run(page: str, more: dict[str, list[str]] | None = None, only: str = "") -> dict:
    """Runs a page; `more` are options behind those of a command, or of a command and its first word.

    Returns the names that its Python has made.
    """
    names: dict = {}
    for language, code in blocks(page):
        if not code.startswith(only):
            continue
        if language == "python":
            exec(compile(code, f"docs/{page}", "exec"), names)
            continue
        for line in filter(None, map(str.strip, code.replace("\\\n", " ").splitlines())):
            program, command, *options = shlex.split(line, comments=True)
            assert program == "bt-adapter", line
            names_of = (command, " ".join([command, *options[:1]]))
            added = [option for name in names_of for option in (more or {}).get(name, [])]
            assert main([command, *options, *added]) == 0, line
    return names


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the clips that the quicktour makes, and labels."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("home")
    write_clips(folder / "clips", "test", 12, seed=5, formats=("mp4",))
    (folder / "labels.txt").write_text(
        "a red zero moves from the left to the right\na red zero grows from small to big"
    )
    return folder


@pytest.mark.parametrize("page", SHIPPED)
def test_on_what_is_inside_the_package(page, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    run(page)
    if page == "quicktour.md":
        out = capsys.readouterr().out
        first = next(line for line in out.splitlines() if re.match(r" +1 ", line))
        assert "test-5-00011.mp4" in first and "it moves from the left to the right" in out


@pytest.fixture
def models(hub, tmp_path, monkeypatch):  # noqa: F811
    """LLaVA, an adapter and a chat model with it, under the ids of the pages; in the working directory, too."""
    monkeypatch.chdir(tmp_path)
    native, adapter = saved_hosts.save("llava", tmp_path / "hosts")
    hub.put_files(LLAVA, native)
    chat = BTAdapterLlavaForConditionalGeneration.from_pretrained(LLAVA, bt_adapter=adapter)
    save_bt_adapter(chat, "my-adapter")
    chat.save_pretrained("chat")
    BTAdapterLlavaProcessor.from_pretrained(native, num_frames=4).save_pretrained("chat")
    hub.put_files("org/bt-adapter-llava", tmp_path / "chat")
    hub.put_files("org/bt-adapter-clip-l14", tmp_path / "my-adapter")
    for name in ("clip.mp4", "a.mp4"):
        clip_tools.write_clip(tmp_path / name, count=6)
    Image.new("RGB", (32, 24)).save("photo.jpg")
    torch.manual_seed(0)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")
def test_chat(models):
    pytest.importorskip("bitsandbytes")
    run("chat.md", {"chat": ["--max-new-tokens", "4", "--num-frames", "4"]})
    assert Path("tuned", "bt_adapter_config.json").is_file()


def test_finetuning(models, tmp_path):
    table = tiny_instructions.write_table(tmp_path / "videos", 4)
    shutil.move(table, tmp_path / "videos" / "train.jsonl")
    clip_tools.write_clip(tmp_path / "videos" / "clip1.mp4", count=6)
    shutil.copytree("my-adapter", "my-adapter.run/adapter")
    Path("my-adapter").rename("unused")
    Path("my-adapter.run").rename("my-adapter")
    small = ["--num-frames", "4", "--epochs", "1", "--set", "use_cpu=true", "--workers", "0", "--no-bf16"]
    run("finetuning.md", {"finetune": small, "check-data": ["--workers", "1"], "chat": ["-q", "what happens ?"]})


def test_evaluation(models, hub, tiny_checkpoint, tmp_path, monkeypatch):  # noqa: F811
    """Every command of the page, on tiny models and few clips; the other libraries' blocks in their own tests."""
    pytest.importorskip("sklearn")
    hub.users[TOKEN] = "YOUR_NAME"
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    shutil.copytree(tiny_checkpoint, "my-model")
    Path("chat").rename("my-chat-model")
    layouts.videochatgpt(tmp_path / "bench")
    tiny_pairs.write_table(tmp_path / "videos" / "test", rows=4)
    rows = [{"video": f"clip{n}.mp4", "text": ("run", "jump")[n % 2]} for n in range(4)]
    layouts.table(tmp_path / "hmdb51.csv", rows)
    shutil.copytree("videos/test", "hmdb51")
    Path("classes.txt").write_text("run\njump\n")
    tiny = ["--model", "my-model"]
    with JudgeServer(lambda text, times: '{"score": 3, "pred": "yes"}').running() as judge:
        monkeypatch.setenv("OPENAI_BASE_URL", judge.url)
        more = {
            "eval recognition": tiny,
            "eval temporal": ["--items", "4"],
            "eval qa": ["--items", "2", "--controls", "blind"],
            "eval chat-bench": ["--data-root", "bench", "--max-new-tokens", "2", "--controls", "blind"],
        }
        run("evaluation.md", more, only="bt-adapter")
    assert Path("report.html").is_file() and b"model-index" in hub.files("YOUR_NAME/my-model")["README.md"]
    evaluate = pytest.importorskip("evaluate")
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "metrics"))
    metric = run("evaluation.md", only="import evaluate")["metric"]
    assert metric.compute(predictions=[[0.9, 0.1], [0.2, 0.8]], references=[0, 1])["R1"] == 100
