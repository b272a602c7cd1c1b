"""The content-addressed storage (CAS) behind a Hub, where Xet, the clients' default transport, keeps large files.

A file is a sequence of chunks, and an archive of chunks is a xorb: for each a header of 8 bytes (version, three bytes
of compressed size, scheme, three bytes of size), then its bytes. What a client uploads are xorbs, and a shard that
tells of which chunks a file is made. Clients are told not to compress (`HF_XET_XORB_COMPRESSION_POLICY`), so that the
bytes of a file are there to be compared.
"""

import hashlib
import re
import struct
import time
from typing import TYPE_CHECKING

from tests.hub.api import (
    API,
    REVISION,
    Answer,
    HubError,
    Request,
    Route,
    answer_json,
    content_of,
    repository_of,
    user_of,
)


if TYPE_CHECKING:
    from tests.hub.server import Hub

CHUNK = 1 << 16  # bytes of a file in each chunk of what the tests put here
_ENTRY = 48  # bytes of each entry of a shard
_END = b"\xff" * 32  # where a hash would be, after the last entry of a section
_WITH_VERIFICATION, _WITH_SHA256 = 1 << 31, 1 << 30


def token(hub: "Hub", request: Request, kind: str, repo_id: str, revision: str, access: str) -> Answer:
    """Where the storage is, and a token for it that lasts an hour."""
    repository_of(hub, request, kind, repo_id, write=access == "write" and "create_pr" not in request.query)
    if access == "write" and user_of(hub, request) is None:
        raise HubError(401, None, "Invalid username or password.")
    expires = int(time.time()) + 3600
    found = {"casUrl": hub.cas_url, "exp": expires, "accessToken": f"xet-{access}"}
    headers = {
        "X-Xet-Cas-Url": hub.cas_url,
        "X-Xet-Access-Token": f"xet-{access}",
        "X-Xet-Token-Expiration": str(expires),
    }
    return answer_json(found, headers=headers)


def reconstruction(hub: "Hub", request: Request, file_hash: str) -> Answer:
    """Of which chunks a file, or a range of it, is made, and where they are fetched."""
    _check_token(request, "read")
    sha256 = hub.xet_files.get(file_hash, file_hash)
    if sha256 not in hub.storage:
        raise HubError(404, None, f"No file {file_hash}")
    size = len(hub.storage[sha256])
    wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", request.range or "")
    start, end = (int(wanted[1]), min(int(wanted[2]) + 1, size)) if wanted else (0, size)
    if start >= end:
        raise HubError(416, None, "Range not satisfiable")
    first, last = start // CHUNK, -(-end // CHUNK)
    begin, stop = first * CHUNK, min(last * CHUNK, size)
    chunks = {"start": first, "end": last}
    place = f"/xorbs/{sha256}/{hub.names.get(sha256, 'file')}"
    return answer_json(
        {
            "offset_into_first_range": start - begin,
            "terms": [{"hash": sha256, "unpacked_length": stop - begin, "range": chunks}],
            "fetch_info": {
                sha256: [
                    {
                        "range": chunks,
                        "url": hub.signed(place),
                        "url_range": {"start": first * (CHUNK + 8), "end": stop + last * 8 - 1},
                    }
                ]
            },
        }
    )


def xorb(hub: "Hub", request: Request, oid: str) -> Answer:
    """The chunks of a file that is kept here, one after the other."""
    hub.check_signature(request)
    return content_of(hub, request, hub.storage[oid], {"ETag": f'"{oid}"'}, wrap=_chunked)


def put_xorb(hub: "Hub", request: Request, oid: str) -> Answer:
    _check_token(request, "write")
    hub.xorbs[oid] = list(_chunks(request.body))
    return answer_json({"was_inserted": True})


def put_shard(hub: "Hub", request: Request) -> Answer:
    """Takes in the files that a shard tells of."""
    _check_token(request, "write")
    shard, place = request.body, 48
    while shard[place : place + 32] != _END:
        file_hash = _name(shard[place : place + 32])
        flags, count = struct.unpack_from("<II", shard, place + 32)
        place += _ENTRY
        data = b""
        for _ in range(count):
            name = _name(shard[place : place + 32])
            _, size, start, end = struct.unpack_from("<IIII", shard, place + 32)
            part = b"".join(hub.xorbs[name][start:end])
            if len(part) != size:
                raise HubError(400, None, f"{len(part)} bytes in {name}, {size} were announced")
            data += part
            place += _ENTRY
        place += _ENTRY * count if flags & _WITH_VERIFICATION else 0
        place += _ENTRY if flags & _WITH_SHA256 else 0
        sha256 = hashlib.sha256(data).hexdigest()
        hub.storage[sha256] = data
        hub.xet_files[file_hash] = sha256
    return answer_json({"result": 1})


def absent(hub: "Hub", request: Request) -> Answer:
    """Nothing is known of a chunk, so that all are uploaded."""
    raise HubError(404, None, "Not found")


def _check_token(request: Request, access: str) -> None:
    if request.headers.get("authorization") not in (f"Bearer xet-{access}", "Bearer xet-write"):
        raise HubError(401, None, "Unauthorized")


def _chunked(data: bytes) -> bytes:
    pieces = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    return b"".join(
        b"\0" + len(piece).to_bytes(3, "little") + b"\0" + len(piece).to_bytes(3, "little") + piece for piece in pieces
    )


def _chunks(content: bytes):
    place = 0
    while place + 8 <= len(content) and content[place : place + 7] != b"XETBLOB":
        size, scheme = int.from_bytes(content[place + 1 : place + 4], "little"), content[place + 4]
        if scheme:
            raise HubError(400, None, f"The tests read chunks that are not compressed, this one is ({scheme})")
        yield content[place + 8 : place + 8 + size]
        place += 8 + size


def _name(digest: bytes) -> str:
    """A hash as the API writes it: four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))


XET_HUB_ROUTES: list[Route] = [
    ("GET", re.compile(rf"{API}/xet-(?P<access>read|write)-token/{REVISION}"), token),
]
XET_STORAGE_ROUTES: list[Route] = [("GET", re.compile(r"/xorbs/(?P<oid>[0-9a-f]{64})/.+"), xorb)]
CAS_ROUTES: list[Route] = [
    ("GET", re.compile(r"/v1/reconstructions/(?P<file_hash>[0-9a-f]{64})"), reconstruction),
    ("POST", re.compile(r"/v1/xorbs/default/(?P<oid>[0-9a-f]{64})"), put_xorb),
    ("POST", re.compile(r"/(?:v1/)?shards"), put_shard),
    ("GET|HEAD|POST", re.compile(r"/.*"), absent),
]
