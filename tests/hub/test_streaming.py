"""(video, text) tables that stay on the Hub: what arrives, what is read for it, and what a damaged shard does."""

import json

import pytest
import torch
from safetensors.torch import load_file

from bt_adapter_hf.cli.main import main
from bt_adapter_hf.data.order import EpochOrder
from bt_adapter_hf.data.sources import load_table
from tests.hub.server import OTHER_TOKEN
from tests.hub.video_datasets import FORMS, PART, ROWS, Clips, options, put


REPO = "tester/clips"


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Clips:
    return Clips(tmp_path_factory.mktemp("clips"))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_arrives_whole_from_the_commit_that_was_found(hub, tmp_path, clips, form):
    put(hub, clips, form, REPO)
    table = load_table(REPO, **options(form, REPO))
    assert len(table) == ROWS and table.needs_store and table.revision == hub.head(REPO, repo_type="dataset")
    # What is done to the repository after the table was opened does not matter.
    changed = {path: b"changed" for path in hub.files(REPO, repo_type="dataset") if path != ".gitattributes"}
    hub.put_files(REPO, changed, repo_type="dataset")
    store = table.use_store(tmp_path / "store")
    rows = [table.pair(row) for row in range(ROWS)]
    store.close()
    assert [(video, texts) for video, _, texts in rows] == [(video, [text]) for video, text in clips.rows]
    assert [texts for texts in table.texts()] == [[text] for _, text in clips.rows]


def test_a_pinned_revision_is_the_one_that_is_read(hub, tmp_path, clips):
    put(hub, clips, "parquet", REPO)
    commit = hub.head(REPO, repo_type="dataset")
    hub.repositories["dataset", REPO].refs["refs/tags/v1"] = commit
    hub.put_files(REPO, {"data/train-00006-of-00006.parquet": b"broken"}, repo_type="dataset")
    for revision in ("v1", commit):
        table = load_table(REPO, revision=revision)
        assert (len(table), table.revision) == (ROWS, commit)
    with pytest.raises(ValueError, match="v2"):
        load_table(REPO, revision="v2")


@pytest.mark.parametrize("source", [REPO, f"hf://datasets/{REPO}/data/*.parquet"])
def test_a_gated_dataset_says_where_to_ask(hub, clips, monkeypatch, source):
    hub.create(REPO, repo_type="dataset", gated=True)
    put(hub, clips, "parquet", REPO)
    monkeypatch.setenv("HF_TOKEN", OTHER_TOKEN)
    with pytest.raises(ValueError, match=rf"{REPO}'? is (a )?gated.* at .*/datasets/{REPO} "):
        load_table(source)


def test_of_parquet_only_the_two_columns_are_read(hub, tmp_path, clips):
    files = clips.parquet(fat=1_000_000)
    hub.put_files(REPO, files, repo_type="dataset")
    size = sum(map(len, files.values()))
    table = load_table(REPO)
    footers = hub.sent(r"\.parquet$")
    assert footers <= len(files) * (1 << 17)
    assert [texts for texts in table.texts()] == [[text] for _, text in clips.rows]
    before = hub.sent(r"\.parquet$")
    store = table.use_store(tmp_path / "store")
    videos = [table.pair(row)[0] for row in range(ROWS)]
    store.close()
    assert videos == [video for video, _ in clips.rows]
    assert hub.sent(r"\.parquet$") - before < 0.1 * size and before < 0.2 * size
    assert all(request.range for request in hub.requests(r"\.parquet$", "GET", port="storage"))


