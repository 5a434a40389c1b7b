"""Publishing: a finished model, a removal or a rename becomes visible in one batch.

Each function runs under the writer lock, inside a `Batch`: it appends the record that lets a
rebuild repeat the change, then commits record and catalog together.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fragfs.errors import NotFoundError, StorageError, UsageError
from fragfs.library.batch import Batch
from fragfs.library.catalog import Catalog
from fragfs.library.extents import ExtentMap, check_seal
from fragfs.library.manifests import (
    ManifestContent,
    ManifestFile,
    StoredManifest,
    pack_manifest,
)
from fragfs.library.names import join, parents, printable, split
from fragfs.library.records import RecordKind
from fragfs.library.unpublished import settle_published
from fragfs.types import SHARED_INODE_BYTES_MIN, FragmentId

__all__ = [
    "DraftDirectory",
    "DraftFile",
    "ModelDraft",
    "NewContent",
    "RemoveReport",
    "check_new_name",
    "current_manifest",
    "load_draft",
    "pack_current_manifest",
    "publish_model",
    "publish_move",
    "publish_path_removal",
    "publish_removal",
    "refresh_stored_bytes",
]


@dataclass(frozen=True, slots=True)
class RemoveReport:
    """What was removed, and what the library could give back now.

    Attributes:
        model: The model concerned.
        file_count: Files removed from it.
        removed_bytes: Their bytes.
        unreferenced_bytes: Record bytes in the whole library that no model needs any more.
        kept_bytes: Record bytes of the removed files' fragments that are in no file any more and
            stay because others are predicted from them.
        kept_for: The models those others are in and the record bytes that each of them needs,
            most first.
    """

    model: bytes
    file_count: int
    removed_bytes: int
    unreferenced_bytes: int
    kept_bytes: int = 0
    kept_for: tuple[tuple[bytes, int], ...] = ()


@dataclass(frozen=True, slots=True)
class NewContent:
    """A file content whose fragments are all committed, and which no file shows yet."""

    sha256: bytes
    size: int
    mtime_ns: int
    verdict: str
    extents: ExtentMap


@dataclass(frozen=True, slots=True)
class DraftFile:
    """A file of a model to be: its content is either in the catalog already, or new."""

    path: bytes
    mode: int
    mtime_ns: int
    content: int | NewContent


@dataclass(frozen=True, slots=True)
class DraftDirectory:
    """A directory of a model to be; b"" is the model's own."""

    path: bytes
    mode: int
    mtime_ns: int


@dataclass(slots=True)
class ModelDraft:
    """All of a model as it shall be.

    Attributes:
        name: The model's name.
        number: Its number if it is in the catalog, None if it is new.
        added_ns: When it was first added.
        directories: By path; always has b"".
        files: By path.
    """

    name: bytes
    number: int | None
    added_ns: int
    directories: dict[bytes, DraftDirectory]
    files: dict[bytes, DraftFile]

    def add_parents(self, path: bytes, now_ns: int) -> None:
        """Make sure that the directories above `path` exist; the nearest one has changed now."""
        nearest = True
        for directory in parents(path):
            known = self.directories.get(directory)
            if known is None or nearest:
                mode = known.mode if known else 0o755
                self.directories[directory] = DraftDirectory(directory, mode, now_ns)
            nearest = known is None


def check_new_name(catalog: Catalog, name: bytes) -> None:
    """Refuse a model name that is taken, or that would put one model inside another.

    Raises:
        UsageError: It may not be used.
    """
    shown = printable(name)
    if catalog.row("SELECT 1 FROM models WHERE name = ?", (name,)):
        raise UsageError(
            f"the library has a model named {shown} already",
            remedy="choose another name, or pass --update to an add to bring it up to date",
        )
    for parent in parents(name)[:-1]:
        if catalog.row("SELECT 1 FROM models WHERE name = ?", (parent,)):
            raise UsageError(
                f"{shown} would lie inside the model {printable(parent)}",
                remedy="choose a name outside it, or add files to it with --into",
            )
    if catalog.row("SELECT 1 FROM folders WHERE path = ?", (name,)):
        raise UsageError(
            f"{shown} is a folder that holds models",
            remedy="choose a name that no other model's name begins with",
        )


