"""Where a model's bytes live: how they are stored, what they are predicted from, who shares them.

Read from the catalog, like `stats`. The names of tensors come from the headers of files, which are
decoded for it: those of the files that are explained, and of those that hold their bases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fragfs.errors import NotFoundError
from fragfs.library.catalog import Catalog
from fragfs.library.extents import ExtentMap, OpenContent
from fragfs.library.names import printable
from fragfs.library.places import BasePlaces, LabelReader, TensorPlace, TensorPlaces
from fragfs.library.stats import (
    FragmentTable,
    Numbers,
    Owners,
    models_by_age,
    predicted_by_owner,
)
from fragfs.types import FileEntry, Predictor

__all__ = ["Explainer", "Explanation", "Mechanism", "ModelShare", "PackShare"]


@dataclass(frozen=True, slots=True)
class Mechanism:
    """How much is stored one way.

    Attributes:
        name: A predictor's name in lower case, or "exact": pieces that occur more than once.
        fragment_count: Distinct fragments; for "exact" the repetitions.
        raw_bytes: Their bytes in the files.
        stored_bytes: Their record bytes.
    """

    name: str
    fragment_count: int
    raw_bytes: int
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class PackShare:
    """What is in one pack.

    Attributes:
        number: The pack.
        fragment_count: Fragments in it.
        stored_bytes: Their record bytes.
    """

    number: int
    fragment_count: int
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class ModelShare:
    """What connects the model explained with another.

    Attributes:
        model: The other model; None for fragments that are in no model's files any more.
        fragment_count: Fragments concerned.
        raw_bytes: Their raw bytes.
        stored_bytes: Their record bytes.
    """

    model: bytes | None
    fragment_count: int
    raw_bytes: int
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class Explanation:
    """Where the bytes of a model, or of files of it, live.

    Attributes:
        model: The model.
        path: The file or directory of it that is explained; b"" for the whole model.
        file_count: Files.
        logical_bytes: Sum of their sizes.
        unique_bytes: Raw bytes of the distinct fragments in them.
        stored_bytes: Record bytes of those fragments.
        exclusive_bytes: Record bytes, of bases too, that no other model needs.
        shared_bytes: Record bytes of fragments in the files that other models need as well.
        base_bytes: Record bytes of fragments that are not in the files, and that decoding them
            takes.
        mechanisms: How they are stored; what covers most bytes first.
        packs: Where their records are; the fullest first.
        bases: The models whose fragments they are predicted from, by the raw bytes predicted.
        sharers: The models that have some of the fragments in their files, by record bytes.
        dependents: The models with fragments predicted from these, and not in these files, by the
            raw bytes predicted.
        closure_sizes: How many fragments a read decodes, and raw bytes of the fragments for which
            it is that many.
        tensors: What the files consist of, in file order; empty unless asked for.
    """

    model: bytes
    path: bytes
    file_count: int
    logical_bytes: int
    unique_bytes: int
    stored_bytes: int
    exclusive_bytes: int
    shared_bytes: int
    base_bytes: int
    mechanisms: tuple[Mechanism, ...]
    packs: tuple[PackShare, ...]
    bases: tuple[ModelShare, ...]
    sharers: tuple[ModelShare, ...]
    dependents: tuple[ModelShare, ...]
    closure_sizes: dict[int, int]
    tensors: tuple[TensorPlace, ...] = ()


class Explainer:
    """Explains one model, or some files of it.

    Args:
        catalog: The library's catalog.
        open_content: Opens a content by number.
        decode: Decodes a fragment by number; called for headers.
    """

    def __init__(
        self,
        catalog: Catalog,
        open_content: Callable[[int], OpenContent],
        decode: Callable[[int], memoryview],
    ) -> None:
        self._catalog = catalog
        self._open_content = open_content
        self._labels = LabelReader(open_content, decode)
        self._table = FragmentTable(catalog)
        self._owners = Owners(self._table.size)

    def explain(
        self, model: bytes, path: bytes, files: Sequence[FileEntry], *, tensors: bool
    ) -> Explanation:
        """Explain a model, or a file or directory of it.

        Args:
            model: The model's name.
            path: What of it; b"" for all.
            files: All files of the model.
            tensors: Whether to list tensors and their fragments.

        Raises:
            NotFoundError: The model has no such file.
        """
        files = [file for file in files if _is_below(file.path, path)]
        if path and not files:
            raise NotFoundError(
                f"{printable(model)} has no file {printable(path)}",
                remedy=f"see its files with: fragfs ls {printable(model)}",
            )
        table = self._table
        contents = {file.content: self._open_content(file.content).extents for file in files}
        occurrences = [
            np.frombuffer(contents[file.content].fragments, np.int64) for file in files if file.size
        ]
        every = np.concatenate(occurrences) if occurrences else np.zeros(0, np.int64)
        every = every[every < table.size]
        own = np.unique(every)
        closure = table.closure(own)
        others = np.zeros(table.size, np.bool_)
        users = np.zeros(table.size, np.int32)
        sharers, dependents = [], []
        for other in models_by_age(self._catalog, table.size):
            self._owners.add(other)
            users[other.own] += 1
            if other.name == model:
                continue
            others[table.closure(other.own)] = True
            sharers.append(self._share(other.name, np.intersect1d(own, other.own, True)))
            predicted = self._predicted_from(np.setdiff1d(other.own, own, True), own)
            dependents.append(self._share(other.name, predicted))
        logical_bytes = sum(file.size for file in files)
        unique_bytes = int(table.raw[own].sum())
        repeated = Mechanism("exact", every.size - own.size, logical_bytes - unique_bytes, 0)
        return Explanation(
            model=model,
            path=path,
            file_count=len(files),
            logical_bytes=logical_bytes,
            unique_bytes=unique_bytes,
            stored_bytes=table.stored(own),
            exclusive_bytes=table.stored(closure[~others[closure]]),
            shared_bytes=table.stored(own[others[own]]),
            base_bytes=table.stored(np.setdiff1d(closure, own, True)),
            mechanisms=self._mechanisms(own, repeated),
            packs=self._packs(own),
            bases=tuple(
                self._share(name, numbers)
                for name, numbers in predicted_by_owner(table, own, self._owners)
            ),
            sharers=_ranked(sharers, lambda share: share.stored_bytes),
            dependents=_ranked(dependents, lambda share: share.raw_bytes),
            closure_sizes=self._closure_sizes(own),
            tensors=self._tensors(files, contents, own, users) if tensors else (),
        )

    def _share(self, model: bytes | None, numbers: Numbers) -> ModelShare:
        raw_bytes = int(self._table.raw[numbers].sum())
        return ModelShare(model, numbers.size, raw_bytes, self._table.stored(numbers))

    def _predicted_from(self, numbers: Numbers, bases: Numbers) -> Numbers:
        """Those of `numbers` that read one of `bases`."""
        is_base = np.zeros(self._table.size, np.bool_)
        is_base[bases] = True
        return numbers[is_base[self._table.bases[:, numbers]].any(axis=0)]

    def _mechanisms(self, own: Numbers, repeated: Mechanism) -> tuple[Mechanism, ...]:
        table = self._table
        found = [repeated] if repeated.fragment_count else []
        for predictor in Predictor:
            numbers = own[table.predictor[own] == predictor]
            if numbers.size:
                raw_bytes = int(table.raw[numbers].sum())
                name = predictor.name.lower()
                found.append(Mechanism(name, numbers.size, raw_bytes, table.stored(numbers)))
        return tuple(sorted(found, key=lambda mechanism: -mechanism.raw_bytes))

    def _packs(self, own: Numbers) -> tuple[PackShare, ...]:
        table = self._table
        found = []
        for pack in np.unique(table.pack[own]).tolist():
            numbers = own[table.pack[own] == pack]
            found.append(PackShare(pack, numbers.size, table.stored(numbers)))
        return tuple(sorted(found, key=lambda share: -share.stored_bytes))

    def _closure_sizes(self, own: Numbers) -> dict[int, int]:
        sizes = self._table.closure_sizes(own)
        raw = self._table.raw[own]
        return {size: int(raw[sizes == size].sum()) for size in np.unique(sizes).tolist()}

    def _tensors(
        self,
        files: Sequence[FileEntry],
        contents: dict[int, ExtentMap],
        own: Numbers,
        users: NDArray[np.int32],
    ) -> tuple[TensorPlace, ...]:
        bases = BasePlaces(self._catalog, self._owners, self._labels)
        places = TensorPlaces(
            self._catalog, self._table, own, users, bases.find(self._table.bases_of(own))
        )
        return tuple(
            tensor
            for file in files
            for tensor in places.of_file(
                file.path, contents[file.content], self._labels.read(file.path, file.content)
            )
        )


def _is_below(path: bytes, directory: bytes) -> bool:
    return not directory or path == directory or path.startswith(directory + b"/")


def _ranked(
    shares: Sequence[ModelShare], size: Callable[[ModelShare], int]
) -> tuple[ModelShare, ...]:
    kept = [share for share in shares if share.fragment_count]
    return tuple(sorted(kept, key=lambda share: -size(share)))
