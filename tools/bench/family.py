"""Section "family": how many bytes a family of related models takes, beside other tools."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import zstandard

from fragfs.library.library import FragmentLibrary
from tools.bench.models import read_tensors
from tools.bench.report import NOT_INSTALLED, Table
from tools.bench.setting import Setting
from tools.bench.workplace import BenchError, fragfs, new_library, run_timed, tree_size
from tools.bench.xor_delta import XorStore
from tools.bench.zipnn_codec import DTYPES, open_zipnn
from tools.make_family import FamilyError, Member, make_family, read_family

__all__ = [
    "ROWS",
    "XOR_EXPECTED",
    "Family",
    "FamilyOptions",
    "Row",
    "list_orders",
    "measure_family",
    "offered_levels",
]

LEVELS = ("fast", "balanced", "small")
XOR_EXPECTED = 0.38
"""Stored / raw of the XOR baseline on a family that is neither too easy nor too hard."""
_XOR_TOLERANCE = 0.15
_ZSTD_LEVEL = 3


@dataclass(frozen=True)
class FamilyOptions:
    """What of the section to run.

    Attributes:
        directory: A family made by tools/make_family.py; None to make one.
        order_count: How many other orders to add the whole family in, up to 7.
        levels: Levels of fragfs to measure; empty for all it offers.
        optimize: Measure `fragfs optimize` as well, if there is such a command.
    """

    directory: Path | None = None
    order_count: int = 0
    levels: tuple[str, ...] = ()
    optimize: bool = True


@dataclass(frozen=True)
class Row:
    """Members of some kind, which get a row together.

    Attributes:
        text: Its head.
        key: Its name in the figures.
        kind: The kind of the members.
        dtype: Their dtype; "" for any.
    """

    text: str
    key: str
    kind: str
    dtype: str = ""

    def has(self, member: Member) -> bool:
        """Whether a member belongs here."""
        return member.kind == self.kind and self.dtype in ("", member.dtype)


ROWS = (
    Row("bf16 gentle fine-tune", "gentle", "gentle"),
    Row("bf16 usual fine-tune", "usual", "usual"),
    Row("bf16 strong fine-tune", "strong", "strong"),
    Row("bf16 checkpoint beside its neighbour", "checkpoint_bf16", "checkpoint", "BF16"),
    Row("f32 checkpoint beside its neighbour", "checkpoint_f32", "checkpoint", "F32"),
    Row("bf16 copy of the stored f32 model", "copy_bf16", "copy", "BF16"),
    Row("f16 copy of the stored f32 model", "copy_f16", "copy", "F16"),
    Row("linear merge of two fine-tunes", "linear", "linear"),
    Row("slerp merge", "slerp", "slerp"),
    Row("TIES merge", "ties", "ties"),
    Row("only the top layers trained", "top", "top"),
    Row("only query and value trained", "qv", "qv"),
    Row("LoRA adapter merged in", "lora", "lora"),
    Row("grown vocabulary, then trained", "grown", "grown"),
    Row("renamed tensors", "renamed", "renamed"),
    Row("other shards", "sharded", "sharded"),
    Row("int8 of the stored f32 model", "int8", "int8"),
    Row("int8 of a stored fine-tune", "int8_tuned", "int8-tuned"),
    Row("fp8 of the stored f32 model", "fp8", "fp8"),
)


@dataclass
class Family:
    """A family on disk.

    Attributes:
        place: Its directory.
        members: Its members, in the order in which they were made.
    """

    place: Path
    members: list[Member]
    _sizes: dict[str, int] = field(default_factory=dict)

    @cached_property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.size_of(member) for member in self.members)

    def size_of(self, member: Member) -> int:
        """Bytes of all files of a member."""
        if member.name not in self._sizes:
            self._sizes[member.name] = tree_size(self.path_of(member))
        return self._sizes[member.name]

    def path_of(self, member: Member) -> Path:
        """A member's directory."""
        return self.place / member.name

    def ancestors(self, member: Member) -> list[Member]:
        """What a member is derived from, and what that is derived from, in the family's order."""
        by_name = {other.name: other for other in self.members}
        found: set[str] = set()
        waiting = list(member.parents)
        while waiting:
            if (name := waiting.pop()) not in found:
                found.add(name)
                waiting += by_name[name].parents
        return [other for other in self.members if other.name in found]


