"""What is where in stored files: tensors, the fragments that hold them, where bases are found."""

from __future__ import annotations

import io
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fragfs.formats.detect import parse_layout
from fragfs.formats.layout import TensorLabel
from fragfs.library.catalog import Catalog
from fragfs.library.extents import ExtentMap, OpenContent
from fragfs.library.names import join
from fragfs.library.stats import FragmentTable, Numbers, Owners
from fragfs.library.stream import ContentStream
from fragfs.types import FragmentId, Predictor, SpanKind

__all__ = ["BasePlace", "BasePlaces", "FragmentPlace", "LabelReader", "TensorPlace", "TensorPlaces"]


@dataclass(frozen=True, slots=True)
class BasePlace:
    """Where a base is found in a model's files.

    Attributes:
        id: The base.
        model: The oldest model that has it; None if none has it any more.
        file: The file; b"" if there is none.
        tensor: The tensor it holds a part of, or the first of a bundle; "" if the file names none.
        index: Its position among the fragments of the tensor.
    """

    id: FragmentId
    model: bytes | None
    file: bytes = b""
    tensor: str = ""
    index: int = 0


@dataclass(frozen=True, slots=True)
class FragmentPlace:
    """One piece of a tensor.

    Attributes:
        id: The fragment that holds it.
        index: Its position among the pieces of the tensor.
        size: Bytes of the piece.
        raw_size: Bytes of the fragment.
        stored_bytes: The fragment's record bytes.
        mechanism: What the fragment is predicted by: a predictor's name in lower case.
        pack: Number of the pack that holds it.
        offset: Where its record starts in the pack.
        closure_size: Fragments that reading it decodes.
        model_count: Models that have it in their files.
        bases: What it is predicted from, in the predictor's order.
    """

    id: FragmentId
    index: int
    size: int
    raw_size: int
    stored_bytes: int
    mechanism: str
    pack: int
    offset: int
    closure_size: int
    model_count: int
    bases: tuple[BasePlace, ...]


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """A tensor of a file, or a range of the file that is in none.

    Attributes:
        file: Path of the file in its model.
        name: The tensor's name; "" for a range that is in no tensor.
        kind: What the range is.
        dtype: As the file spells it; "" for a range that is in no tensor.
        shape: Elements per dimension.
        offset: Where it starts in the file.
        size: Its bytes in the file.
        stored_bytes: Record bytes; of a fragment that it shares with its neighbours, its part by
            size.
        fragments: The pieces that cover it.
    """

    file: bytes
    name: str
    kind: SpanKind
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int
    stored_bytes: int
    fragments: tuple[FragmentPlace, ...]


class LabelReader:
    """Reads which tensors a stored file names, from the file itself.

    Args:
        open_content: Opens a content by number.
        decode: Decodes a fragment by number; called for headers.
    """

    def __init__(
        self, open_content: Callable[[int], OpenContent], decode: Callable[[int], memoryview]
    ) -> None:
        self._open_content = open_content
        self._decode = decode

    def read(self, path: bytes, number: int) -> tuple[TensorLabel, ...]:
        """The tensors of a content, in the file's own order.

        Args:
            path: Where a file shows it: the name's ending tells formats apart.
            number: The content.
        """
        content = self._open_content(number)
        stream = io.BufferedReader(ContentStream(content, self._decode), 1 << 16)

        def read_at(offset: int, size: int) -> bytes:
            stream.seek(offset)
            return stream.read(size)

        return parse_layout(os.fsdecode(path.rpartition(b"/")[2]), content.size, read_at).tensors


class BasePlaces:
    """Finds bases in the files of the models that own them.

    Args:
        catalog: The library's catalog.
        owners: Whose each fragment is.
        labels: Reads the tensors of files.
    """

    def __init__(self, catalog: Catalog, owners: Owners, labels: LabelReader) -> None:
        self._catalog = catalog
        self._owners = owners
        self._labels = labels

    def find(self, numbers: Numbers) -> dict[int, BasePlace]:
        """Where each of some fragments is."""
        found: dict[int, BasePlace] = {}
        owner = self._owners.of[numbers]
        for index in np.unique(owner).tolist():
            model = self._owners.name(index)
            wanted = numbers[owner == index]
            if model is not None:
                found |= self._find_in(model, wanted)
        for number in numbers.tolist():
            if number not in found:
                found[number] = BasePlace(self._catalog.fragment(number).id, None)
        return found

    def _find_in(self, model: bytes, wanted: Numbers) -> dict[int, BasePlace]:
        found: dict[int, BasePlace] = {}
        rows = self._catalog.rows(
            "SELECT directory, files.name, content, extents FROM models"
            " JOIN files ON model = models.number JOIN contents ON contents.number = content"
            " WHERE models.name = ? ORDER BY directory, files.name",
            (model,),
        )
        for directory, leaf, content, blob in rows:
            extents = ExtentMap.parse(blob)
            here = np.flatnonzero(np.isin(np.frombuffer(extents.fragments, np.int64), wanted))
            new = [index for index in here.tolist() if extents.fragments[index] not in found]
            if not new:
                continue
            path = join(directory, leaf)
            labels = sorted(
                (label for label in self._labels.read(path, content) if label.size),
                key=lambda label: label.offset,
            )
            starts = [label.offset for label in labels]
            for index in new:
                extent = extents[index]
                number = extent.fragment
                place = bisect_right(starts, extent.offset) - 1
                name, first = "", index
                if place >= 0 and extent.offset < starts[place] + labels[place].size:
                    name, first = labels[place].name, extents.index_at(starts[place])
                identity = self._catalog.fragment(number).id
                found[number] = BasePlace(identity, model, path, name, index - first)
        return found


