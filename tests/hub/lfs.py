"""The older transport of large files: a list of what to upload, signed URLs to put it to, whole or in parts."""

import hashlib
import re
from typing import TYPE_CHECKING, Any

from tests.hub.api import PLAIN, Answer, HubError, Request, Route, answer_json, repository_of, user_of


if TYPE_CHECKING:
    from tests.hub.server import Hub


def lfs_batch(hub: "Hub", request: Request, kind: str | None, repo_id: str) -> Answer:
    if user_of(hub, request) is None:
        raise HubError(401, None, "Invalid username or password.")
    repository, objects = repository_of(hub, request, kind, repo_id), []
    for wanted in request.json()["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        objects.append({"oid": oid, "size": size})
        if oid in hub.storage:
            continue
        place = f"/uploads/{repository.id}/{oid}"
        upload: dict[str, Any] = {"href": hub.signed(place)}
        if size > hub.part_size:
            count = -(-size // hub.part_size)
            urls = {str(part): hub.signed(f"{place}/{part}") for part in range(1, count + 1)}
            upload = {
                "href": f"{hub.url}/api/complete_multipart/{oid}",
                "header": {"chunk_size": str(hub.part_size), **urls},
            }
        prefix = "" if repository.type == "model" else f"{repository.type}s/"
        verify = f"{hub.url}/{prefix}{repository.id}.git/info/lfs/objects/verify"
        objects[-1]["actions"] = {"upload": upload, "verify": {"href": verify, "header": {}}}
    return answer_json({"transfer": "basic", "objects": objects})


def lfs_verify(hub: "Hub", request: Request, kind: str | None, repo_id: str) -> Answer:
    repository_of(hub, request, kind, repo_id)
    body = request.json()
    if len(hub.storage.get(body["oid"], b"")) != body["size"]:
        raise HubError(404, None, f"Object {body['oid']} is not in the storage")
    return answer_json({})


def put(hub: "Hub", request: Request, oid: str, part: str | None = None) -> Answer:
    hub.check_signature(request)
    if part is not None:
        hub.parts.setdefault(oid, {})[int(part)] = request.body
    elif hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, None, "BadDigest: what arrived is not what was announced")
    else:
        hub.storage[oid] = request.body
    return Answer(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})


def complete_parts(hub: "Hub", request: Request, oid: str) -> Answer:
    parts = hub.parts.pop(oid, {})
    data = b"".join(parts[number] for number in sorted(parts))
    if hashlib.sha256(data).hexdigest() != oid:
        raise HubError(400, None, "BadDigest: what arrived is not what was announced")
    hub.storage[oid] = data
    return answer_json({})


LFS_HUB_ROUTES: list[Route] = [
    (method, re.compile(pattern), function)
    for method, pattern, function in [
        ("POST", "/api/complete_multipart/(?P<oid>[0-9a-f]{64})", complete_parts),
        ("POST", rf"{PLAIN}\.git/info/lfs/objects/batch", lfs_batch),
        ("POST", rf"{PLAIN}\.git/info/lfs/objects/verify", lfs_verify),
    ]
]
LFS_STORAGE_ROUTES: list[Route] = [
    (method, re.compile(pattern), function)
    for method, pattern, function in [
        ("PUT", r"/uploads/.+/(?P<oid>[0-9a-f]{64})(?:/(?P<part>\d+))?", put),
    ]
]