@dataclass(frozen=True)
class Stored:
    """What storing a whole family took.

    Attributes:
        size: Bytes in the end.
        grown: By how many bytes each member made it grow, by name; empty if that is not known.
        seconds: Wall time.
    """

    size: int
    grown: dict[str, int]
    seconds: float


def measure_family(setting: Setting, options: FamilyOptions) -> list[Table]:
    """Stored / raw of a family, and of each kind of member beside what it is derived from."""
    family = _open_family(setting.place, options)
    return [_tabulate(_Measurements(family, setting.place / "stores", options))]


def _open_family(place: Path, options: FamilyOptions) -> Family:
    try:
        if options.directory is not None:
            return Family(options.directory, read_family(options.directory))
        return Family(place / "family", make_family(place / "family"))
    except FamilyError as error:
        raise BenchError(str(error)) from error


def list_orders(members: Sequence[Member], count: int) -> list[list[Member]]:
    """The first `count` of: by name, by name backwards, five times shuffled (always alike)."""
    named = sorted(members, key=lambda member: member.name)
    orders = [named, named[::-1]]
    for seed in range(5):
        shuffled = named.copy()
        random.Random(seed).shuffle(shuffled)
        orders.append(shuffled)
    return orders[:count]


def offered_levels() -> tuple[str, ...]:
    """The levels that `fragfs init` knows by name; one without a name if it knows none."""
    return LEVELS if LEVELS[1] in _help("init") else ("",)


