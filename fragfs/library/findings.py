"""What a check finds: gathered while it looks, then told in terms of models and files."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from fragfs.errors import FragmentError
from fragfs.library.catalog import Catalog
from fragfs.library.extents import ExtentMap
from fragfs.library.names import join

__all__ = ["CheckReport", "Damage", "Findings", "Problem", "ProblemKind", "all_dependents"]

ADD_AGAIN = (
    "restore the pack from a backup, or add a model that holds these bytes again, which heals it"
)


class ProblemKind(enum.StrEnum):
    """What can be done about a problem."""

    LOST = "lost"
    """Bytes are gone: only a backup, or adding them again, brings them back."""
    REPAIRABLE = "repairable"
    """`fragfs check --repair` mends it."""
    CATALOG = "catalog"
    """The catalog cannot be trusted: `fragfs check --rebuild` makes a new one from the packs."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it must be.

    Attributes:
        kind: What can be done.
        what: What is wrong and where, in a sentence without a full stop.
        remedy: What to do, as an imperative without a full stop.
        files: (model, path) of every file that cannot be read because of it.
        fragments: Full hex ids of the fragments concerned; those of a lost pack may be many.
        path: The file on disk; "" if it is the catalog as a whole.
        offset: Where in it, if that is known.
    """

    kind: ProblemKind
    what: str
    remedy: str
    files: tuple[tuple[bytes, bytes], ...] = ()
    fragments: tuple[str, ...] = ()
    path: str = ""
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a check found, and what was mended.

    Attributes:
        problems: What is wrong; empty if the library is sound.
        notes: What is remarkable and harms nothing.
        repaired: What `--repair` has done.
        pack_count: Packs read.
        pack_bytes: Their bytes.
        fragment_count: Fragments in the catalog.
        decoded_count: Fragments that were decoded; None if that was not asked for.
        file_count: Files of all models.
    """

    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    repaired: tuple[str, ...]
    pack_count: int
    pack_bytes: int
    fragment_count: int
    decoded_count: int | None
    file_count: int


@dataclass(frozen=True, slots=True)
class Damage:
    """Stored bytes that are not what was written.

    Attributes:
        what: What is wrong and where.
        fragments: Numbers of the fragments whose records are concerned.
        remedy: What to do.
        path: The pack.
        offset: Where in it; None for all of it.
        kind: Whether a repair makes them readable again.
    """

    what: str
    fragments: tuple[int, ...]
    remedy: str = ADD_AGAIN
    path: str = ""
    offset: int | None = None
    kind: ProblemKind = ProblemKind.LOST