@pytest.mark.parametrize("form", ["parquet", "tars"])
def test_a_resumed_run_fetches_only_the_shards_from_its_place_on(hub, tmp_path, clips, form):
    put(hub, clips, form, REPO)
    table = load_table(REPO)
    assert table.shard_rows == [PART] * (ROWS // PART)
    names = sorted(path for path in hub.files(REPO, repo_type="dataset") if path.endswith((".tar", ".parquet")))
    order = EpochOrder(table.shard_rows, seed=3, chunk_rows=PART)
    start = round(0.9 * ROWS)
    hub.log.clear()
    store = table.use_store(tmp_path / "store", order=order, position=start)
    for position in range(start, ROWS):
        epoch, row = order.row(position)
        video, _, texts = table.pair(row)
        assert epoch == 0 and (video, texts) == (clips.rows[row][0], [clips.rows[row][1]])
        store.advance(position + 1)
    store.close()
    fetched = {name for name in names if hub.requests(name, "GET", port="storage")}
    following = {table.place(order.row(position)[1])[0] for position in range(start, ROWS + 2 * PART)}
    assert fetched and fetched <= {names[shard] for shard in following}


@pytest.mark.parametrize("where", ["inside a member", "between members", "between samples", "after a header"])
def test_a_truncated_tar_is_an_error_not_a_shorter_dataset(hub, clips, where):
    files = clips.tars()
    name, tar = next(iter(files.items()))
    blocks = -(-len(clips.rows[0][0]) // 512)
    ends = {
        "inside a member": 512 + 700,
        "between members": 512 * (1 + blocks),
        "between samples": 512 * (1 + blocks + 2),
        "after a header": 512,
    }
    files[name] = tar[: ends[where]]
    hub.put_files(REPO, files, repo_type="dataset")
    with pytest.raises(ValueError, match="00000.tar.*(cut|damaged)"):
        load_table(REPO)


def test_a_truncated_parquet_file_is_an_error(hub, clips):
    files = clips.parquet()
    name, data = next(iter(files.items()))
    hub.put_files(REPO, {**files, name: data[:-100]}, repo_type="dataset")
    with pytest.raises(ValueError, match="train-00000-of-00006.parquet"):
        load_table(REPO)


def test_a_video_that_is_missing_is_one_broken_row(hub, tmp_path, clips):
    from bt_adapter_hf.data.sources import BrokenRowError

    files = clips.video_folder()
    del files["clip3.mp4"]
    hub.put_files(REPO, files, repo_type="dataset")
    table = load_table(REPO)
    store = table.use_store(tmp_path / "store")
    with pytest.raises(BrokenRowError, match=r"clip3\.mp4"):
        table.pair(3)
    others = [table.pair(row)[0] for row in range(ROWS) if row != 3]
    store.close()
    assert others == [video for i, (video, _) in enumerate(clips.rows) if i != 3]


def test_a_table_leads_nowhere_but_to_its_repository_and_the_media_root(hub, tmp_path, clips):
    """What somebody wrote into a table is read with the rights of its reader."""
    secret = "tester/secret"
    hub.create(secret, repo_type="dataset", private=True)
    hub.put_files(secret, {"a.mp4": clips.rows[0][0]}, repo_type="dataset")
    (tmp_path / "own.mp4").write_bytes(clips.rows[0][0])
    elsewhere = [
        f"hf://datasets/{secret}/a.mp4",
        f"../../{secret}/a.mp4",
        f"../../{secret.partition('/')[2]}/a.mp4",
        str(tmp_path / "own.mp4"),
        f"file://{tmp_path}/own.mp4",
        "../" * 30 + str(tmp_path / "own.mp4").lstrip("/"),
    ]
    address = f"{hub.url}/datasets/{secret}/resolve/main/a.mp4"
    names = ["clip0.mp4", "../clip0.mp4", f"hf://datasets/{REPO}/clip0.mp4", address, *elsewhere]
    lines = [json.dumps({"video": name, "text": "x"}) for name in names]
    files = {"data/train.jsonl": "\n".join(lines).encode(), "clip0.mp4": b"at the top", "data/clip0.mp4": b"beside"}
    hub.put_files(REPO, files, repo_type="dataset")
    hub.log.clear()
    table = load_table(f"hf://datasets/{REPO}/data/train.jsonl")
    found = dict(table.records(0))
    assert [found[row].video for row in range(3)] == [b"beside", b"at the top", b"at the top"]
    assert "HTTP 40" in found[3].problem  # the address is asked without the token
    for row in range(4, len(names)):
        assert found[row].video is None and "lies outside of" in found[row].problem, found[row]
    assert not [request for request in hub.requests(secret) if request.authorized] and len(hub.requests(secret)) >= 1
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "clip0.mp4").write_bytes(b"")
    local = load_table(f"hf://datasets/{REPO}/data/train.jsonl", media_root=tmp_path / "media")
    found = dict(local.records(0))
    assert found[0].video == str(tmp_path / "media" / "clip0.mp4") and found[2].video == b"at the top"
    assert all(found[row].video is None for row in (1, *range(3, len(names))))


def test_a_run_that_lost_the_hub_resumes_and_ends_as_if_nothing_had_happened(
    hub, tmp_path, tiny_checkpoint, clips, capsys
):
    """`bt-adapter pretrain` and its evaluation, both from the Hub; the storage fails in the last sixth of an epoch."""
    put(hub, clips, "tars", REPO)

    def pretrain(folder: str, *options: str) -> int:
        argv = ["pretrain", "--model", str(tiny_checkpoint), "--train", REPO, "--output-dir", str(tmp_path / folder)]
        argv += ["--batch-size", "2", "--num-frames", "2", "--max-steps", "6", "--save-steps", "2", "--seed", "5"]
        argv += ["--chunk-rows", str(PART), "--learning-rate", "1e-3", "--set", "use_cpu=true", *options]
        return main(argv)

    evaluation = ("--validation", REPO, "--validation-split", "train", "--eval-controls")
    assert pretrain("undisturbed", *evaluation) == 0
    summary = json.loads((tmp_path / "undisturbed" / "run_summary.json").read_text())
    assert summary["finished"] and summary["data"]["train"]["rows"] == summary["metrics"]["eval_pairs"] == ROWS
    assert summary["data"]["train"]["revision"] == hub.head(REPO, repo_type="dataset")

    chunks = EpochOrder([PART] * (ROWS // PART), seed=5, chunk_rows=PART).chunks(0)
    shards = [next(chunks).shards[0] for _ in range(ROWS // PART)]
    fault = hub.fail("forbidden", f"{shards[5]:05d}.tar", times=-1, port="storage")
    assert pretrain("disturbed") == 1
    assert "error: Fetching tester/clips to" in (said := capsys.readouterr().err) and "403" in said
    assert fault.hits and not (tmp_path / "disturbed" / "model.safetensors").exists()

    fault.times = fault.hits
    hub.log.clear()
    assert pretrain("disturbed", "--resume") == 0
    fetched = {shard for shard in shards if hub.requests(f"{shard:05d}.tar", "GET", port="storage")}
    assert fetched == set(shards[4:]) < set(shards)  # nothing that was trained on, and nothing of the next epoch
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("disturbed", "undisturbed"))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