class TensorPlaces:
    """Lays the tensors of files over their fragments.

    Args:
        catalog: The library's catalog.
        table: All fragments.
        own: The fragments of the files that will be asked about.
        users: How many models have each fragment in their files, by number.
        bases: Where each base of `own` is, by number.
    """

    def __init__(
        self,
        catalog: Catalog,
        table: FragmentTable,
        own: Numbers,
        users: NDArray[np.int32],
        bases: dict[int, BasePlace],
    ) -> None:
        self._catalog = catalog
        self._table = table
        self._closure_sizes = dict(
            zip(own.tolist(), table.closure_sizes(own).tolist(), strict=True)
        )
        self._users = users
        self._bases = bases

    def of_file(
        self, path: bytes, extents: ExtentMap, labels: Sequence[TensorLabel]
    ) -> list[TensorPlace]:
        """Everything a file consists of: its tensors, and what lies between them, by offset."""
        covered = np.zeros(len(extents), np.bool_)
        found = []
        for label in labels:
            if label.size:
                first = extents.index_at(label.offset)
                last = extents.index_at(label.offset + label.size - 1)
                covered[first : last + 1] = True
                kind = extents[first].kind
            else:
                first, last, kind = 0, -1, SpanKind.TENSOR
            pieces = self._pieces(extents, first, last, label.offset, label.size)
            found.append(
                _place(path, label.name, kind, label.dtype, label.shape, label.offset, pieces)
            )
        for first, last in _runs(extents, covered):
            start, end = extents[first], extents[last]
            size = end.offset + end.size - start.offset
            pieces = self._pieces(extents, first, last, start.offset, size)
            found.append(_place(path, "", start.kind, "", (), start.offset, pieces))
        return sorted(found, key=lambda place: place.offset)

    def _pieces(
        self, extents: ExtentMap, first: int, last: int, offset: int, size: int
    ) -> tuple[FragmentPlace, ...]:
        """The fragments under `[offset, offset + size)`: those of the extents `first` to `last`."""
        found = []
        for index in range(first, last + 1):
            extent = extents[index]
            start = max(extent.offset, offset)
            end = min(extent.offset + extent.size, offset + size)
            number = extent.fragment
            metadata = self._catalog.fragment(number)
            known = number < self._table.size
            bases = self._table.bases[:, number].tolist() if known else []
            found.append(
                FragmentPlace(
                    id=metadata.id,
                    index=index - first,
                    size=end - start,
                    raw_size=metadata.raw_size,
                    stored_bytes=metadata.record_size,
                    mechanism=_mechanism(metadata.predictor),
                    pack=metadata.pack,
                    offset=metadata.offset,
                    closure_size=self._closure_sizes.get(number, 1),
                    model_count=int(self._users[number]) if known else 1,
                    bases=tuple(self._bases[base] for base in bases if base in self._bases),
                )
            )
        return tuple(found)


def _mechanism(predictor: int) -> str:
    """The name of a predictor; a newer fragfs may store others."""
    try:
        return Predictor(predictor).name.lower()
    except ValueError:
        return f"predictor {predictor}"


def _place(
    path: bytes,
    name: str,
    kind: SpanKind,
    dtype: str,
    shape: tuple[int, ...],
    offset: int,
    pieces: tuple[FragmentPlace, ...],
) -> TensorPlace:
    stored_bytes = sum(piece.stored_bytes * piece.size / max(piece.raw_size, 1) for piece in pieces)
    size = sum(piece.size for piece in pieces)
    return TensorPlace(path, name, kind, dtype, shape, offset, size, round(stored_bytes), pieces)


def _runs(extents: ExtentMap, covered: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """(first, last) of each range of extents that no tensor covers; spans are kept apart."""
    edges = [
        index
        for index in range(len(extents))
        if extents[index].first or covered[index] != (index > 0 and covered[index - 1])
    ]
    for start, end in pairwise([*edges, len(extents)]):
        if not covered[start]:
            yield start, end - 1