def load_draft(catalog: Catalog, name: bytes) -> ModelDraft:
    """A stored model as a draft that can be changed and published again.

    Raises:
        NotFoundError: No such model.
    """
    row = catalog.row("SELECT number, added_ns, mtime_ns, mode FROM models WHERE name = ?", (name,))
    if row is None:
        raise NotFoundError(f"the library has no model named {printable(name)}")
    number, added_ns, mtime_ns, mode = row
    draft = ModelDraft(name, number, added_ns, {b"": DraftDirectory(b"", mode, mtime_ns)}, {})
    for directory, leaf, content, file_mode, file_mtime_ns in catalog.rows(
        "SELECT directory, name, content, mode, mtime_ns FROM files WHERE model = ?", (number,)
    ):
        path = join(directory, leaf)
        if content is None:
            draft.directories[path] = DraftDirectory(path, file_mode, file_mtime_ns)
        else:
            draft.files[path] = DraftFile(path, file_mode, file_mtime_ns, content)
    return draft


def publish_model(batch: Batch, catalog: Catalog, draft: ModelDraft, now_ns: int) -> None:
    """Make a draft visible: a new model, or a new state of an old one.

    Raises:
        UsageError: The name was taken meanwhile.
        StorageError: A fragment it needs was collected meanwhile; adding again stores it anew.
    """
    if draft.number is None:
        check_new_name(catalog, draft.name)
    numbered = _Contents(catalog, draft)
    manifest = _manifest(draft, numbered)
    batch.append_plain(RecordKind.MANIFEST, pack_manifest(manifest))

    new = [file.content for file in draft.files.values() if isinstance(file.content, NewContent)]
    published = {number for content in new for number in content.extents.fragments}

    def apply(connection: sqlite3.Connection) -> None:
        _write_model(connection, draft, manifest, numbered, now_ns)
        settle_published(connection, published)

    batch.commit(apply)


def publish_removal(batch: Batch, catalog: Catalog, name: bytes, now_ns: int) -> None:
    """Remove a model from the catalog; its fragments stay where they are."""
    number = load_draft(catalog, name).number
    batch.append_plain(RecordKind.REMOVAL, name)

    def apply(connection: sqlite3.Connection) -> None:
        _delete_names(connection, number)
        connection.execute("DELETE FROM models WHERE number = ?", (number,))
        _leave_folders(connection, name, now_ns)

    batch.commit(apply)


def publish_path_removal(
    batch: Batch, catalog: Catalog, name: bytes, paths: Sequence[bytes], now_ns: int
) -> set[bytes]:
    """Remove files and directories of a model.

    Returns:
        The paths that are gone: those named, and all below them.

    Raises:
        NotFoundError: No such model or path; nothing was removed.
    """
    draft = load_draft(catalog, name)
    gone: set[bytes] = set()
    for path in paths:
        below = path + b"/"
        found = {p for p in (*draft.files, *draft.directories) if p == path or p.startswith(below)}
        if not found or path == b"":
            raise NotFoundError(
                f"{printable(name)} has no file {printable(path)}",
                remedy=f"see its files with: fragfs ls {printable(name)}",
            )
        gone |= found
        draft.add_parents(path, now_ns)
    draft.files = {path: file for path, file in draft.files.items() if path not in gone}
    draft.directories = {
        path: directory for path, directory in draft.directories.items() if path not in gone
    }
    publish_model(batch, catalog, draft, now_ns)
    return gone


def publish_move(batch: Batch, catalog: Catalog, old: bytes, new: bytes, now_ns: int) -> None:
    """Rename a model; numbers, inodes and bytes stay.

    Raises:
        NotFoundError: No model named `old`.
        UsageError: `new` may not be used.
    """
    draft = load_draft(catalog, old)
    if new.startswith(old + b"/") or old.startswith(new + b"/"):
        # Its own old place does not count as "another model" or as a folder in use.
        others = catalog.row(
            "SELECT 1 FROM models WHERE name != ? AND (name = ? OR substr(name, 1, ?) = ?)",
            (old, new, len(new) + 1, new + b"/"),
        )
        if others:
            check_new_name(catalog, new)
    else:
        check_new_name(catalog, new)
    draft.name = new
    batch.append_plain(RecordKind.REMOVAL, old)
    batch.append_plain(
        RecordKind.MANIFEST, pack_manifest(_manifest(draft, _Contents(catalog, draft)))
    )

    def apply(connection: sqlite3.Connection) -> None:
        connection.execute(
            "UPDATE models SET name = ?, parent = ? WHERE number = ?",
            (new, split(new)[0], draft.number),
        )
        _leave_folders(connection, old, now_ns)
        _enter_folders(connection, new, now_ns)

    batch.commit(apply)


