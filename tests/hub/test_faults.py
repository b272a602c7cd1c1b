"""What push, pull and stream do when something goes wrong on the way: a further try that succeeds, or one named error.

Run with `-s` to see the table of faults and results.
"""

import copy
import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import CLIPModel

from bt_adapter_hf import BTAdapterModel, get_bt_adapter_model, load_bt_adapter, save_bt_adapter
from bt_adapter_hf.adapters.files import AdapterError
from bt_adapter_hf.adapters.host_modules import find_tower
from bt_adapter_hf.cli.main import main
from bt_adapter_hf.data.chunk_store import ChunkStoreError
from bt_adapter_hf.data.sources import load_table
from bt_adapter_hf.hub.push import PushError, push_to_hub
from tests import tiny_pairs
from tests.hub.conftest import both_transports
from tests.hub.faults import Fault
from tests.hub.server import Hub
from tests.hub.video_datasets import Clips, options, put


BASE, ADAPTER, MODEL, DATA = "tester/base", "tester/adapter", "tester/model", "tester/clips"
WEIGHTS = r"\.safetensors$"


# What Xet asks for in place of the older protocol's requests.
OVER_XET = {"/uploads/": "/xorbs/default/", "/objects/batch$": "/xet-write-token/", "/objects/verify$": "/shards$"}


@dataclass
class Case:
    """A fault, where it happens, and how the action must end.

    Attributes:
        error: None if the action must succeed; else the class and a pattern of its text.
        action: arguments of the action.
    """

    kind: str
    where: str = ""
    error: tuple[type[Exception], str] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    action: dict[str, Any] = field(default_factory=dict)

    def switch_on(self, hub: Hub) -> Fault:
        """The fault, where the transport of large files has what the older one has at the place of the case."""
        where, options = self.where, dict(self.options)
        if hub.xet:
            where = OVER_XET.get(where, where)
            if options.get("method") == "HEAD":  # what it tells is in the listing then
                where, options["method"] = "/xet-read-token/", "GET"
            if self.kind == "disk_full":
                options |= {"method": "POST", "port": "cas"}
        return hub.fail(self.kind, where, **options)

    @property
    def name(self) -> str:
        if self.options.get("times") == 0:  # a state, not a fault
            return self.kind
        often = {1: "once", -1: "always"}.get(self.options.get("times", 1), f"{self.options.get('times')} times")
        where = self.where.strip("/$^").replace("\\", "")
        places = [place for place in (where, self.options.get("port")) if place]
        return f"{self.kind} {often}{' at ' if places else ''}{' of '.join(places)}"


def cases(*cases: Case) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def results() -> Iterator[list[tuple[str, str, str]]]:
    """Rows (action, fault, result) of the table that is printed at the end."""
    rows: list[tuple[str, str, str]] = []
    yield rows
    widths = [max(len(row[i]) for row in rows) for i in range(2)] if rows else []
    lines = (f"{action:<{widths[0]}} | {fault:<{widths[1]}} | {result}" for action, fault, result in rows)
    sys.stdout.write("\n" + "\n".join(lines) + "\n")


def outcome(results: list, action: str, case: Case, run: Callable[[], Any]) -> Any:
    """Runs an action under a fault: what it returns, or None where it raised the error that the case names."""
    if case.error is None:
        value = run()
        results.append((action, case.name, "succeeds"))
        return value
    with pytest.raises(case.error[0], match=case.error[1]) as caught:
        run()
    assert type(caught.value) is case.error[0] or case.error[0] is Exception
    results.append((action, case.name, f"{type(caught.value).__name__}: {str(caught.value).splitlines()[0]}"))
    return None


def over(hub: Hub) -> str:
    return " over Xet" if hub.xet else ""


@pytest.fixture
def quick(monkeypatch) -> None:
    """Waits of our own between two tries, which are seconds otherwise."""
    monkeypatch.setattr("bt_adapter_hf.hub.access.RETRY_WAITS", [0.05, 0.1, 0.2])


