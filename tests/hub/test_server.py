"""The Hub of the tests against the clients that use it, none of them modified."""

import http.client
import time
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    ModelCard,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub.clients import run_python
from tests.hub.server import OTHER_TOKEN, TOKEN, USER


REPO = "tester/thing"
LARGE = bytes(range(256)) * 40  # no text: a large file, whatever its name


def read(path: str) -> bytes:
    return Path(path).read_bytes()


# ---------------------------------------------------------------------------------------------------- accounts, repos


def test_who_is_asking(hub):
    assert HfApi().whoami()["name"] == USER
    assert HfApi(token=OTHER_TOKEN).whoami()["name"] == "stranger"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token="hf_nobody").whoami()


def test_a_repository_is_created_once(hub):
    api = HfApi()
    assert api.create_repo("thing").repo_id == REPO
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO)
    api.create_repo(REPO, exist_ok=True)
    api.create_repo(REPO, repo_type="dataset")  # of another type: another repository
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("stranger/thing")
    assert list(hub.files(REPO)) == [".gitattributes"]


def test_repositories_are_listed_moved_and_deleted(hub):
    api = HfApi()
    hub.put_files(REPO, {"a.txt": "a"})
    hub.create("tester/secret", private=True)
    assert {info.id for info in api.list_models(author=USER)} == {REPO, "tester/secret"}
    assert {info.id for info in api.list_models(author=USER, token=False)} == {REPO}
    api.move_repo(REPO, "tester/new")
    assert read(hf_hub_download("tester/new", "a.txt")) == read(hf_hub_download(REPO, "a.txt")) == b"a"
    api.delete_repo("tester/new")
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info("tester/new")
    api.delete_repo("tester/new", missing_ok=True)


def test_private_repositories_do_not_exist_for_others(hub):
    hub.put_files(REPO, {"a.txt": "a"})
    HfApi().update_repo_settings(REPO, private=True)
    assert HfApi().repo_info(REPO).private
    for token in (False, OTHER_TOKEN):
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download(REPO, "a.txt", token=token)
    assert read(hf_hub_download(REPO, "a.txt")) == b"a"


def test_gated_repositories_show_what_they_hold_and_give_it_to_readers(hub):
    repository = hub.create(REPO, gated="manual")
    hub.put_files(REPO, {"a.txt": "a"})
    for token in (False, OTHER_TOKEN):
        assert HfApi().repo_info(REPO, token=token).gated == "manual"
        with pytest.raises(GatedRepoError):
            hf_hub_download(REPO, "a.txt", token=token)
    with pytest.raises(GatedRepoError):
        HfApi().auth_check(REPO, token=OTHER_TOKEN)
    repository.readers.add("stranger")
    assert read(hf_hub_download(REPO, "a.txt", token=OTHER_TOKEN)) == b"a"


def test_a_wrong_token_is_refused_even_for_public_repositories(hub):
    hub.put_files(REPO, {"a.txt": "a"})
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        hf_hub_download(REPO, "a.txt", token="hf_nobody")
    assert read(hf_hub_download(REPO, "a.txt", token=False)) == b"a"


def test_only_the_owner_writes(hub):
    hub.create(REPO)
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(token=OTHER_TOKEN).upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id=REPO)
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(token=False).upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id=REPO)
    assert len(hub.history(REPO)) == 1


# ------------------------------------------------------------------------------------------------------------ commits


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_small_files_go_into_the_commit_and_large_ones_to_the_storage(hub, repo_type):
    api = HfApi()
    api.create_repo(REPO, repo_type=repo_type)
    files = {"a.txt": b"a\n", "b/c.json": b"{}", "empty.bin": b"", "b/d.safetensors": b"text", "e": LARGE}
    for path, data in files.items():
        api.upload_file(path_or_fileobj=data, path_in_repo=path, repo_id=REPO, repo_type=repo_type)
    stored = hub.files(REPO, repo_type=repo_type)
    assert {path: stored[path] for path in files} == files
    assert len(hub.requests("/uploads/", method="PUT", port="storage")) == 2
    assert hub.leaks == []
    info = api.repo_info(REPO, repo_type=repo_type, files_metadata=True)
    assert {file.rfilename: file.size for file in info.siblings if file.lfs} == {"b/d.safetensors": 4, "e": len(LARGE)}