@dataclass(slots=True)
class Findings:
    """Everything a check has found so far.

    Attributes:
        damages: Records that cannot be used.
        quarantined: Why, by number of the fragments in quarantine.
        sound_again: Fragments in quarantine that decode.
        contents: What is wrong with a whole content, by its number.
        problems: Problems that concern no fragment.
        notes: See `CheckReport`.
        bases: The bases of fragments as their records have them, where the catalog differs.
        stale_signatures: Fragments that are signed and must not be, or are none.
        wrong_stored_bytes: Contents whose `stored_bytes` is no sum of their fragments.
        headless_packs: Packs whose header is damaged and can be written again.
        unindexed_packs: Sealed packs that could have an index and have none.
        retired_files: Packs that are retired and still there.
        stale_staging: Names in `staging/` that unfinished work left.
        leavings: Packs with an end that no commit vouches for.
        untold_models: Names of models that packs tell otherwise than the catalog.
        stale_snapshot: Why the snapshot is of no use; "" if it is.
        pack_count: Packs read.
        pack_bytes: Their bytes.
        decoded_count: Fragments decoded; None if nothing was.
    """

    damages: list[Damage] = field(default_factory=list)
    quarantined: dict[int, str] = field(default_factory=dict)
    sound_again: set[int] = field(default_factory=set)
    contents: dict[int, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bases: dict[int, tuple[int, ...]] = field(default_factory=dict)
    stale_signatures: set[int] = field(default_factory=set)
    wrong_stored_bytes: set[int] = field(default_factory=set)
    headless_packs: list[int] = field(default_factory=list)
    unindexed_packs: list[int] = field(default_factory=list)
    retired_files: list[int] = field(default_factory=list)
    stale_staging: list[str] = field(default_factory=list)
    leavings: list[int] = field(default_factory=list)
    untold_models: set[bytes] = field(default_factory=set)
    stale_snapshot: str = ""
    pack_count: int = 0
    pack_bytes: int = 0
    decoded_count: int | None = None

    def damaged(self) -> dict[int, str]:
        """Why each fragment that is lost is, by number; the first reason found."""
        found: dict[int, str] = {}
        for damage in self.damages:
            if damage.kind is not ProblemKind.LOST:
                continue
            for number in damage.fragments:
                found.setdefault(number, damage.what)
        return found

    def mend(self, what: str) -> None:
        """Add a problem that `--repair` takes care of."""
        self.problems.append(Problem(ProblemKind.REPAIRABLE, what, MEND))

    def distrust(self, what: str) -> None:
        """Add a problem that makes the catalog as a whole unfit."""
        self.problems.append(Problem(ProblemKind.CATALOG, what, REBUILD))

    def report(self, catalog: Catalog, repaired: Iterable[str] = ()) -> CheckReport:
        """Say what was found, naming the models and files that each problem touches."""
        damages = [*self.damages]
        known = self.damaged()
        by_reason: dict[str, list[int]] = {}
        for number, reason in self.quarantined.items():
            if number in self.sound_again:
                continue
            if number not in known:
                by_reason.setdefault(reason, []).append(number)
        damages += [
            Damage(f"in quarantine: {reason}", tuple(numbers))
            for reason, numbers in by_reason.items()
        ]
        files = TouchedFiles(catalog)
        problems = [*self.problems]
        notes = [*self.notes]
        quarantined = self.quarantined.keys()
        for damage in damages:
            touched = files.of_fragments(damage.fragments) if damage.fragments else ()
            if not touched:
                notes.append(f"{damage.what}: no file needs it")
                continue
            text = damage.what
            if damage.kind is not ProblemKind.LOST:
                remedy = MEND
            elif all(number in quarantined for number in damage.fragments):
                remedy = damage.remedy
            else:
                remedy = f"{damage.remedy}; `fragfs check --repair` keeps new models off it"
            problems.append(
                Problem(
                    damage.kind,
                    text,
                    remedy,
                    touched,
                    tuple(catalog.fragment(number).id.hex() for number in damage.fragments),
                    damage.path,
                    damage.offset,
                )
            )
        problems += [
            Problem(
                ProblemKind.LOST,
                what,
                "restore the library from a backup, or add the file again",
                files.of_contents([number]),
            )
            for number, what in self.contents.items()
        ]
        if self.sound_again:
            problems.append(
                Problem(
                    ProblemKind.REPAIRABLE,
                    f"{len(self.sound_again)} fragments in quarantine are good again",
                    MEND,
                )
            )
        counted = catalog.row("SELECT count(*) FROM fragments")
        named = catalog.row("SELECT count(content) FROM files")
        return CheckReport(
            tuple(problems),
            tuple(notes),
            tuple(repaired),
            self.pack_count,
            self.pack_bytes,
            int(counted[0]) if counted else 0,
            self.decoded_count,
            int(named[0]) if named else 0,
        )


MEND = "run: fragfs check --repair"
REBUILD = (
    "restore the whole library from one backup, or make a new catalog from the packs with:"
    " fragfs check --rebuild"
)


class TouchedFiles:
    """Which files need which fragments. Extents are read once, when they are first asked for."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._fragments: dict[int, np.ndarray] | None = None

    def of_fragments(self, numbers: Iterable[int]) -> tuple[tuple[bytes, bytes], ...]:
        """(model, path) of the files that cannot be read without some fragments, sorted."""
        if self._fragments is None:
            self._fragments = {}
            for content, blob in self._catalog.rows("SELECT number, extents FROM contents"):
                try:
                    fragments = ExtentMap.parse(blob).fragments
                except FragmentError:
                    continue
                self._fragments[content] = np.unique(np.frombuffer(fragments, np.int64))
        below = np.array(sorted(all_dependents(self._catalog, numbers)), np.int64)
        return self.of_contents(
            [
                content
                for content, fragments in self._fragments.items()
                if np.isin(below, fragments, assume_unique=True).any()
            ]
        )

    def of_contents(self, contents: Iterable[int]) -> tuple[tuple[bytes, bytes], ...]:
        """(model, path) of the files that show some contents, sorted."""
        found: set[tuple[bytes, bytes]] = set()
        for content in contents:
            found.update(
                (model, join(directory, name))
                for model, directory, name in self._catalog.rows(
                    "SELECT models.name, directory, files.name FROM files"
                    " JOIN models ON models.number = model WHERE content = ?",
                    (content,),
                )
            )
        return tuple(sorted(found))


def all_dependents(catalog: Catalog, numbers: Iterable[int]) -> set[int]:
    """Some fragments, and every fragment that cannot be decoded without one of them."""
    found = set(numbers)
    waiting = list(found)
    while waiting:
        for number in catalog.dependents(waiting.pop()):
            if number not in found:
                found.add(number)
                waiting.append(number)
    return found
