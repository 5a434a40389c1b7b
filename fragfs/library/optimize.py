"""`fragfs optimize`: plan bases again, for all fragments that resemble each other together.

Adding plans a fragment with what was there before it: a base that came last was predicted from its
fine-tunes. Here each group of similar fragments is planned as a whole (`similarity.plan`), encoded,
proven, and written only if all of it takes less than before. A group is changed in one commit:
readers see the old records or the new ones, and a crash leaves either. What is not worth changing
stays, so an interrupted run loses nothing and the next one finds the rest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field

from fragfs.codec.choose import (
    encode_from,
    estimate_blends,
    estimate_single,
    estimate_solo,
)
from fragfs.codec.solo import Encoding, encode_solo
from fragfs.codec.trials import NO_ROWS, Candidate, Rows
from fragfs.errors import FragmentError, LimitError, StorageError
from fragfs.library.batch import Batch, Replacement
from fragfs.library.catalog import Catalog
from fragfs.library.closure import closure_of
from fragfs.library.decode import FragmentDecoder
from fragfs.library.planning import CatalogSignatureRows, prove
from fragfs.library.progress import Progress
from fragfs.library.recent import RecentFragments
from fragfs.library.records import fragment_header_size
from fragfs.library.stats import FragmentTable, named_fragments
from fragfs.similarity.index import SimilarityIndex
from fragfs.similarity.plan import Group, plan_group
from fragfs.similarity.signature import FragmentSignature
from fragfs.similarity.sketch import sketch_distances
from fragfs.types import Dtype, FragmentId, FragmentMetadata, Level, LibraryConfig

__all__ = ["OptimizeReport", "Optimizer"]

_MEMBERS_MAX = 40
_MEMBERS_BYTES_MAX = 96 << 20
"""A group is held in memory, decoded; another one is gathered meanwhile."""

_NEIGHBOURS_MAX = 6
"""Members that each member is tried against, besides the likely hubs."""
_HUBS_MAX = 3

_BLENDED_MAX = 4
"""Cheapest bases that blends are made of."""
_BLEND_GAIN = 0.8
"""What a blend must save against one base: it doubles what a read decodes."""

_GAIN_MIN = 0.005
"""A group is rewritten if that saves this share of it."""

_COMMIT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class OptimizeReport:
    """What an optimization did.

    Attributes:
        examined_count: Fragments that were planned again.
        changed_count: Fragments that got another record.
        before_bytes: Record bytes of all fragments before.
        after_bytes: And after.
        freed_bytes: By how much the packs shrank.
        leased_bytes: Record bytes that no model needs and that stay for a mount or an add.
        kept: Packs that were left as they are because a record in them is damaged, and why.
    """

    examined_count: int
    changed_count: int
    before_bytes: int
    after_bytes: int
    freed_bytes: int = 0
    leased_bytes: int = 0
    kept: tuple[tuple[int, str], ...] = ()


@dataclass(slots=True)
class _Member:
    """A fragment of a group, decoded.

    Attributes:
        metadata: Where it is stored.
        candidate: Its bytes and how they read.
        signature: What others find it by.
        bases: Its bases now.
        fixed: It was planned in an earlier group, and stays as it is.
        rows: How its words lie in the rows of its tensor.
    """

    metadata: FragmentMetadata
    candidate: Candidate
    signature: FragmentSignature
    bases: tuple[int, ...]
    fixed: bool
    rows: Rows


@dataclass(frozen=True, slots=True)
class _Result:
    """What became of a group.

    Attributes:
        examined: Fragments that were planned.
        raw_bytes: Their bytes.
        changes: What shall change; those in one list together or not at all.
    """

    examined: int
    raw_bytes: int
    changes: list[list[Replacement]] = field(default_factory=list)


class Optimizer:
    """Plans and runs one optimization.

    Args:
        catalog: The library's catalog.
        decoder: Decodes its fragments.
        config: Its settings.
        level: What encodings to prefer.
        start_batch: Takes the writer lock and begins a batch.
        rows: Rows of quantized tensors, by fragment id.
        workers: Threads that plan.
        progress: Told about bytes of fragments planned.
    """

    def __init__(
        self,
        catalog: Catalog,
        decoder: FragmentDecoder,
        config: LibraryConfig,
        level: Level,
        start_batch: Callable[[], AbstractContextManager[Batch]],
        rows: Mapping[FragmentId, Rows],
        workers: int,
        progress: Progress,
    ) -> None:
        self._catalog = catalog
        self._decoder = decoder
        self._config = config
        self._level = level
        self._all_anew = level is not config.level
        self._start_batch = start_batch
        self._rows = rows
        self._workers = workers
        self._progress = progress
        self._index = SimilarityIndex(CatalogSignatureRows(catalog))
        self._recent = RecentFragments(_MEMBERS_BYTES_MAX)
        self._done: set[int] = set()
        # What is left of removed models only predicts others: planning without it frees it.
        table = FragmentTable(catalog)
        named = named_fragments(catalog, table.size)
        self._named = set(named.tolist())
        self._needed = set(table.closure(named).tolist())

    def run(self) -> OptimizeReport:
        """Plan every group of similar fragments again, and write what got smaller."""
        before = self._record_bytes()
        total = self._catalog.row("SELECT coalesce(sum(raw_size), 0) FROM fragments")
        self._progress.start("optimizing", int(total[0]) if total else 0)
        self._sign_unsigned()
        examined = changed = 0
        waiting: list[list[Replacement]] = []
        waiting_bytes = 0
        for result in self._plan_groups():
            examined += result.examined
            self._progress.advance(result.raw_bytes)
            waiting += result.changes
            waiting_bytes += sum(len(c.fragment.payload) for one in result.changes for c in one)
            if waiting_bytes >= _COMMIT_BYTES:
                changed += self._commit(waiting)
                waiting, waiting_bytes = [], 0
        changed += self._commit(waiting)
        return OptimizeReport(examined, changed, before, self._record_bytes())

    def _record_bytes(self) -> int:
        row = self._catalog.row("SELECT coalesce(sum(record_size), 0) FROM fragments")
        return int(row[0]) if row else 0

    def _numbers(self) -> Iterator[int]:
        """All fragments, oldest first; found a few at a time, for none are held."""
        last = 0
        while rows := self._catalog.rows(
            "SELECT number FROM fragments WHERE number > ? ORDER BY number LIMIT 10000", (last,)
        ):
            for (number,) in rows:
                yield number
            last = rows[-1][0]

    def _sign_unsigned(self) -> None:
        """Sign what an older fragfs has stored without a signature and nothing is predicted for."""
        if self._config.closure_max < 2:
            return  # nothing can serve as a base
        found: dict[int, FragmentSignature] = {}
        for (number,) in self._catalog.rows(
            "SELECT number FROM fragments WHERE number NOT IN (SELECT fragment FROM signatures)"
            " AND number NOT IN (SELECT fragment FROM bases) AND raw_size >= 512"
        ):
            try:
                raw, dtype = self._decode(number)
            except FragmentError:
                continue  # damaged: `verify` tells, and nothing new shall rest on it
            signature = self._index.sign(raw, dtype)
            if signature is not None:
                found[number] = signature
        if found:
            with self._start_batch() as batch:
                for number, signature in found.items():
                    batch.index_fragment(number, signature)
                batch.commit()

    def _decode(self, number: int) -> tuple[memoryview, Dtype]:
        raw = self._decoder.decode(number, self._recent)
        return raw, self._decoder.read_header(self._catalog.fragment(number)).dtype

    # --- groups

    def _plan_groups(self) -> Iterator[_Result]:
        waiting: deque[Future[_Result]] = deque()
        with ThreadPoolExecutor(self._workers, "fragfs-optimize") as pool:
            try:
                for number in self._numbers():
                    if number in self._done or number not in self._named:
                        continue
                    members = self._gather(number)
                    self._done.update(member.metadata.number for member in members)
                    self._done.add(number)
                    if len(members) > 1 or (members and self._is_worth_planning(members[0])):
                        waiting.append(pool.submit(self._plan, members))
                    while len(waiting) > self._workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _is_worth_planning(self, alone: _Member) -> bool:
        """Whether a fragment that resembles no other may be stored in fewer bytes."""
        return self._all_anew or not self._named.issuperset(alone.bases)

    def _gather(self, number: int) -> list[_Member]:
        """A fragment and those that resemble it, also the ones too deep to be found as bases."""
        seed = self._member(number)
        if seed is None:
            return []
        found = {number: seed}
        waiting = deque([seed])
        held = seed.metadata.raw_size
        # What resembles each of them as well: a key gives no more than its oldest and newest rows.
        while waiting and len(found) < _MEMBERS_MAX and held < _MEMBERS_BYTES_MAX:
            for other in self._related(waiting.popleft()):
                if len(found) >= _MEMBERS_MAX or held >= _MEMBERS_BYTES_MAX:
                    break
                if other in found or other not in self._named:
                    continue
                member = self._member(other)
                if member is None:
                    continue
                found[other] = member
                held += member.metadata.raw_size
                if not member.fixed:
                    waiting.append(member)
        return list(found.values())

    def _related(self, member: _Member) -> Iterator[int]:
        """Numbers of fragments that resemble one, or that predict it or are predicted from it."""
        number = member.metadata.number
        yield from self._with_left_over(member.bases)
        for match in self._index.query(member.signature, count=_MEMBERS_MAX, exclude=(number,)):
            yield match.fragment
        yield from self._with_left_over(self._catalog.dependents(number))

    def _with_left_over(self, numbers: Sequence[int]) -> Iterator[int]:
        """Fragments; for those that only removed models had, whatever hangs together by them."""
        seen = set(numbers)
        waiting = deque(numbers)
        while waiting:
            number = waiting.popleft()
            yield number
            if number in self._named or number not in self._needed:
                continue
            fresh = {*self._catalog.bases(number), *self._catalog.dependents(number)} - seen
            # What was planned before would fill the group and could not change any more.
            fresh -= self._done
            seen |= fresh
            waiting += sorted(fresh)

    def _member(self, number: int) -> _Member | None:
        """A fragment, decoded; None if it is damaged, or has no numbers to compare."""
        if self._catalog.row("SELECT 1 FROM quarantine WHERE fragment = ?", (number,)):
            return None
        try:
            metadata = self._catalog.fragment(number)
            raw, dtype = self._decode(number)
        except StorageError as error:
            if error.retryable:
                raise
            return None
        except FragmentError:
            return None
        signature = self._index.sign(raw, dtype)
        if signature is None:
            return None
        return _Member(
            metadata,
            Candidate(raw, dtype),
            signature,
            self._catalog.bases(number),
            number in self._done,
            self._rows.get(metadata.id, NO_ROWS),
        )

    # --- one group, in a worker

    def _plan(self, members: list[_Member]) -> _Result:
        free = [index for index, member in enumerate(members) if not member.fixed]
        raw_bytes = sum(members[index].metadata.raw_size for index in free)
        if not free:
            return _Result(0, raw_bytes)
        group = self._estimate(members)

        def find_blends(index: int, singles: Sequence[int]) -> dict[tuple[int, ...], float]:
            return self._estimate_blends(members, group, index, singles[:_BLENDED_MAX])

        plan = plan_group(group, self._config.closure_max, find_blends)
        numbers = {member.metadata.number: index for index, member in enumerate(members)}
        changes: list[Replacement] = []
        gain = old_bytes = 0
        for index in free:
            member = members[index]
            old_bytes += member.metadata.record_size
            now = tuple(numbers.get(base, -1) for base in member.bases)
            if plan[index] == now and not self._all_anew:
                continue
            change = self._encode(members, index, plan[index])
            if change is not None:
                changes.append(change)
                gain += member.metadata.record_size - _record_size(change)
        gain += self._left_over(members, changes)
        if gain < _GAIN_MIN * old_bytes and not (self._all_anew and self._level is Level.FAST):
            # Not worth it as a whole, but what pays by itself need not wait for the rest.
            return _Result(len(free), raw_bytes, [[one] for one in changes if self._pays(one)])
        return _Result(len(free), raw_bytes, [changes] if changes else [])

    def _pays(self, change: Replacement) -> bool:
        old = self._catalog.find_fragment(change.fragment.id)
        return old is not None and _record_size(change) < old.record_size * (1 - _GAIN_MIN)

    def _left_over(self, members: list[_Member], changes: Sequence[Replacement]) -> int:
        """Record bytes that are in no file any more, and that nothing needs after this."""
        gone = {change.number for change in changes}
        sizes: dict[int, int] = {}
        waiting = [base for member in members for base in member.bases]
        while waiting:
            base = waiting.pop()
            if base in self._named or base in sizes:
                continue
            # Others of removed models may hang on it as well: what nothing needs counts for nobody.
            if not gone.issuperset(self._needed.intersection(self._catalog.dependents(base))):
                continue
            gone.add(base)
            for (size,) in self._catalog.rows(
                "SELECT record_size FROM fragments WHERE number = ?", (base,)
            ):
                sizes[base] = size
            waiting += self._catalog.bases(base)
        return sum(sizes.values())

    def _estimate(self, members: list[_Member]) -> Group:
        """What each member costs from nothing, and from those it is most likely predicted from."""
        sketches = [member.signature.sketch for member in members]
        distances = [sketch_distances(sketch, sketches) for sketch in sketches]
        sums = [sum(float(row[index]) for row in distances) for index in range(len(members))]
        hubs = sorted(range(len(members)), key=lambda index: (sums[index], index))[:_HUBS_MAX]
        # A float of more bits predicts those of fewer exactly: the widest member is a likely hub.
        hubs.append(max(range(len(members)), key=lambda i: members[i].candidate.dtype.bits))
        fixed = {
            index: len(closure_of([member.metadata.number], self._catalog.bases)) - 1
            for index, member in enumerate(members)
            if member.fixed
        }
        numbers = {member.metadata.number: index for index, member in enumerate(members)}
        solo: list[float] = []
        against: dict[tuple[int, tuple[int, ...]], float] = {}
        for index, member in enumerate(members):
            raw, dtype = member.candidate.raw, member.candidate.dtype
            header = fragment_header_size(0)
            if member.fixed:
                solo.append(0.0)
                continue
            solo.append(estimate_solo(raw, dtype, self._config.zstd_level) * len(raw) + header)
            near = sorted(range(len(members)), key=lambda other: float(distances[index][other]))
            current = [numbers[base] for base in member.bases if base in numbers]
            for other in dict.fromkeys((*hubs, *near[: _NEIGHBOURS_MAX + 1], *current, *fixed)):
                if other == index:
                    continue
                share = estimate_single(
                    raw, dtype, members[other].candidate, level=self._level, rows=member.rows
                )
                if share is not None:
                    against[index, (other,)] = share * len(raw) + fragment_header_size(1)
        return Group(solo, against, fixed)

    def _estimate_blends(
        self, members: list[_Member], group: Group, index: int, singles: Sequence[int]
    ) -> dict[tuple[int, ...], float]:
        member = members[index]
        raw = member.candidate.raw
        limit = group.against[index, (singles[0],)] * _BLEND_GAIN
        if limit < 0.02 * len(raw):
            return {}
        found = estimate_blends(
            raw,
            member.candidate.dtype,
            [members[other].candidate for other in singles],
            level=self._level,
        )
        costs = {
            tuple(singles[place] for place in places): share * len(raw)
            + fragment_header_size(len(places))
            for places, share in found.items()
        }
        return {bases: cost for bases, cost in costs.items() if cost < limit}

    def _encode(
        self, members: list[_Member], index: int, bases: tuple[int, ...]
    ) -> Replacement | None:
        """A member encoded as planned, and proven; None if it cannot be."""
        member = members[index]
        raw, dtype = member.candidate.raw, member.candidate.dtype
        encoding: Encoding | None
        if bases:
            encoding = encode_from(
                raw,
                dtype,
                [members[base].candidate for base in bases],
                level=self._level,
                zstd_level=self._config.zstd_level,
                rows=member.rows,
            )
        else:
            encoding = encode_solo(raw, dtype, zstd_level=self._config.zstd_level)
        if encoding is None:
            return None
        fragment = prove(
            raw,
            dtype,
            member.metadata.id,
            encoding,
            [(members[base].metadata.id, members[base].candidate.raw) for base in bases],
        )
        return Replacement(member.metadata.number, fragment, member.signature)

    # --- writing

    def _commit(self, groups: list[list[Replacement]]) -> int:
        """Write changes that belong together; gives how many fragments changed."""
        if not groups:
            return 0
        count = 0
        with self._start_batch() as batch:
            for changes in groups:
                try:
                    count += len(batch.replace_fragments(changes))
                    continue
                except LimitError:
                    # Fragments outside the group depend on it, or another command was quicker.
                    alone = [one for one in changes if len(changes) > 1 and self._pays(one)]
                for one in alone:
                    with suppress(LimitError):
                        count += len(batch.replace_fragments([one]))
            if count:
                batch.commit()
        return count


def _record_size(change: Replacement) -> int:
    fragment = change.fragment
    return fragment_header_size(len(fragment.bases)) + len(fragment.params) + len(fragment.payload)
