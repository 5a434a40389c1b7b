"""MANIFEST records: a whole model, self-contained, so that a catalog can be rebuilt from packs.

Names are bytes; the JSON part spells them as Latin-1 text, which maps every byte to one character.
"""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass

import zstandard

from fragfs.errors import FormatError, LimitError, UsageError
from fragfs.library.extents import ExtentMap
from fragfs.library.frames import read_frame
from fragfs.library.names import as_name
from fragfs.types import FragmentId

__all__ = ["ManifestContent", "ManifestFile", "StoredManifest", "pack_manifest", "parse_manifest"]

MANIFEST_BYTES_MAX = 1 << 34
_EXTENT_BYTES = 32 + 4 + 4 + 1


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One name of a model: a file if `content` is a number, else a directory."""

    path: bytes
    mode: int
    mtime_ns: int
    content: int | None


@dataclass(frozen=True, slots=True)
class ManifestContent:
    """One content of a model.

    Attributes:
        number: Content number, kept by a rebuild so that inode numbers survive it.
        sha256: SHA-256 of the whole content.
        mtime_ns: What the inode shows.
        verdict: What the importer found remarkable.
        ids: Fragment id per extent: 32 bytes each, back to back.
        sizes: Bytes per extent.
        offsets: Offset in the fragment per extent.
        kinds: Kind byte per extent, as in the catalog.
    """

    number: int
    sha256: bytes
    mtime_ns: int
    verdict: str
    ids: bytes
    sizes: array[int]
    offsets: array[int]
    kinds: bytes

    @classmethod
    def of_extents(
        cls,
        number: int,
        sha256: bytes,
        mtime_ns: int,
        verdict: str,
        extents: ExtentMap,
        ids: dict[int, FragmentId],
    ) -> ManifestContent:
        """Replace fragment numbers by ids: numbers mean nothing outside one catalog."""
        sizes, offsets, kinds = extents.columns()
        return cls(
            number,
            sha256,
            mtime_ns,
            verdict,
            b"".join(ids[fragment] for fragment in extents.fragments),
            sizes,
            offsets,
            kinds,
        )


@dataclass(frozen=True, slots=True)
class StoredManifest:
    """A model as a MANIFEST record holds it.

    Attributes:
        name: The model's name.
        added_ns: When it was first added.
        mtime_ns: Modification time of its own directory.
        mode: Permission bits of its own directory.
        files: Every name below it, directories included.
        contents: Every content its files show.
    """

    name: bytes
    added_ns: int
    mtime_ns: int
    mode: int
    files: tuple[ManifestFile, ...]
    contents: tuple[ManifestContent, ...]


def pack_manifest(manifest: StoredManifest) -> bytes:
    """The payload of a MANIFEST record (FORMAT.md, "Manifests")."""
    head = {
        "model": manifest.name.decode("latin-1"),
        "added_ns": manifest.added_ns,
        "mtime_ns": manifest.mtime_ns,
        "mode": manifest.mode,
        "files": [
            [file.path.decode("latin-1"), file.mode, file.mtime_ns, file.content]
            for file in manifest.files
        ],
        "contents": [
            [c.number, c.sha256.hex(), c.mtime_ns, c.verdict, len(c.kinds)]
            for c in manifest.contents
        ],
    }
    text = json.dumps(head, separators=(",", ":")).encode()
    parts = [len(text).to_bytes(4, "little"), text]
    for content in manifest.contents:
        parts += [
            content.ids,
            content.sizes.tobytes(),
            content.offsets.tobytes(),
            content.kinds,
        ]
    return zstandard.ZstdCompressor(level=3).compress(b"".join(parts))


def parse_manifest(payload: bytes | memoryview, where: str) -> StoredManifest:
    """Read what `pack_manifest` wrote.

    Raises:
        FormatError: The payload is not a manifest.
    """
    try:
        data = read_frame(payload, 4, MANIFEST_BYTES_MAX)
        head_end = 4 + int.from_bytes(data[:4], "little")
        head = json.loads(data[4:head_end])
        contents = []
        position = head_end
        for number, sha256, mtime_ns, verdict, count in head["contents"]:
            _check_integers(number, mtime_ns, count)
            if len(sha256) != 64 or not isinstance(verdict, str):
                raise ValueError("a content is malformed")
            columns = data[position : position + _EXTENT_BYTES * count]
            if len(columns) != _EXTENT_BYTES * count:
                raise ValueError("extents end early")
            contents.append(
                ManifestContent(
                    number,
                    bytes.fromhex(sha256),
                    mtime_ns,
                    verdict,
                    columns[: 32 * count],
                    array("I", columns[32 * count : 36 * count]),
                    array("I", columns[36 * count : 40 * count]),
                    columns[40 * count :],
                )
            )
            position += _EXTENT_BYTES * count
        files = []
        for path, mode, mtime_ns, content in head["files"]:
            _check_integers(mode, mtime_ns, 0 if content is None else content)
            files.append(ManifestFile(as_name(path.encode("latin-1")), mode, mtime_ns, content))
        _check_integers(head["added_ns"], head["mtime_ns"], head["mode"])
        return StoredManifest(
            as_name(head["model"].encode("latin-1")),
            head["added_ns"],
            head["mtime_ns"],
            head["mode"],
            tuple(files),
            tuple(contents),
        )
    except (
        zstandard.ZstdError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        UsageError,
        LimitError,
    ) as error:
        raise FormatError(
            f"the manifest in {where} is not readable: {error}",
            remedy="restore the pack from a backup",
        ) from error


def _check_integers(*values: object) -> None:
    """Refuse what the catalog could not hold as an integer."""
    for value in values:
        if type(value) is not int or not -(1 << 63) <= value < 1 << 63:
            raise ValueError(f"{value!r:.40} where an integer is due")
