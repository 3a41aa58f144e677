"""What the stand-in Hub stores: repositories as branches and tags over content-addressed commits.

Repo      branches and tags that point to commits
Commit    a snapshot path -> File; its id is a hash of the snapshot, the parent and the message
File      size and ids of one content; the bytes themselves lie in HubServer.objects, by sha256
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property


class HubError(Exception):
    """An answer that isn't a success; `code` becomes X-Error-Code, by which clients choose their exception."""

    def __init__(self, status: int, message: str, code: str | None = None, body: dict | None = None):
        super().__init__(message)
        self.status, self.code, self.body = status, code, body or {"error": message}


def git_blob_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class File:
    """Ids of one content. `oid` is git's: of the bytes, or of the pointer file that stands for them under LFS."""

    sha256: str
    size: int  # bytes
    lfs: bool
    oid: str
    pointer_size: int = 0  # bytes

    @classmethod
    def regular(cls, content: bytes) -> File:
        return cls(hashlib.sha256(content).hexdigest(), len(content), False, git_blob_oid(content))

    @classmethod
    def pointer(cls, sha256: str, size: int) -> File:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return cls(sha256, size, True, git_blob_oid(text), len(text))

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def to_json(self, path: str) -> dict:
        entry: dict = {"type": "file", "path": path, "oid": self.oid, "size": self.size}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": self.pointer_size}
        return entry


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(frozen=True)
class Commit:
    files: dict[str, File]
    parent: Commit | None
    title: str
    message: str
    author: str
    date: str = field(default_factory=_now)

    @cached_property
    def oid(self) -> str:
        tree = sorted((path, file.oid) for path, file in self.files.items())
        parent = self.parent.oid if self.parent else None
        text = json.dumps([tree, parent, self.title, self.message, self.author, self.date])
        return hashlib.sha1(text.encode()).hexdigest()

    def history(self) -> list[Commit]:
        """This commit and its ancestors, newest first."""
        return [self, *(self.parent.history() if self.parent else [])]

    def folders(self) -> dict[str, str]:
        """Each folder's path and an id that changes with its content (not git's tree id)."""
        parts = {path.rsplit("/", depth)[0] for path in self.files for depth in range(1, path.count("/") + 1)}
        listing = {f: sorted((p, x.oid) for p, x in self.files.items() if p.startswith(f + "/")) for f in parts}
        return {folder: hashlib.sha1(repr(entries).encode()).hexdigest() for folder, entries in listing.items()}


@dataclass
class Repo:
    kind: str  # "models" or "datasets", as in the routes
    id: str  # "namespace/name"
    private: bool
    branches: dict[str, Commit]
    tags: dict[str, Commit] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    def commit_at(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a whole commit id names."""
        named = {**self.tags, **self.branches}
        named |= {commit.oid: commit for head in named.values() for commit in head.history()}
        if revision not in named:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return named[revision]