def test_large_files_are_put_in_parts(hub):
    hub.part_size = 1000
    api = HfApi()
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=LARGE, path_in_repo="weights.bin", repo_id=REPO)
    assert len(hub.requests("/uploads/", method="PUT", port="storage")) == 11
    assert hub.files(REPO)["weights.bin"] == LARGE


def test_a_folder_is_one_commit_and_what_is_known_is_not_sent_again(hub, tmp_path):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (folder / "inner/w.safetensors").write_bytes(LARGE)
    api = HfApi()
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=folder, ignore_patterns="*.json")
    assert len(hub.history(REPO)) == 2
    (folder / "a.txt").write_text("b")
    api.upload_folder(repo_id=REPO, folder_path=folder, delete_patterns="*.txt", commit_message="again")
    assert hub.history(REPO)[0].title == "again"
    assert len(hub.requests("/uploads/", port="storage")) == 1
    assert hub.files(REPO)["a.txt"] == b"b" and hub.files(REPO)["inner/w.safetensors"] == LARGE
    head = hub.head(REPO)
    assert api.upload_folder(repo_id=REPO, folder_path=folder).oid == head  # nothing changed: no commit


def test_a_commit_adds_copies_and_deletes(hub):
    hub.put_files(REPO, {"a.txt": "a", "big.bin": LARGE, "old/x.txt": "x", "old/y.txt": "y", "z.txt": "z"})
    operations = [
        CommitOperationAdd("new.txt", b"new"),
        CommitOperationCopy("a.txt", "copy.txt"),
        CommitOperationCopy("big.bin", "copy.bin"),
        CommitOperationDelete("old/"),
        CommitOperationDelete("z.txt"),
    ]
    info = HfApi().create_commit(REPO, operations, commit_message="all", commit_description="of it")
    files = hub.files(REPO)
    assert files.pop(".gitattributes")
    assert files == {"a.txt": b"a", "big.bin": LARGE, "copy.txt": b"a", "copy.bin": LARGE, "new.txt": b"new"}
    first = HfApi().list_repo_commits(REPO)[0]
    assert (first.commit_id, first.title, first.message, first.authors) == (info.oid, "all", "of it", [USER])
    with pytest.raises(EntryNotFoundError):
        HfApi().delete_file("z.txt", REPO)


def test_a_commit_on_an_outdated_parent_is_refused(hub):
    old = hub.put_files(REPO, {"a.txt": "a"})
    hub.put_files(REPO, {"a.txt": "b"})
    with pytest.raises(HfHubHTTPError, match="412"):
        HfApi().create_commit(REPO, [CommitOperationAdd("c", b"c")], commit_message="c", parent_commit=old)
    assert "c" not in hub.files(REPO)


def test_a_pull_request_leaves_main_alone_until_it_is_merged(hub):
    head = hub.put_files(REPO, {"a.txt": "a"})
    other = HfApi(token=OTHER_TOKEN)  # who may read may propose
    info = other.upload_file(path_or_fileobj=b"b", path_in_repo="b.txt", repo_id=REPO, create_pr=True)
    assert (info.pr_num, info.pr_revision) == (1, "refs/pr/1")
    assert hub.head(REPO) == head
    assert read(hf_hub_download(REPO, "b.txt", revision="refs/pr/1")) == b"b"
    api = HfApi()
    api.upload_file(path_or_fileobj=LARGE, path_in_repo="c.bin", repo_id=REPO, revision="refs/pr/1")
    assert [ref.ref for ref in api.list_repo_refs(REPO, include_pull_requests=True).pull_requests] == ["refs/pr/1"]
    api.merge_pull_request(REPO, 1)
    hub.page_size = 1
    other.upload_file(path_or_fileobj=b"d", path_in_repo="d.txt", repo_id=REPO, create_pr=True, commit_message="more")
    found = [(request.num, request.title, request.status) for request in api.get_repo_discussions(REPO)]
    assert found == [(2, "more", "open"), (1, "Upload b.txt with huggingface_hub", "merged")]
    assert {"a.txt", "b.txt", "c.bin"} < set(hub.files(REPO))


