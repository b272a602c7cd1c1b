"""What the Hub answers: one function for each page of its HTTP API that the clients use."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlencode

import yaml

from tests.hub import metadata
from tests.hub.faults import BODIES, Fault
from tests.hub.repositories import Commit, File, PullRequest, Repository, is_large


if TYPE_CHECKING:
    from tests.hub.server import Hub


@dataclass
class Request:
    """One line of the log.

    Attributes:
        port: "hub", "storage" or "cas".
        path: without query, unquoted; a file's name is at its end on both ports.
        range: the `Range` header.
        authorized: whether the request carried an `Authorization` header.
        status: of the answer; 0 where none was sent.
        sent: bytes of the body that were sent.
        fault: what was done to it.
    """

    port: str
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes = field(repr=False)
    range: str | None = None
    authorized: bool = False
    status: int = 0
    sent: int = 0
    fault: str | None = None

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    fault: Fault | None = None  # what happens to the body on its way


class HubError(Exception):
    """An error as the Hub words it: the clients look at the status and the code."""

    def __init__(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self.answer = Answer(status, json.dumps({"error": message}).encode(), headers)


def answer_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


def user_of(hub: "Hub", request: Request) -> str | None:
    """Who asks; None without a token."""
    header = request.headers.get("authorization")
    if header is None:
        return None
    user = hub.users.get(header.removeprefix("Bearer "))
    if user is None:
        raise HubError(401, None, "Invalid credentials in Authorization header")
    return user


def repository_of(hub: "Hub", request: Request, kind: str | None, repo_id: str, write: bool = False) -> Repository:
    """The repository asked for, if who asks may see it and, with `write`, change it."""
    repo_type = (kind or "models").strip("/").removesuffix("s")
    repo_id = hub.moved.get((repo_type, repo_id), repo_id)
    user, repository = user_of(hub, request), hub.repositories.get((repo_type, repo_id))
    if repository is None or (repository.private and user != repository.owner):
        # As the Hub does, so that nobody learns of a private repository.
        raise HubError(401 if user is None else 404, "RepoNotFound", "Repository not found")
    if write and user != repository.owner:
        raise HubError(401 if user is None else 403, None, "You don't have the rights to write to this repository")
    return repository


def _commit_of(repository: Repository, revision: str) -> Commit:
    commit = repository.find(revision)
    if commit is None:
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    return commit


def content_of(
    hub: "Hub",
    request: Request,
    data: bytes,
    headers: dict[str, str],
    wrap: Callable[[bytes], bytes] = lambda data: data,
) -> Answer:
    """The bytes of a file, as `wrap` stores them, or the range of them that is asked for."""
    fault = hub.take_fault(request, BODIES) if request.method == "GET" else None
    if fault is not None:
        data = fault.alter(data)
    data = wrap(data)
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", request.range or "")
    if wanted is None or wanted.groups() == ("", ""):
        return Answer(200, data, headers, fault)
    first, last = wanted.groups()
    start = int(first) if first else max(0, len(data) - int(last))
    end = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= end:
        raise HubError(416, None, "Range not satisfiable", {"Content-Range": f"bytes */{len(data)}"})
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
    return Answer(206, data[start:end], headers, fault)


# -------------------------------------------------------------------------------------------------- accounts and repos


def whoami(hub: "Hub", request: Request) -> Answer:
    user = user_of(hub, request)
    if user is None:
        raise HubError(401, None, "Invalid username or password.")
    token = {"displayName": "loopback", "role": "write"}
    return answer_json(
        {"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token", "accessToken": token}}
    )


def validate_yaml(hub: "Hub", request: Request) -> Answer:
    body = request.json()
    errors, warnings = metadata.problems(body["content"], body.get("repoType") or "model")
    result = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}
    return answer_json(result, status=400 if errors else 200)


def create_repo(hub: "Hub", request: Request) -> Answer:
    body, user = request.json(), user_of(hub, request)
    if user is None:
        raise HubError(401, None, "Invalid username or password.")
    owner, repo_type = body.get("organization") or user, body.get("type") or "model"
    if owner != user:
        raise HubError(403, None, f"You don't have the rights to create a {repo_type} under this namespace")
    repo_id = f"{owner}/{body['name']}"
    url = f"{hub.url}/{'' if repo_type == 'model' else repo_type + 's/'}{repo_id}"
    if (repo_type, repo_id) in hub.repositories:
        return answer_json({"error": f"You already created this {repo_type} repo: {repo_id}", "url": url}, status=409)
    hub.create(repo_id, repo_type, private=body.get("visibility") == "private" or bool(body.get("private")))
    return answer_json({"url": url, "name": repo_id})


def delete_repo(hub: "Hub", request: Request) -> Answer:
    body = request.json()
    kind, repo_id = (
        f"{body.get('type') or 'model'}s",
        f"{body.get('organization') or user_of(hub, request)}/{body['name']}",
    )
    repository = repository_of(hub, request, kind, repo_id, write=True)
    del hub.repositories[repository.type, repository.id]
    return answer_json({})


def move_repo(hub: "Hub", request: Request) -> Answer:
    body = request.json()
    repository = repository_of(hub, request, f"{body['type']}s", body["fromRepo"], write=True)
    if (repository.type, body["toRepo"]) in hub.repositories:
        raise HubError(409, None, f"{body['toRepo']} exists")
    del hub.repositories[repository.type, repository.id]
    hub.moved[repository.type, repository.id] = body["toRepo"]
    repository.id = body["toRepo"]
    hub.repositories[repository.type, repository.id] = repository
    return answer_json({})


def settings(hub: "Hub", request: Request, kind: str, repo_id: str) -> Answer:
    repository, body = repository_of(hub, request, kind, repo_id, write=True), request.json()
    repository.private = body.get("visibility", "private" if repository.private else "public") == "private"
    repository.gated = body.get("gated", repository.gated)
    return answer_json({"private": repository.private, "gated": repository.gated})


def list_repos(hub: "Hub", request: Request, kind: str) -> Answer:
    author, user = request.query.get("author", [None])[0], user_of(hub, request)
    found = [
        repository
        for (repo_type, _), repository in sorted(hub.repositories.items())
        if f"{repo_type}s" == kind
        and author in (None, repository.owner)
        and (not repository.private or user == repository.owner)
    ]
    return answer_json([{"_id": r.id, "id": r.id, "private": r.private, "tags": []} for r in found])


def info(hub: "Hub", request: Request, kind: str, repo_id: str, revision: str = "main") -> Answer:
    repository = repository_of(hub, request, kind, repo_id)
    commit = _commit_of(repository, unquote(revision))
    readme = commit.files.get("README.md")
    try:
        card = metadata.read(readme.data.decode()) if readme is not None else None
    except (yaml.YAMLError, UnicodeDecodeError):
        card = None
    card = card if isinstance(card, dict) else {}
    siblings: list[dict] = []
    for path, file in sorted(commit.files.items()):
        siblings.append({"rfilename": path})
        if "blobs" in request.query:
            siblings[-1] |= {"size": len(file.data), "blobId": file.blob_id}
            if file.large:
                lfs = {"sha256": file.sha256, "size": len(file.data), "pointerSize": len(file.pointer)}
                siblings[-1]["lfs"] = lfs
    history = repository.history(commit)
    return answer_json(
        {
            "_id": hashlib.sha1(repository.id.encode()).hexdigest()[:24],
            "id": repository.id,
            "modelId": repository.id,
            "author": repository.owner,
            "sha": commit.oid,
            "createdAt": history[-1].date,
            "lastModified": commit.date,
            "private": repository.private,
            "gated": repository.gated,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": card.get("tags", []),
            "cardData": card or None,
            "pipeline_tag": card.get("pipeline_tag"),
            "library_name": card.get("library_name"),
            "siblings": siblings,
        }
    )


def auth_check(hub: "Hub", request: Request, kind: str, repo_id: str, write: str | None) -> Answer:
    repository = repository_of(hub, request, kind, repo_id, write=write is not None)
    _check_gate(hub, request, repository)
    return answer_json({})


def _check_gate(hub: "Hub", request: Request, repository: Repository) -> None:
    user = user_of(hub, request)
    if repository.gated and user != repository.owner and user not in repository.readers:
        message = f"Access to {repository.type} {repository.id} is restricted."
        raise HubError(401 if user is None else 403, "GatedRepo", message)


# --------------------------------------------------------------------------------------------------- listings and refs


def tree(hub: "Hub", request: Request, kind: str, repo_id: str, revision: str, path: str | None = None) -> Answer:
    repository = repository_of(hub, request, kind, repo_id)
    commit, folder = _commit_of(repository, unquote(revision)), unquote(path or "").strip("/")
    recursive = request.query.get("recursive", ["false"])[0].lower() in ("true", "1")
    entries = _entries(hub, repository, commit, "expand" in request.query)
    inside = [e for e in entries if not folder or e["path"].startswith(f"{folder}/")]
    if folder and not inside:
        raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision}")
    if not recursive:
        depth = folder.count("/") + 1 if folder else 0
        inside = [entry for entry in inside if entry["path"].count("/") == depth]
    start = int(request.query.get("cursor", ["0"])[0])
    page, headers = inside[start : start + hub.page_size], {}
    if start + hub.page_size < len(inside):
        query = {key: value[0] for key, value in request.query.items()} | {"cursor": start + hub.page_size}
        # `request.path` keeps the quoting of the revision and the folder.
        headers["Link"] = f'<{hub.url}{request.path}?{urlencode(query)}>; rel="next"'
    return answer_json(page, headers=headers)


def paths_info(hub: "Hub", request: Request, kind: str, repo_id: str, revision: str) -> Answer:
    repository = repository_of(hub, request, kind, repo_id)
    commit = _commit_of(repository, unquote(revision))
    if request.headers.get("content-type", "").startswith("application/json"):
        body = request.json()
    else:
        body = parse_qs(request.body.decode())
        body["expand"] = body.get("expand", ["False"])[0].lower() in ("true", "1")
    paths = [path.strip("/") for path in body.get("paths", [])]
    entries = _entries(hub, repository, commit, bool(body.get("expand")))
    return answer_json([entry for entry in entries if entry["path"] in paths])


def refs(hub: "Hub", request: Request, kind: str, repo_id: str) -> Answer:
    repository = repository_of(hub, request, kind, repo_id)
    result: dict[str, list] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    groups = {"refs/heads/": "branches", "refs/tags/": "tags", "refs/pr/": "pullRequests"}
    for ref, oid in repository.refs.items():
        prefix = next(prefix for prefix in groups if ref.startswith(prefix))
        result[groups[prefix]].append({"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid})
    return answer_json(result)


def commits(hub: "Hub", request: Request, kind: str, repo_id: str, revision: str) -> Answer:
    repository = repository_of(hub, request, kind, repo_id)
    history = repository.history(_commit_of(repository, unquote(revision)))
    return answer_json(
        [
            {"id": c.oid, "title": c.title, "message": c.message, "authors": [{"user": c.author}], "date": c.date}
            for c in history
        ]
    )


def branch(hub: "Hub", request: Request, kind: str, repo_id: str, branch: str) -> Answer:
    repository = repository_of(hub, request, kind, repo_id, write=True)
    ref = f"refs/heads/{unquote(branch)}"
    if request.method == "POST":
        if ref in repository.refs:
            raise HubError(409, None, f"Reference already exists: {ref}")
        start = request.json().get("startingPoint") or "main"
        repository.refs[ref] = _commit_of(repository, start).oid
    elif ref not in repository.refs:
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {ref}")
    else:
        del repository.refs[ref]
    return answer_json({})


def add_tag(hub: "Hub", request: Request, kind: str, repo_id: str, revision: str) -> Answer:
    repository = repository_of(hub, request, kind, repo_id, write=True)
    ref = f"refs/tags/{request.json()['tag']}"
    if ref in repository.refs:
        raise HubError(409, None, f"Tag reference exists already: {ref}")
    repository.refs[ref] = _commit_of(repository, unquote(revision)).oid
    return answer_json({})


def delete_tag(hub: "Hub", request: Request, kind: str, repo_id: str, tag: str) -> Answer:
    repository = repository_of(hub, request, kind, repo_id, write=True)
    if repository.refs.pop(f"refs/tags/{unquote(tag)}", None) is None:
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: refs/tags/{unquote(tag)}")
    return answer_json({})


# ------------------------------------------------------------------------------------------------------------- uploads


def preupload(hub: "Hub", request: Request, kind: str, repo_id: str, revision: str) -> Answer:
    repository = repository_of(hub, request, kind, repo_id, write="create_pr" not in request.query)
    commit, result = _commit_of(repository, unquote(revision)), []
    for file in request.json()["files"]:
        large = is_large(file["path"], file["size"], base64.b64decode(file["sample"]))
        known = commit.files.get(file["path"])
        result.append(
            {
                "path": file["path"],
                "uploadMode": "lfs" if large else "regular",
                "shouldIgnore": False,
                "oid": known.etag if known is not None else None,
            }
        )
    return answer_json({"files": result})


def commit(hub: "Hub", request: Request, kind: str, repo_id: str, revision: str) -> Answer:
    pull_request = "create_pr" in request.query
    repository = repository_of(hub, request, kind, repo_id, write=not pull_request)
    user = user_of(hub, request)
    if user is None:
        raise HubError(401, None, "Invalid username or password.")
    head = _commit_of(repository, unquote(revision))
    ref = repository.ref(unquote(revision))
    header, content = {}, dict(head.files)
    for line in request.body.splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "header":
            header = value
        elif item["key"] == "file":
            content[value["path"]] = File(base64.b64decode(value["content"]), large=False)
        elif item["key"] == "lfsFile":
            if value["oid"] not in hub.storage:
                raise HubError(400, None, f"The LFS pointer of {value['path']} points to a file that does not exist")
            content[value["path"]] = File(hub.storage[value["oid"]], large=True)
        elif item["key"] == "deletedFile":
            if content.pop(value["path"], None) is None:
                raise HubError(404, "EntryNotFound", f"A file with this name doesn't exist: {value['path']}")
        elif item["key"] == "deletedFolder":
            folder = value["path"].rstrip("/") + "/"
            if not any(path.startswith(folder) for path in content):
                raise HubError(404, "EntryNotFound", f"A folder with this name doesn't exist: {folder}")
            content = {path: file for path, file in content.items() if not path.startswith(folder)}
        else:
            raise HubError(400, None, f"Unknown operation: {item['key']}")
    if "README.md" in content:
        errors, _ = metadata.problems(content["README.md"].data.decode(), repository.type)
        if errors:
            raise HubError(400, None, "Invalid metadata in README.md: " + "; ".join(errors))
    parent = header.get("parentCommit")
    if parent is not None and not pull_request and not head.oid.startswith(parent):
        raise HubError(412, None, "A commit has happened since. Please refresh and try again.")
    number = None
    if pull_request:
        number = len(repository.pull_requests) + 1
        ref = f"refs/pr/{number}"
        head = _commit_of(repository, parent) if parent is not None else head
    elif ref is None or ref.startswith("refs/tags/"):
        raise HubError(400, None, f"{revision} is no branch")
    commit = repository.commit(ref, content, header["summary"], header.get("description", ""), user, head.oid)
    if pull_request:
        repository.pull_requests.append(PullRequest(number, commit.title, user, commit.date))
    page = f"{hub.url}/{'' if repository.type == 'model' else repository.type + 's/'}{repository.id}"
    return answer_json(
        {
            "success": True,
            "commitUrl": f"{page}/commit/{commit.oid}",
            "commitOid": commit.oid,
            "pullRequestUrl": f"{page}/discussions/{number}" if pull_request else None,
            "hookOutput": "",
        }
    )


def merge(hub: "Hub", request: Request, kind: str, repo_id: str, number: str) -> Answer:
    repository = repository_of(hub, request, kind, repo_id, write=True)
    commit = _commit_of(repository, f"refs/pr/{number}")
    repository.refs["refs/heads/main"] = commit.oid
    repository.pull_requests[int(number) - 1].status = "merged"
    return answer_json({})


def discussions(hub: "Hub", request: Request, kind: str, repo_id: str) -> Answer:
    """Only pull requests are discussed here."""
    repository = repository_of(hub, request, kind, repo_id)
    wanted = {name: values[0] for name, values in request.query.items()}
    statuses = {"open": ("open", "draft"), "closed": ("closed", "merged")}.get(wanted.get("status"))
    found = [
        {
            "num": pull_request.number,
            "title": pull_request.title,
            "author": {"name": pull_request.author},
            "createdAt": pull_request.date,
            "status": pull_request.status,
            "repo": {"name": repository.id, "type": repository.type},
            "isPullRequest": True,
        }
        for pull_request in reversed(repository.pull_requests)
        if wanted.get("type") != "discussion"
        and wanted.get("author") in (None, pull_request.author)
        and (statuses is None or pull_request.status in statuses)
    ]
    start = int(wanted.get("p", 0)) * hub.page_size
    return answer_json({"count": len(found), "start": start, "discussions": found[start : start + hub.page_size]})


# ----------------------------------------------------------------------------------------------------------- downloads


def resolve(hub: "Hub", request: Request, kind: str | None, repo_id: str, revision: str, path: str) -> Answer:
    repository = repository_of(hub, request, kind, repo_id)
    _check_gate(hub, request, repository)
    commit = _commit_of(repository, unquote(revision))
    headers = {"X-Repo-Commit": commit.oid}
    file = commit.files.get(unquote(path))
    if file is None:
        raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}", headers)
    if not file.large:
        return content_of(hub, request, file.data, {**headers, "ETag": f'"{file.etag}"'})
    place = f"/{repository.type}s/{repository.id}/{file.sha256}/{unquote(path)}"
    linked = {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data)), "Accept-Ranges": "bytes"}
    if hub.xet:
        route = f"{hub.url}/api/{repository.type}s/{repository.id}/xet-read-token/{commit.oid}"
        linked |= {"X-Xet-Hash": hub.xet_hash(file, unquote(path)), "Link": f'<{route}>; rel="xet-auth"'}
    return Answer(302, b"", {**headers, **linked, "Location": hub.signed(place)})


def stored(hub: "Hub", request: Request, oid: str) -> Answer:
    hub.check_signature(request)
    return content_of(hub, request, hub.storage[oid], {"ETag": f'"{oid}"'})


def as_error(fault: Fault) -> HubError:
    if fault.kind == "wrong_token":
        return HubError(401, None, "Invalid credentials in Authorization header")
    if fault.kind == "missing_revision":
        return HubError(404, "RevisionNotFound", "Invalid rev id")
    headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
    return HubError(fault.status, None, fault.kind.replace("_", " "), headers)


def _entries(hub: "Hub", repository: Repository, commit: Commit, expand: bool) -> list[dict]:
    """Files and folders of a commit, as listings show them."""
    folders = {parent for path in commit.files for parent in _parents(path)}
    entries: list[dict] = [
        {"type": "directory", "oid": hashlib.sha1(folder.encode()).hexdigest(), "size": 0, "path": folder}
        for folder in folders
    ]
    for path, file in commit.files.items():
        entries.append({"type": "file", "oid": file.blob_id, "size": len(file.data), "path": path})
        if file.large:
            entries[-1]["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": len(file.pointer)}
            if hub.xet:
                entries[-1]["xetHash"] = hub.xet_hash(file, path)
    if expand:
        last = {"id": commit.oid, "title": commit.title, "date": commit.date}
        entries = [{**entry, "lastCommit": last} for entry in entries]
    return sorted(entries, key=lambda entry: entry["path"])


def _parents(path: str) -> list[str]:
    parts = path.split("/")[:-1]
    return ["/".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


KIND = r"(?P<kind>models|datasets|spaces)"
REPO = r"(?P<repo_id>[^/]+/[^/]+?)"
# A revision is quoted as a whole, except that some clients leave the slashes of a pull request's name.
REVISION = r"(?P<revision>refs/(?:pr|heads|tags)/[^/]+|[^/]+)"
API = rf"/api/{KIND}/{REPO}"
PLAIN = rf"/(?P<kind>datasets/|spaces/)?{REPO}"  # of a model, without "models/"

Route = tuple[str, re.Pattern, Callable[..., Answer]]
# On paths as they are sent, still quoted.
HUB_ROUTES: list[Route] = [
    (method, re.compile(pattern), function)
    for method, pattern, function in [
        ("GET", "/api/whoami-v2", whoami),
        ("POST", "/api/validate-yaml", validate_yaml),
        ("POST", "/api/repos/create", create_repo),
        ("DELETE", "/api/repos/delete", delete_repo),
        ("POST", "/api/repos/move", move_repo),
        ("GET", rf"/api/{KIND}", list_repos),
        ("GET", API, info),
        ("GET", rf"{API}/revision/{REVISION}", info),
        ("PUT", rf"{API}/settings", settings),
        ("GET", rf"{API}/auth-check(?P<write>/write)?", auth_check),
        ("GET", rf"{API}/tree/{REVISION}(?P<path>/.*)?", tree),
        ("POST", rf"{API}/paths-info/{REVISION}", paths_info),
        ("GET", rf"{API}/refs", refs),
        ("GET", rf"{API}/commits/{REVISION}", commits),
        ("POST|DELETE", rf"{API}/branch/(?P<branch>.+)", branch),
        ("POST", rf"{API}/tag/{REVISION}", add_tag),
        ("DELETE", rf"{API}/tag/(?P<tag>.+)", delete_tag),
        ("POST", rf"{API}/preupload/{REVISION}", preupload),
        ("POST", rf"{API}/commit/{REVISION}", commit),
        ("GET", rf"{API}/discussions", discussions),
        ("POST", rf"{API}/discussions/(?P<number>\d+)/merge", merge),
        ("GET|HEAD", rf"{PLAIN}/resolve/{REVISION}/(?P<path>.+)", resolve),
    ]
]
STORAGE_ROUTES: list[Route] = [
    (method, re.compile(pattern), function)
    for method, pattern, function in [
        ("GET|HEAD", r"/(?:models|datasets|spaces)/[^/]+/[^/]+/(?P<oid>[0-9a-f]{64})/.+", stored),
    ]
]