@pytest.fixture(scope="module")
def base() -> CLIPModel:
    torch.manual_seed(0)
    return CLIPModel(tiny_pairs.clip_config()).eval()


@pytest.fixture(scope="module")
def adapter_folder(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    model = get_bt_adapter_model(copy.deepcopy(base), 2)
    for parameter in find_tower(model).bt_adapter.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    save_bt_adapter(model, folder, base_model_name_or_path=BASE)
    return folder


# --------------------------------------------------------------------------------------------------------------- push


NEW = {"target": "a new repository"}


@both_transports
@cases(
    Case("unavailable", "/api/repos/create", action=NEW),
    Case("refused", "/api/repos/create", action=NEW),
    Case("lost", "/api/repos/create", action=NEW),
    Case("lost", "/commit/", action=NEW),
    Case("refused", "/commit/", (PushError, "not be reached.*Nothing was published.*created"), {"times": -1}, NEW),
    Case("unavailable", f"/api/models/{ADAPTER}$"),
    Case("unavailable", "/preupload/"),
    Case("unavailable", "/objects/batch$"),
    Case("unavailable", "/uploads/"),
    Case("unavailable", "/objects/verify$"),
    Case("unavailable", "/commit/", options={"times": 2}),
    Case("unavailable", "/paths-info/"),
    Case("too_many", "/commit/"),
    Case("refused", "/uploads/"),
    Case("refused", "/commit/"),
    Case("lost", "/uploads/"),
    Case("lost", "/commit/"),
    Case("unavailable", "/commit/", (PushError, "did not serve .*503.*Nothing was published"), {"times": -1}),
    Case("refused", "/commit/", (PushError, "could not be reached.*Nothing was published"), {"times": -1}),
    Case("disk_full", "", (PushError, "507.*Nothing was published"), {"times": -1}),
    Case("forbidden", "/preupload/", (PushError, "403.*Nothing was published"), {"times": -1}),
    Case("wrong_token", "", (PushError, "refused the token.*Nothing was published"), {"times": -1}),
    Case("missing_revision", "", (PushError, "no revision 'refs/pr/7'"), {"times": 0}, {"revision": "refs/pr/7"}),
)
def test_push(hub, quick, results, adapter_folder, case):
    """After a push that failed the repository is as it was; after one that did not, everything is in it, once."""
    options = {"target": "an old one", **case.action}
    target, before = options.pop("target"), {}
    if target == "an old one":
        hub.put_files(ADAPTER, {"notes.txt": "what was there"})
        before = hub.files(ADAPTER)
    commits = len(hub.history(ADAPTER)) if before else 1
    fault = case.switch_on(hub)
    pushed = outcome(
        results, f"push to {target}{over(hub)}", case, lambda: push_to_hub(adapter_folder, ADAPTER, **options)
    )
    assert fault.hits or fault.times == 0
    exists = ("model", ADAPTER) in hub.repositories
    if pushed is None:
        assert not exists or len(hub.history(ADAPTER)) == commits
        assert not before or hub.files(ADAPTER) == before
        return
    assert len(hub.history(ADAPTER)) == commits + 1 and hub.head(ADAPTER) == pushed.commit
    files = hub.files(ADAPTER)
    for name in ("bt_adapter_config.json", "bt_adapter.safetensors"):
        assert files[name] == (adapter_folder / name).read_bytes()
    assert before.items() <= files.items() and "README.md" in files


# --------------------------------------------------------------------------------------------------------------- pull


def downloaded(home: Path) -> Iterator[tuple[Path, bytes]]:
    """The files that a cache offers to its users, each with its content."""
    for path in home.glob("hub/models--*/snapshots/*/**/*"):
        if path.is_file():
            yield path, path.read_bytes()


BODIES = [
    Case("unavailable", WEIGHTS, options={"port": "storage", "times": 2}),
    Case("too_many", WEIGHTS, options={"port": "storage"}),
    Case("refused", WEIGHTS, options={"port": "storage"}),
    Case("cut", WEIGHTS, options={"times": 2}),
    Case("reset", WEIGHTS),
    Case("stall", WEIGHTS, options={"seconds": 4}),
    Case("slow", WEIGHTS, options={"seconds": 0.3}),
    Case("flip", WEIGHTS),
]


@both_transports
@cases(
    Case("unavailable", f"/api/models/{ADAPTER}/revision/"),
    Case("unavailable", "/tree/"),
    Case("unavailable", WEIGHTS, options={"method": "HEAD"}),
    *BODIES,
    Case("unavailable", WEIGHTS, (OSError, "did not serve .*503"), {"times": -1, "port": "storage"}),
    Case("forbidden", WEIGHTS, (OSError, "403"), {"times": -1, "port": "storage"}),
    Case("short", WEIGHTS, (OSError, "size"), {"times": -1}),
    Case("flip", WEIGHTS, (AdapterError, "its sha256 differs"), {"times": -1}),
    Case("wrong_token", "", (OSError, "refused the token"), {"times": -1}),
    Case("missing_revision", "", (OSError, "no revision 'v9'"), {"times": 0}, {"revision": "v9"}),
)
def test_pull_of_an_adapter(hub, hf_home, quick, results, monkeypatch, base, adapter_folder, case):
    """Whole and unharmed, or an error that leaves the model as it was and no part of a file in the cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    hub.put_files(ADAPTER, adapter_folder)
    fault = case.switch_on(hub)
    model = copy.deepcopy(base)
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    loaded = outcome(
        results, f"pull an adapter{over(hub)}", case, lambda: load_bt_adapter(model, ADAPTER, **case.action)
    )
    assert fault.hits or fault.times == 0
    if loaded is None:
        assert type(model) is CLIPModel
        assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
    else:
        expected = find_tower(load_bt_adapter(copy.deepcopy(base), adapter_folder)).bt_adapter.state_dict()
        found = find_tower(loaded).bt_adapter.state_dict()
        assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    if case.kind != "flip" or loaded is not None:
        files = hub.files(ADAPTER)
        for path, data in downloaded(hf_home):
            assert data == files[path.name]


@both_transports
@cases(
    Case("unavailable", f"/api/models/{MODEL}"),
    Case("unavailable", r"config\.json$"),
    *BODIES,
    Case("unavailable", WEIGHTS, (OSError, "503"), {"times": -1, "port": "storage"}),
    Case("short", WEIGHTS, (OSError, "size"), {"times": -1}),
    Case("flip", WEIGHTS, (OSError, "its sha256 differs"), {"times": -1}),
    Case("wrong_token", "", (OSError, "401|token"), {"times": -1}),
    Case("missing_revision", "", (OSError, "v9"), {"times": 0}, {"revision": "v9"}),
)
def test_pull_of_a_model(hub, hf_home, quick, results, monkeypatch, tiny_checkpoint, case):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    hub.put_files(MODEL, tiny_checkpoint)
    fault = case.switch_on(hub)
    loaded = outcome(
        results, f"pull a model{over(hub)}", case, lambda: BTAdapterModel.from_pretrained(MODEL, **case.action)
    )
    assert fault.hits or fault.times == 0
    if loaded is not None:
        expected = BTAdapterModel.from_pretrained(tiny_checkpoint).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    for path, data in downloaded(hf_home):
        assert hashlib.sha256(data).digest() == hashlib.sha256(hub.files(MODEL)[path.name]).digest()


STORAGE_ONLY = pytest.mark.parametrize("hub", ["xet"], indirect=True)


@STORAGE_ONLY
@cases(
    Case("unavailable", "/reconstructions/", (OSError, "storage of large files.* did not serve .*503"), {"times": -1}),
    Case(
        "forbidden", "/reconstructions/", (OSError, "storage of large files.* refused access to .*403"), {"times": -1}
    ),
    Case("refused", "/reconstructions/", (OSError, "storage of large files.* could not be reached"), {"times": -1}),
    Case("refused", "/reconstructions/"),
    Case("hangs", "/reconstructions/"),
    Case("unavailable", "/xet-read-token/"),
    Case("forbidden", "/xet-read-token/", (OSError, "refused access to .*403"), {"times": -1}),
)
def test_pull_from_the_storage_of_large_files(hub, hf_home, quick, results, base, adapter_folder, case):
    hub.put_files(ADAPTER, adapter_folder)
    fault = case.switch_on(hub)
    model = copy.deepcopy(base)
    outcome(results, "pull an adapter over Xet", case, lambda: load_bt_adapter(model, ADAPTER))
    assert fault.hits
    assert all(data == hub.files(ADAPTER)[path.name] for path, data in downloaded(hf_home))


@STORAGE_ONLY
@cases(
    Case("unavailable", "/xorbs/", (PushError, "storage of large files.* did not serve .*503"), {"times": -1}),
    Case("unavailable", "/shards$", (PushError, "storage of large files.* did not serve .*503"), {"times": -1}),
    Case("forbidden", "/xorbs/", (PushError, "storage of large files.* refused access to .*403"), {"times": -1}),
    Case("forbidden", "/xet-write-token/", (PushError, "refused access to .*403"), {"times": -1}),
    Case("refused", "", (PushError, "storage of large files.* could not be reached"), {"times": -1, "port": "cas"}),
    Case("hangs", "/xorbs/"),
)
def test_push_to_the_storage_of_large_files(hub, quick, results, adapter_folder, case):
    hub.put_files(ADAPTER, {"notes.txt": "what was there"})
    before = hub.files(ADAPTER)
    fault = case.switch_on(hub)
    pushed = outcome(results, "push over Xet", case, lambda: push_to_hub(adapter_folder, ADAPTER))
    assert fault.hits
    if pushed is None:
        assert hub.files(ADAPTER) == before
    else:
        assert hub.files(ADAPTER)["bt_adapter.safetensors"] == (adapter_folder / "bt_adapter.safetensors").read_bytes()


@STORAGE_ONLY
def test_commands_over_a_storage_that_is_down(hub, quick, results, adapter_folder, tiny_checkpoint, capsys):
    """One line that says what is down; never a traceback."""
    hub.put_files(MODEL, tiny_checkpoint)
    hub.fail("unavailable", port="cas", times=-1)
    argv = {"push": ["push", str(adapter_folder), ADAPTER], "classify": ["classify", __file__, "--labels", "a,b"]}
    argv["classify"] += ["--model", MODEL]
    for command, arguments in argv.items():
        assert main(arguments) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bt-adapter")]
        assert len(lines) == 1 and "storage of large files (Xet) did not serve" in lines[0], lines
        results.append((f"bt-adapter {command} over Xet", "unavailable always", lines[0]))


def test_after_an_interrupted_pull_the_next_one_is_whole(hub, hf_home, results, base, adapter_folder):
    hub.put_files(ADAPTER, adapter_folder)
    case = Case("short", WEIGHTS, (OSError, "size"))
    hub.fail(case.kind, case.where)
    outcome(results, "pull an adapter", case, lambda: load_bt_adapter(copy.deepcopy(base), ADAPTER))
    load_bt_adapter(copy.deepcopy(base), ADAPTER)
    assert dict(downloaded(hf_home)).keys() and all(
        data == hub.files(ADAPTER)[path.name] for path, data in downloaded(hf_home)
    )


def test_what_has_been_pulled_works_while_the_hub_is_down(hub, quick, results, base, adapter_folder):
    hub.put_files(ADAPTER, adapter_folder)
    first = load_bt_adapter(copy.deepcopy(base), ADAPTER)
    case = Case("unavailable", options={"times": -1})
    fault = hub.fail(case.kind, **case.options)
    again = outcome(results, "pull an adapter again", case, lambda: load_bt_adapter(copy.deepcopy(base), ADAPTER))
    assert fault.hits
    for one, other in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------------------------------------------------- stream


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Clips:
    return Clips(tmp_path_factory.mktemp("clips"))


PASSING = [
    Case("unavailable", "", options={"times": 2}),
    Case("too_many"),
    Case("refused"),
    Case("cut", options={"times": 2}),
    Case("reset"),
    Case("stall", options={"seconds": 5}),
]


def test_stream_over_what_passes(hub, monkeypatch, tmp_path, results, clips):
    """Each shard, or each video, meets another fault on its way; what arrives is exact."""
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "2")  # of the fetching processes
    opened, faults = [], []
    for number, form in enumerate(["parquet", "tars", "csv of URLs", "csv of hf:// paths"]):
        repo = f"{DATA}-{number}"
        put(hub, clips, form, repo)
        shards = [path for path in hub.files(repo, repo_type="dataset") if path.endswith((".parquet", ".tar"))]
        videos = [f"clip{i}.mp4" for i in range(len(PASSING))]
        names = [f"{repo}(-videos)?/.*{name}$" for name in sorted(shards) or videos]
        table = load_table(repo, **options(form, repo))
        for case, name in zip(PASSING, names, strict=True):
            faults.append(hub.fail(case.kind, name, **{"port": "storage", **case.options}))
        opened.append((form, table, table.use_store(tmp_path / f"store{number}")))
    for form, table, store in opened:  # all are under way: the waits run side by side
        rows = [table.pair(row) for row in range(len(table))]
        store.close()
        assert [(video, texts) for video, _, texts in rows] == [(video, [text]) for video, text in clips.rows]
        results += [(f"stream {form}", case.name, "succeeds") for case in PASSING]
    assert [fault.hits for fault in faults] == [fault.times for fault in faults]


def test_stream_over_what_lasts(hub, tmp_path, results, clips):
    """A shard that does not come whole is an error, and its file is gone: the table never gets shorter."""
    opened = []
    for number, (form, kind, said) in enumerate(
        [
            ("parquet", "short", r"00000-of-00006\.parquet cannot be read"),
            ("tars", "short", "416|of .* bytes at"),
            ("parquet", "forbidden", "403"),
        ]
    ):
        put(hub, clips, form, f"{DATA}-{number}")
        table = load_table(f"{DATA}-{number}")
        case = Case(kind, rf"{DATA}-{number}/.*00000[^/]*$", (ChunkStoreError, said), {"times": -1, "port": "storage"})
        hub.fail(case.kind, case.where, **case.options)
        opened.append((form, case, table, table.use_store(tmp_path / f"store{number}")))
    for form, case, table, store in opened:
        outcome(results, f"stream {form}", case, lambda table=table: [table.pair(row) for row in table.shard_range(0)])
        assert len(table) == len(clips.rows)
        assert not list(store.folder.glob("shard-000000*"))
        store.close()


def test_stream_of_what_cannot_be_opened(hub, monkeypatch, results, clips):
    put(hub, clips, "tars", DATA)
    with pytest.raises(ValueError, match="no revision 'v9'|Invalid rev id|v9"):
        load_table(DATA, revision="v9")
    results.append(("stream", "missing_revision", "ValueError"))
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    with pytest.raises(ValueError, match="token"):
        load_table(DATA)
    results.append(("stream", "wrong_token", "ValueError"))


def test_stream_with_a_flipped_byte_has_all_rows(hub, tmp_path, results, clips):
    """Ranges of a file carry no hash: one video may differ and then decodes badly or not at all, but none is lost."""
    put(hub, clips, "tars", DATA)
    table = load_table(DATA)
    start = clips.tars()["shards/00000.tar"].index(clips.rows[0][0])
    fault = hub.fail("flip", "00000.tar", at=start + 100)
    store = table.use_store(tmp_path / "store")
    videos = [table.pair(row)[0] for row in range(len(table))]
    store.close()
    assert fault.hits and videos[1:] == [video for video, _ in clips.rows[1:]]
    assert len(videos[0]) == len(clips.rows[0][0]) and videos[0] != clips.rows[0][0]
    results.append(("stream tars", "flip once", "all rows, one video differs"))