def _help(*command: str) -> str:
    words = [sys.executable, "-m", "fragfs", *command, "--help"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout


class _Measurements:
    """All that is measured of one family."""

    def __init__(self, family: Family, place: Path, options: FamilyOptions) -> None:
        self.family = family
        self.options = options
        self.levels = tuple(
            level
            for level in offered_levels()
            if level in options.levels or not (level and options.levels)
        )
        self.can_optimize = options.optimize and "\n  optimize " in _help()
        self._place = place
        self._bases: dict[tuple[str, ...], Path] = {}
        place.mkdir()

    # --- fragfs

    def fragfs(self, level: str, members: Sequence[Member]) -> tuple[Stored, Stored | None]:
        """The library's directory after adding members in this order, and after optimizing."""
        library = self._new_library(self._place / "whole.fragfs", level)
        begun = time.monotonic()
        for member in members:
            fragfs("add", self.family.path_of(member), library=library)
        seconds = time.monotonic() - begun
        added, optimized = Stored(_settled_size(library), {}, seconds), None
        if self.can_optimize:
            run = fragfs("optimize", library=library)
            optimized = Stored(_settled_size(library), {}, run.seconds)
        shutil.rmtree(library)
        return added, optimized

    def fragfs_growth(self, level: str, member: Member) -> int:
        """By how much adding a member makes a library grow that has all it is derived from."""
        base = self._library_of(level, [other.name for other in self.family.ancestors(member)])
        library = self._place / "member.fragfs"
        shutil.copytree(base, library)
        before = _settled_size(library)
        fragfs("add", self.family.path_of(member), library=library)
        grown = _settled_size(library) - before
        shutil.rmtree(library)
        return grown

    def _library_of(self, level: str, names: list[str]) -> Path:
        """A library with these members, made from one that has all but the last."""
        key = (level, *names)
        if key not in self._bases:
            path = self._place / f"base-{len(self._bases)}-{level}.fragfs"
            if names:
                before = self._library_of(level, names[:-1])
                path = self._place / f"base-{len(self._bases)}-{level}.fragfs"
                shutil.copytree(before, path)
                fragfs("add", self.family.place / names[-1], library=path)
            else:
                self._new_library(path, level)
            self._bases[key] = path
        return self._bases[key]

    def _new_library(self, path: Path, level: str) -> Path:
        return new_library(path, *(["--level", level] if level else []))

    # --- others

    def xor(self, members: Sequence[Member]) -> Stored:
        """The XOR baseline, the members in this order."""
        begun = time.monotonic()
        store = XorStore()
        grown = {m.name: store.add_directory(self.family.path_of(m)) for m in members}
        return Stored(sum(grown.values()), grown, time.monotonic() - begun)

    def xor_growth(self, member: Member) -> int:
        """The XOR baseline for a member beside what it is derived from."""
        store = XorStore()
        for other in self.family.ancestors(member):
            store.refer_to(self.family.path_of(other))
        return store.add_directory(self.family.path_of(member))

    def zstd(self) -> Stored | None:
        """Each file compressed on its own."""
        begun = time.monotonic()
        grown = {}
        for member in self.family.members:
            compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
            paths = _files_of(self.family.path_of(member))
            grown[member.name] = sum(len(compressor.compress(p.read_bytes())) for p in paths)
        return Stored(sum(grown.values()), grown, time.monotonic() - begun)

    def zipnn(self) -> Stored | None:
        """Each tensor that zipnn knows the dtype of by zipnn, all other bytes by zstd."""
        codecs = {dtype: open_zipnn(dtype) for dtype in DTYPES}
        if None in codecs.values():
            return None
        compress = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress
        begun = time.monotonic()
        grown = dict.fromkeys((member.name for member in self.family.members), 0)
        for member in self.family.members:
            for path in _files_of(self.family.path_of(member)):
                if path.suffix != ".safetensors":
                    grown[member.name] += len(compress(path.read_bytes()))
                    continue
                tensors = read_tensors(path)
                header_size = path.stat().st_size - sum(len(tensor.raw) for tensor in tensors)
                grown[member.name] += header_size
                for tensor in tensors:
                    codec = codecs.get(tensor.dtype)
                    encode: Callable[[bytes], bytes] = codec.encode if codec else compress
                    raw = bytes(tensor.raw)
                    grown[member.name] += min(len(raw), len(encode(raw)))
        return Stored(sum(grown.values()), grown, time.monotonic() - begun)

    def borg(self) -> Stored | None:
        """A repository without encryption, an archive for each member."""
        if shutil.which("borg") is None:
            return None
        repository = self._place / "borg"
        command = [
            "env",
            f"BORG_BASE_DIR={self._place / 'borg-home'}",
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes",
            "borg",
        ]
        run_timed(*command, "init", "--encryption", "none", repository)
        options = ["--compression", f"zstd,{_ZSTD_LEVEL}"]
        stored = self._grow(
            repository,
            lambda member: run_timed(
                *command,
                "create",
                *options,
                f"{repository}::{member.name}",
                self.family.path_of(member),
            ),
        )
        shutil.rmtree(repository)
        return stored

    def squashfs(self) -> Stored | None:
        """An image that each member is appended to."""
        if shutil.which("mksquashfs") is None:
            return None
        image = self._place / "image" / "family.squashfs"
        image.parent.mkdir()
        options = ["-comp", "zstd", "-b", "1M", "-keep-as-directory", "-no-progress", "-quiet"]
        options += ["-no-recovery"]
        stored = self._grow(
            image.parent,
            lambda member: run_timed("mksquashfs", self.family.path_of(member), image, *options),
        )
        shutil.rmtree(image.parent)
        return stored

    def _grow(self, place: Path, add: Callable[[Member], object]) -> Stored:
        """Add the members one by one, looking at the bytes below `place`."""
        begun = time.monotonic()
        sizes = [tree_size(place)]
        grown = {}
        for member in self.family.members:
            add(member)
            sizes.append(tree_size(place))
            grown[member.name] = sizes[-1] - sizes[-2]
        return Stored(sizes[-1], grown, time.monotonic() - begun)


def _files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _settled_size(library: Path) -> int:
    """Bytes of a library's directory; closing the last connection folds the write-ahead log."""
    with FragmentLibrary.open(library):
        pass
    return tree_size(library)


# --- the table


def _tell(text: str, stored: Stored | None = None) -> None:
    taken = f": {stored.seconds:.0f} s" if stored else ""
    print(f"[family, {text}{taken}]", file=sys.stderr, flush=True)


def _tabulate(measured: _Measurements) -> Table:
    family = measured.family
    peers: dict[str, tuple[str, Stored | None]] = {
        "zstd": (f"zstd -{_ZSTD_LEVEL}", measured.zstd()),
        "squashfs": ("squashfs", measured.squashfs()),
        "zipnn": ("zipnn", measured.zipnn()),
        "borg": ("borg", measured.borg()),
    }
    xor = measured.xor(family.members)
    for tool, stored in (*((tool, stored) for tool, (_, stored) in peers.items()), ("xor", xor)):
        _tell(tool, stored)
    levels = {level: f"fragfs {level}".strip() for level in measured.levels}
    table = Table(
        f"Family: stored / raw of {len(family.members)} models, {family.size / 1e9:.2f} GB",
        ["", *(head for head, _ in peers.values()), "XOR delta", *levels.values()],
        notes=[
            "All files count, those beside the weights too. XOR delta is the published method:"
            " equal tensors once, each other one XORed with the closest tensor of its shape and"
            " dtype, byte planes, zstd -1 (names and framing not counted). fragfs is the whole"
            " directory of the library.",
            "Rows of single kinds, XOR delta and fragfs: by how much a member makes a store grow"
            " that has what it is derived from and nothing else. Other tools: by how much it made"
            " them grow after all members before it.",
        ],
    )

    def put(text: str, key: str, shares: dict[str, float | None]) -> None:
        cells = []
        for tool in (*peers, "xor", *levels):
            share = shares.get(tool)
            if share is not None:
                table.figures[f"family.{key}.{tool or 'fragfs'}"] = share
            empty = NOT_INSTALLED if tool in shares else ""
            cells.append(empty if share is None else f"{share:.4f}")
        table.add(text, *cells)

    whole: dict[str, float | None] = {
        tool: None if stored is None else stored.size / family.size
        for tool, (_, stored) in peers.items()
    }
    seconds = {tool: stored.seconds for tool, (_, stored) in peers.items() if stored}
    whole["xor"], seconds["xor"] = xor.size / family.size, xor.seconds
    optimized: dict[str, float | None] = {}
    for level, head in levels.items():
        added, after = measured.fragfs(level, family.members)
        _tell(head, added)
        whole[level], seconds[level] = added.size / family.size, added.seconds
        if after is not None:
            _tell(f"{head}, optimize", after)
            optimized[level] = after.size / family.size
            seconds[f"optimize {level}"] = after.seconds
    put("**whole family**", "whole", whole)
    if optimized:
        put("whole family, after `fragfs optimize`", "optimized", optimized)
    _put_orders(measured, list(levels), put)
    for row in ROWS:
        members = [member for member in family.members if row.has(member) and member.parents]
        size = sum(map(family.size_of, members))
        if not size:
            continue
        _tell(row.text)
        sizes = {
            tool: sum(stored.grown[member.name] for member in members)
            for tool, (_, stored) in peers.items()
            if stored
        }
        sizes["xor"] = sum(map(measured.xor_growth, members))
        for level in levels:
            sizes[level] = sum(measured.fragfs_growth(level, member) for member in members)
        put(row.text, row.key, {tool: sizes[tool] / size for tool in sizes})
    _add_conclusions(table, levels, whole, seconds)
    return table


def _put_orders(
    measured: _Measurements,
    levels: list[str],
    put: Callable[[str, str, dict[str, float | None]], None],
) -> None:
    """The rows of the order that is worst for a tool, each tool's own."""
    family, count = measured.family, measured.options.order_count
    worst: dict[str, float | None] = {}
    optimized: dict[str, float | None] = {}
    for number, order in enumerate(list_orders(family.members, count), 1):
        worst["xor"] = max(worst.get("xor") or 0, measured.xor(order).size / family.size)
        for level in levels:
            added, after = measured.fragfs(level, order)
            _tell(f"order {number} of {count}, {level or 'fragfs'}", added)
            worst[level] = max(worst.get(level) or 0, added.size / family.size)
            if after is not None:
                optimized[level] = max(optimized.get(level) or 0, after.size / family.size)
    text = f"whole family, worst of {count} other orders"
    if worst:
        put(text, "worst_order", worst)
    if optimized:
        put(f"{text}, optimized", "worst_order_optimized", optimized)


def _add_conclusions(
    table: Table,
    levels: dict[str, str],
    whole: dict[str, float | None],
    seconds: dict[str, float],
) -> None:
    """How fragfs compares with XOR, how long all took, and whether the family is a fair one."""
    xor = whole["xor"] or 1.0
    ratios = []
    for level, head in levels.items():
        ratio = table.figures[f"family.ratio_to_xor.{level or 'fragfs'}"] = (
            whole[level] or 0
        ) / xor
        ratios.append(f"{head} {ratio:.3f}")
    table.notes.append(f"Whole family, fragfs / XOR delta: {', '.join(ratios)}.")
    taken = (f"{tool or 'fragfs'} {value:.0f} s" for tool, value in seconds.items())
    table.notes.append(f"Time to store the whole family: {', '.join(taken)}.")
    for tool, value in seconds.items():
        table.figures[f"family.seconds.{(tool or 'fragfs').replace(' ', '_')}"] = value
    if abs(xor / XOR_EXPECTED - 1) > _XOR_TOLERANCE:
        table.notes.append(
            f"**Not a fair family**: XOR delta stores {xor:.3f} of it, and {XOR_EXPECTED} is usual;"
            " these figures say little about others."
        )