def test_branches_and_tags(hub):
    api, first = HfApi(), hub.put_files(REPO, {"a.txt": "1"})
    api.create_branch(REPO, branch="try/it")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(REPO, branch="try/it")
    api.create_branch(REPO, branch="try/it", exist_ok=True)
    api.create_tag(REPO, tag="v1")
    api.upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id=REPO, revision="try/it")
    refs = api.list_repo_refs(REPO)
    assert {branch.name for branch in refs.branches} == {"main", "try/it"}
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", first)]
    expected = {"main": b"1", "v1": b"1", first: b"1", first[:10]: b"1", "try/it": b"2"}
    for revision, data in expected.items():
        assert read(hf_hub_download(REPO, "a.txt", revision=revision)) == data
    assert api.repo_info(REPO, revision="try/it").sha == hub.head(REPO, "try/it")
    assert api.list_repo_commits(REPO, revision="try/it")[1].commit_id == first
    api.delete_tag(REPO, tag="v1")
    api.delete_branch(REPO, branch="try/it")
    with pytest.raises(RevisionNotFoundError):
        api.repo_info(REPO, revision="try/it")


def test_long_listings_come_in_pages(hub):
    hub.put_files(REPO, {f"folder {i % 3}/{i}.txt": str(i) for i in range(20)})
    hub.page_size = 4
    api = HfApi()
    assert len(api.list_repo_files(REPO)) == 21
    assert [entry.path for entry in api.list_repo_tree(REPO)] == [".gitattributes", "folder 0", "folder 1", "folder 2"]
    assert len(list(api.list_repo_tree(REPO, "folder 1", expand=True))) == 7
    assert len([r for r in hub.requests("/tree/") if "cursor" in r.query]) == 5 + 1  # of 24 and of 7 entries
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "nothing"))
    infos = api.get_paths_info(REPO, ["folder 0", "folder 0/3.txt", "nothing"])
    assert [type(info).__name__ for info in infos] == ["RepoFolder", "RepoFile"]


def test_metadata_is_checked_before_anything_is_sent(hub):
    hub.create(REPO)
    good = "---\nlicense: mit\ntags: [video]\nbase_model: tester/base\nbase_model_relation: adapter\n---\n# A card\n"
    ModelCard(good).validate()
    ModelCard(good).push_to_hub(REPO)
    assert HfApi().model_info(REPO).card_data.base_model == "tester/base"
    index = "model-index:\n- name: x\n  results:\n  - task: {type: video-classification}\n    metrics: []\n"
    with pytest.raises(ValueError, match="must be a known license"):
        ModelCard("---\nlicense: my-own\n---\n").validate()
    for bad in ("license: my-own", "base_model: 'not an id'", "tags: video", index, "a: ["):
        text = f"---\n{bad}\n---\n".encode()
        with pytest.raises(ValueError, match="Invalid metadata in README.md"):
            HfApi().upload_file(path_or_fileobj=text, path_in_repo="README.md", repo_id=REPO)
    assert len(hub.history(REPO)) == 2


# ---------------------------------------------------------------------------------------------------------- downloads


def test_what_is_missing_is_named(hub):
    hub.put_files(REPO, {"a.txt": "a"})
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "a.txt", revision="nowhere")
    with pytest.raises(RevisionNotFoundError):
        snapshot_download(REPO, revision="0" * 40)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "b.txt")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("tester/nothing", "a.txt")
    assert HfApi().file_exists(REPO, "a.txt") and not HfApi().file_exists(REPO, "b.txt")