def current_manifest(catalog: Catalog, name: bytes) -> StoredManifest:
    """A model as it is now.

    Raises:
        NotFoundError: No such model.
    """
    draft = load_draft(catalog, name)
    return _manifest(draft, _Contents(catalog, draft))


def pack_current_manifest(catalog: Catalog, name: bytes) -> bytes:
    """The payload of a MANIFEST record of a model as it is now.

    Raises:
        NotFoundError: No such model.
    """
    return pack_manifest(current_manifest(catalog, name))


def _manifest(draft: ModelDraft, numbered: _Contents) -> StoredManifest:
    top = draft.directories[b""]
    directories = [
        ManifestFile(d.path, d.mode, d.mtime_ns, None) for d in draft.directories.values() if d.path
    ]
    files = [
        ManifestFile(f.path, f.mode, f.mtime_ns, numbered.of_file[f.path])
        for f in draft.files.values()
    ]
    return StoredManifest(
        draft.name,
        draft.added_ns,
        top.mtime_ns,
        top.mode,
        (*directories, *files),
        tuple(numbered.manifest_contents()),
    )


class _Contents:
    """Numbers for the contents of a draft, and the ids of all fragments they need."""

    def __init__(self, catalog: Catalog, draft: ModelDraft) -> None:
        self._catalog = catalog
        self.of_file: dict[bytes, int] = {}
        self.new: dict[int, NewContent] = {}
        self._fragments: dict[int, tuple[FragmentId, int]] = {}
        shared: dict[tuple[bytes, int], int] = {}
        next_number = catalog.next_number("contents")
        for file in draft.files.values():
            if isinstance(file.content, int):
                self.of_file[file.path] = file.content
                continue
            number = self._find_shared(file.content, shared)
            if number is None:
                number = next_number
                next_number += 1
                self.new[number] = file.content
                if file.content.size >= SHARED_INODE_BYTES_MIN:
                    shared[file.content.sha256, file.content.size] = number
            self.of_file[file.path] = number
        self._load_fragments([content.extents for content in self.new.values()])

    def _find_shared(self, content: NewContent, shared: dict[tuple[bytes, int], int]) -> int | None:
        if content.size < SHARED_INODE_BYTES_MIN:
            return None
        key = (content.sha256, content.size)
        if key not in shared:
            row = self._catalog.row(
                "SELECT number FROM contents WHERE sha256 = ? AND size = ? AND size >= ?",
                (*key, SHARED_INODE_BYTES_MIN),
            )
            if row is None:
                return None
            shared[key] = row[0]
        return shared[key]

    def _load_fragments(self, maps: Sequence[ExtentMap]) -> None:
        numbers = {number for extents in maps for number in extents.fragments}
        wanted = sorted(numbers - set(self._fragments))
        for start in range(0, len(wanted), 500):
            part = wanted[start : start + 500]
            marks = ",".join("?" * len(part))
            for number, fragment, record_size in self._catalog.rows(
                f"SELECT number, id, record_size FROM fragments WHERE number IN ({marks})", part
            ):
                self._fragments[number] = (FragmentId(fragment), record_size)
        missing = [number for number in wanted if number not in self._fragments]
        if missing:
            raise StorageError(
                f"{len(missing)} fragments of this model were collected while it was added",
                retryable=True,
                remedy="run the command again",
            )

    def stored_bytes(self, extents: ExtentMap) -> int:
        """Record bytes of the distinct fragments of a new content."""
        return sum(self._fragments[number][1] for number in set(extents.fragments))

    def manifest_contents(self) -> Iterable[ManifestContent]:
        """Every distinct content of the draft, old ones loaded from the catalog."""
        described: list[tuple[int, bytes, int, str, ExtentMap]] = []
        for number in sorted(set(self.of_file.values())):
            new = self.new.get(number)
            if new is not None:
                described.append((number, new.sha256, new.mtime_ns, new.verdict, new.extents))
                continue
            row = self._catalog.row(
                "SELECT sha256, mtime_ns, verdict, extents FROM contents WHERE number = ?",
                (number,),
            )
            if row is None:
                raise NotFoundError(f"content {number} is not in the catalog")
            check_seal(row[3], number, row[0])
            described.append((number, *row[:3], ExtentMap.parse(row[3])))
        self._load_fragments([extents for *_, extents in described])
        for number, sha256, mtime_ns, verdict, extents in described:
            ids = {fragment: self._fragments[fragment][0] for fragment in set(extents.fragments)}
            yield ManifestContent.of_extents(number, sha256, mtime_ns, verdict, extents, ids)


