"""What a file's own labels say about its cuts: tensor, position in it, rows. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from fragfs.codec.trials import Rows
from fragfs.formats.layout import Cut, Layout, TensorLabel
from fragfs.library.planning import Hints
from fragfs.types import FragmentId, LayerMapping, SpanKind

__all__ = ["TensorHints", "quantized_rows"]


class TensorHints:
    """Gives hints for the cuts of one file, asked in file order.

    Args:
        layout: The file's spans and tensors.
    """

    def __init__(self, layout: Layout) -> None:
        self._labels = {label.offset: label for label in layout.tensors if label.size}
        self._label: TensorLabel | None = None
        self._index = 0

    def of_cut(self, cut: Cut) -> Hints:
        """What is known about the next cut; hints for tensors and bundles of them only."""
        if cut.first:
            named = cut.kind in (SpanKind.TENSOR, SpanKind.BUNDLE)
            self._label = self._labels.get(cut.offset) if named else None
            self._index = 0
        else:
            self._index += 1
        label = self._label
        if label is None:
            return Hints()
        if cut.kind is not SpanKind.TENSOR or len(label.shape) < 2 or cut.dtype.bits % 8:
            return Hints(label.name, self._index)
        start = (cut.offset - label.offset) * 8 // cut.dtype.bits
        words = label.shape[-1]
        return Hints(label.name, self._index, Rows(words, words - start % words))


def quantized_rows(layers: Iterable[LayerMapping]) -> dict[FragmentId, Rows]:
    """Rows of the fragments of tensors that may be quantized copies of others.

    Only of matrices of signed bytes: rows matter to nothing else.
    """
    found: dict[FragmentId, Rows] = {}
    for layer in layers:
        if layer.dtype.upper() != "I8" or len(layer.shape) < 2 or not layer.shape[-1]:
            continue
        words = layer.shape[-1]
        start = 0
        for ref in layer.refs:
            if ref.offset == 0:
                found[ref.fragment] = Rows(words, words - start % words)
            start += ref.size
    return found