def test_a_snapshot_is_whole_cached_and_used_offline(hub, monkeypatch):
    hub.put_files(REPO, {"a.txt": "a", "b/w.safetensors": LARGE})
    folder = Path(snapshot_download(REPO))
    assert folder.name == hub.head(REPO)
    assert {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == hub.files(REPO)
    sent = hub.sent()
    assert Path(snapshot_download(REPO)) == folder and hub.sent() == sent
    HfApi().verify_repo_checksums(REPO)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    count = len(hub.log)
    assert Path(snapshot_download(REPO)) == folder and len(hub.log) == count
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(REPO, "c.txt")


def test_large_files_are_fetched_from_the_storage_without_the_token(hub):
    hub.put_files(REPO, {"w.safetensors": LARGE})
    assert read(hf_hub_download(REPO, "w.safetensors")) == LARGE
    (request,) = hub.requests("w.safetensors", port="storage")
    assert (request.status, request.sent, request.authorized) == (200, len(LARGE), False)
    assert all(request.authorized for request in hub.requests("w.safetensors", port="hub"))
    connection = http.client.HTTPConnection(urlsplit(hub.storage_url).netloc)
    connection.request("GET", request.path, headers={"Authorization": f"Bearer {TOKEN}"})
    assert connection.getresponse().status == 403  # without signature
    connection.close()
    assert len(hub.leaks) == 1  # and a token that arrives there shows
    hub.log.clear()


def test_ranges(hub):
    hub.put_files(REPO, {"w.bin": LARGE, "a.txt": "0123456789"}, repo_type="dataset")
    for name, data in (("w.bin", LARGE), ("a.txt", b"0123456789")):
        path = f"datasets/{REPO}/{name}"
        with HfFileSystem().open(path, block_size=4) as file:
            file.seek(5)
            assert file.read(3) == data[5:8]
            file.seek(-2, 2)
            assert file.read() == data[-2:]
        partial = [request for request in hub.requests(name, "GET") if request.sent]
        assert {request.status for request in partial} == {206}
        assert sum(request.sent for request in partial) <= 9 < len(data)
        assert HfFileSystem().cat_file(path, start=1, end=3) == data[1:3]
        with HfFileSystem().open(path, block_size=0) as file:
            assert file.read() == data
    connection = http.client.HTTPConnection(urlsplit(hub.url).netloc)
    url = f"/datasets/{REPO}/resolve/main/a.txt"
    for wanted, status, body, where in (
        ("bytes=2-4", 206, b"234", "bytes 2-4/10"),
        ("bytes=-3", 206, b"789", "bytes 7-9/10"),
        ("bytes=8-99", 206, b"89", "bytes 8-9/10"),
        ("bytes=10-", 416, None, "bytes */10"),
    ):
        connection.request("GET", url, headers={"Range": wanted})
        response = connection.getresponse()
        data = response.read()
        assert (response.status, response.headers["Content-Range"]) == (status, where)
        assert body is None or data == body
    connection.close()


# ------------------------------------------------------------------------------------------------ the other libraries


def tiny_clip():
    import torch
    from transformers import CLIPModel

    from tests import tiny_pairs

    torch.manual_seed(0)
    return CLIPModel(tiny_pairs.clip_config()).eval()


def test_transformers_pushes_and_loads_by_id(hub):
    import torch
    from transformers import AutoConfig, AutoModel, AutoProcessor, CLIPProcessor

    from tests import tiny_pairs

    model = tiny_clip()
    model.push_to_hub(REPO, max_shard_size="20KB", private=True)
    CLIPProcessor(tiny_pairs.processor().image_processor, tiny_pairs.tokenizer()).push_to_hub(REPO)
    assert sum(path.endswith(".safetensors") for path in hub.files(REPO)) > 1
    first = hub.head(REPO)
    with torch.no_grad():
        model.logit_scale.add_(1)
    model.push_to_hub(REPO, revision="main")
    assert AutoConfig.from_pretrained(REPO).projection_dim == 12
    for revision, expected in ((first, model.logit_scale.item() - 1), ("main", model.logit_scale.item())):
        loaded = AutoModel.from_pretrained(REPO, revision=revision)
        assert loaded.logit_scale.item() == pytest.approx(expected)
    assert AutoProcessor.from_pretrained(REPO).tokenizer("a b").input_ids == tiny_pairs.tokenizer()("a b").input_ids
    assert hub.repositories["model", REPO].private


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft asks for it
def test_peft_pushes_and_loads_by_id(hub):
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModel

    tiny_clip().push_to_hub("tester/base")
    tuned = get_peft_model(
        AutoModel.from_pretrained("tester/base"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    tuned.push_to_hub(REPO)
    assert {"adapter_config.json", "adapter_model.safetensors"} < set(hub.files(REPO))
    loaded = PeftModel.from_pretrained(AutoModel.from_pretrained("tester/base"), REPO)
    ids = torch.tensor([[0, 3, 4, 2]])
    with torch.no_grad():
        features = [m.get_text_features(input_ids=ids) for m in (tuned.eval(), loaded.eval())]
    features = [getattr(f, "pooler_output", f) for f in features]
    assert torch.equal(*features)


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_pushes_and_loads_by_id(hub, streaming):
    import datasets

    rows = [{"text": f"caption {i}", "blob": bytes([i]) * 100} for i in range(20)]
    datasets.Dataset.from_list(rows).push_to_hub(REPO, num_shards=2)
    loaded = datasets.load_dataset(REPO, split="train", streaming=streaming)
    assert list(loaded) == rows


def test_a_fresh_process_downloads_and_another_one_finds_it_offline(hub, hf_home):
    hub.put_files(REPO, {"a.txt": "a", "w.bin": LARGE})
    code = f"from huggingface_hub import snapshot_download; print(snapshot_download('{REPO}'))"
    online = run_python(code, hub, hf_home)
    count = len(hub.log)
    offline = run_python(code, hub, hf_home, token=None, HF_HUB_OFFLINE="1")
    assert online.stdout == offline.stdout and Path(online.stdout.strip(), "w.bin").read_bytes() == LARGE
    assert len(hub.log) == count


# ----------------------------------------------------------------------------------------------- the guard, the faults


def test_nothing_but_this_machine_can_be_reached(hub, hf_home):
    import socket

    from tests.hub.guard import sitecustomize as guard

    with pytest.raises(RuntimeError, match="192.0.2.1"):
        socket.create_connection(("192.0.2.1", 80))
    with pytest.raises(RuntimeError, match="example.org"):
        HfApi(endpoint="https://example.org").model_info(REPO)
    assert guard.refused == ["192.0.2.1", "example.org"]
    guard.refused.clear()
    done = run_python("import urllib.request as r; r.urlopen('http://example.org')", hub, hf_home, check=False)
    assert done.returncode == 1 and "guard: a connection to example.org was refused" in done.stderr


def get(hub, url: str, timeout: float = 10, method: str = "GET") -> tuple[int | None, bytes | str, float]:
    """Status, what arrived (or the error's name after it), and the seconds it took."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout)
    start, status, data = time.monotonic(), None, b""
    try:
        connection.request(method, urlsplit(url).path + "?" + urlsplit(url).query)
        response = connection.getresponse()
        status = response.status
        while piece := response.read1(1 << 16):
            data += piece
        if response.length:  # http.client does not say that there should have been more
            return status, f"{len(data)} bytes, then IncompleteRead", time.monotonic() - start
        return status, data, time.monotonic() - start
    except (OSError, http.client.HTTPException) as error:
        return status, f"{len(data)} bytes, then {type(error).__name__}", time.monotonic() - start
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("kind", "options", "status", "arrived"),
    [
        ("unavailable", {}, 503, None),
        ("too_many", {}, 429, None),
        ("forbidden", {}, 403, None),
        ("wrong_token", {}, 401, None),
        ("missing_revision", {}, 404, None),
        ("refused", {}, None, "0 bytes, then RemoteDisconnected"),
        ("lost", {}, None, "0 bytes, then RemoteDisconnected"),
        ("cut", {"at": 3}, 200, "3 bytes, then IncompleteRead"),
        ("reset", {"at": 3}, 200, "3 bytes, then ConnectionResetError"),
        ("stall", {"at": 3, "seconds": 5}, 200, "3 bytes, then TimeoutError"),
        ("short", {"at": 0.3}, 200, b"012"),
        ("flip", {"at": 2}, 200, b"01\xcd3456789"),
    ],
)
def test_faults_happen_as_often_as_they_should(hub, kind, options, status, arrived):
    hub.put_files(REPO, {"a.txt": "0123456789"})
    url = f"{hub.url}/{REPO}/resolve/main/a.txt"
    fault = hub.fail(kind, r"a\.txt", times=2, **options)
    for _ in range(2):
        found_status, found, _ = get(hub, url, timeout=0.2 if kind == "stall" else 10)
        assert found_status == status
        assert arrived is None or found == arrived
    assert get(hub, url)[:2] == (200, b"0123456789")
    assert fault.hits == 2 and [request.fault for request in hub.log] == [kind, kind, None]


def test_a_slow_answer_is_whole(hub):
    hub.put_files(REPO, {"a.txt": "0123456789"})
    hub.fail("slow", seconds=0.3)
    status, data, seconds = get(hub, f"{hub.url}/{REPO}/resolve/main/a.txt")
    assert (status, data) == (200, b"0123456789") and seconds >= 0.3


def test_a_commit_whose_answer_is_lost_has_landed(hub):
    hub.create(REPO)
    hub.fail("lost", "/commit/")
    with pytest.raises(Exception, match="disconnected"):
        HfApi().upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id=REPO)
    assert hub.files(REPO)["a.txt"] == b"a"


def test_a_full_storage_leaves_the_repository_alone(hub, monkeypatch):
    hub.create(REPO)
    fault = hub.fail("disk_full", times=-1)
    with pytest.raises(RuntimeError, match="Error while uploading 'w.bin'"):
        HfApi().upload_file(path_or_fileobj=LARGE, path_in_repo="w.bin", repo_id=REPO)
    assert fault.hits == 1 and len(hub.history(REPO)) == 1 and not hub.storage