def refresh_stored_bytes(batch: Batch, catalog: Catalog) -> None:
    """Count again what the fragments of every content take, after records were replaced."""
    sizes = dict(catalog.rows("SELECT number, record_size FROM fragments"))
    changed = []
    for number, stored_bytes, blob in catalog.rows(
        "SELECT number, stored_bytes, extents FROM contents"
    ):
        total = sum(sizes.get(fragment, 0) for fragment in set(ExtentMap.parse(blob).fragments))
        if total != stored_bytes:
            changed.append((total, number))

    def apply(connection: sqlite3.Connection) -> None:
        connection.executemany("UPDATE contents SET stored_bytes = ? WHERE number = ?", changed)

    batch.commit(apply)


def _write_model(
    connection: sqlite3.Connection,
    draft: ModelDraft,
    manifest: StoredManifest,
    numbered: _Contents,
    now_ns: int,
) -> None:
    if draft.number is None:
        cursor = connection.execute(
            "INSERT INTO models (name, parent, added_ns, mtime_ns, mode) VALUES (?, ?, ?, ?, ?)",
            (draft.name, split(draft.name)[0], draft.added_ns, manifest.mtime_ns, manifest.mode),
        )
        number = cursor.lastrowid
        _enter_folders(connection, draft.name, now_ns)
    else:
        number = draft.number
        changed = connection.execute(
            "UPDATE models SET mtime_ns = ?, mode = ? WHERE number = ? AND name = ?",
            (manifest.mtime_ns, manifest.mode, number, draft.name),
        ).rowcount
        assert changed == 1, "a draft of an existing model is loaded under the lock"
    connection.executemany(
        "INSERT INTO contents VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            (
                content_number,
                content.sha256,
                content.size,
                content.mtime_ns,
                numbered.stored_bytes(content.extents),
                content.verdict,
                content.extents.pack(content_number, content.sha256),
            )
            for content_number, content in numbered.new.items()
        ),
    )

    def insert() -> None:
        connection.executemany(
            "INSERT INTO files VALUES (?, ?, ?, ?, ?, ?)",
            (
                (number, *split(file.path), file.content, file.mode, file.mtime_ns)
                for file in manifest.files
            ),
        )

    _delete_names(connection, number, insert)


def _delete_names(
    connection: sqlite3.Connection, model: int | None, insert: Callable[[], None] | None = None
) -> None:
    """Delete a model's names, put others in their place, and drop contents that lost their last."""
    old = connection.execute(
        "SELECT DISTINCT content FROM files WHERE model = ? AND content IS NOT NULL", (model,)
    ).fetchall()
    connection.execute("DELETE FROM files WHERE model = ?", (model,))
    if insert is not None:
        insert()
    connection.executemany(
        "DELETE FROM contents WHERE number = ?"
        " AND NOT EXISTS (SELECT 1 FROM files WHERE content = contents.number)",
        old,
    )


def _enter_folders(connection: sqlite3.Connection, name: bytes, now_ns: int) -> None:
    """Create the folders above a model's name; the nearest old one has changed now."""
    for folder in parents(name):
        changed = connection.execute(
            "UPDATE folders SET mtime_ns = ? WHERE path = ?", (now_ns, folder)
        ).rowcount
        if changed:
            return
        connection.execute(
            "INSERT INTO folders VALUES (?, ?, ?)", (folder, split(folder)[0], now_ns)
        )


def _leave_folders(connection: sqlite3.Connection, name: bytes, now_ns: int) -> None:
    """Remove the folders above a name that are empty now; the nearest other one has changed."""
    for folder in parents(name):
        used = folder == b"" or _is_used(connection, folder)
        if used:
            connection.execute("UPDATE folders SET mtime_ns = ? WHERE path = ?", (now_ns, folder))
            return
        connection.execute("DELETE FROM folders WHERE path = ?", (folder,))


def _is_used(connection: sqlite3.Connection, folder: bytes) -> bool:
    for table in ("models", "folders"):
        if connection.execute(f"SELECT 1 FROM {table} WHERE parent = ?", (folder,)).fetchone():
            return True
    return False
