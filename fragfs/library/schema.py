"""The tables of the catalog, and what brings those of an older version up to date.

Source: FORMAT.md, "The catalog" and "Versions".
"""

from __future__ import annotations

from fragfs.types import SHARED_INODE_BYTES_MIN

__all__ = ["APPLICATION_ID", "FIRST_CONTENT", "MIGRATIONS", "SCHEMA"]

APPLICATION_ID = 0x46524147
"""Identifies the database file as ours ("FRAG")."""
FIRST_CONTENT = 1024
"""Content numbers are inode numbers; the ones below are kept for a mount's own use."""

_SIMILARITY_SCHEMA = """
CREATE TABLE bases (
    fragment INTEGER NOT NULL,
    position INTEGER NOT NULL,
    base INTEGER NOT NULL,
    PRIMARY KEY (fragment, position)
) WITHOUT ROWID;
CREATE INDEX bases_base ON bases (base);
CREATE TABLE signatures (
    fragment INTEGER PRIMARY KEY,
    sketch BLOB NOT NULL
);
CREATE TABLE similar (
    key INTEGER NOT NULL,
    fragment INTEGER NOT NULL,
    PRIMARY KEY (key, fragment)
) WITHOUT ROWID;
"""
"""What version 2 added: who is predicted from whom, and how base candidates are found."""

_KEEPING_SCHEMA = """
CREATE TABLE quarantine (
    fragment INTEGER PRIMARY KEY,
    since_ns INTEGER NOT NULL,
    reason TEXT NOT NULL
);
CREATE TABLE unpublished (
    first INTEGER PRIMARY KEY,
    last INTEGER NOT NULL,
    stored_ns INTEGER NOT NULL
);
"""
"""What version 3 added: fragments found damaged, and ranges of fragments that wait for a model."""

SCHEMA = f"""
CREATE TABLE library (
    only INTEGER PRIMARY KEY CHECK (only = 1),
    uuid BLOB NOT NULL,
    fragment_elements INTEGER NOT NULL,
    closure_max INTEGER NOT NULL,
    zstd_level INTEGER NOT NULL,
    pack_bytes_max INTEGER NOT NULL,
    generation INTEGER NOT NULL,
    batch BLOB NOT NULL,
    level INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE packs (
    number INTEGER PRIMARY KEY,
    committed_size INTEGER NOT NULL,
    file_size INTEGER NOT NULL,
    state INTEGER NOT NULL
);
CREATE TABLE fragments (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id BLOB NOT NULL UNIQUE,
    pack INTEGER NOT NULL,
    offset INTEGER NOT NULL,
    record_size INTEGER NOT NULL,
    raw_size INTEGER NOT NULL,
    predictor INTEGER NOT NULL
);
CREATE TABLE models (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    name BLOB NOT NULL UNIQUE,
    parent BLOB NOT NULL,
    added_ns INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    mode INTEGER NOT NULL
);
CREATE INDEX models_parent ON models (parent);
CREATE TABLE folders (
    path BLOB PRIMARY KEY,
    parent BLOB NOT NULL,
    mtime_ns INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX folders_parent ON folders (parent);
CREATE TABLE contents (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    sha256 BLOB NOT NULL,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    stored_bytes INTEGER NOT NULL,
    verdict TEXT NOT NULL,
    extents BLOB NOT NULL
);
CREATE INDEX contents_shared ON contents (sha256) WHERE size >= {SHARED_INODE_BYTES_MIN};
CREATE TABLE files (
    model INTEGER NOT NULL,
    directory BLOB NOT NULL,
    name BLOB NOT NULL,
    content INTEGER,
    mode INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    PRIMARY KEY (model, directory, name)
) WITHOUT ROWID;
CREATE INDEX files_content ON files (content) WHERE content IS NOT NULL;
{_SIMILARITY_SCHEMA}{_KEEPING_SCHEMA}"""

MIGRATIONS = {
    1: "ALTER TABLE library ADD COLUMN level INTEGER NOT NULL DEFAULT 0;" + _SIMILARITY_SCHEMA,
    2: _KEEPING_SCHEMA,
}
"""What brings a catalog of a version to the next one."""
