"""All of `fragfs optimize`: plan again, forget what nothing needs, give the space back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from fragfs.library.catalog import Catalog
from fragfs.library.compact import Compactor
from fragfs.library.decode import FragmentDecoder
from fragfs.library.files import Files
from fragfs.library.hints import quantized_rows
from fragfs.library.lease import no_leases
from fragfs.library.optimize import Optimizer, OptimizeReport
from fragfs.library.packs import PackReader
from fragfs.library.progress import Progress
from fragfs.library.publish import refresh_stored_bytes
from fragfs.library.stats import unneeded_fragments, unreferenced_bytes
from fragfs.library.writer import LibraryWriter
from fragfs.types import LayerMapping, Level

__all__ = ["Reorganizer"]


class Reorganizer:
    """Changes how a library stores what it holds, and nothing of what it holds.

    Args:
        files: How to read and unlink.
        directory: The library's directory.
        catalog: Its catalog.
        packs: Reads its packs.
        decoder: Decodes its fragments.
        writer: Begins batches, and brings the copy for readers without write access up to date.
    """

    def __init__(
        self,
        files: Files,
        directory: Path,
        catalog: Catalog,
        packs: PackReader,
        decoder: FragmentDecoder,
        writer: LibraryWriter,
    ) -> None:
        self._directory = directory
        self._catalog = catalog
        self._decoder = decoder
        self._writer = writer
        self._compactor = Compactor(
            files, directory, catalog, packs, writer.batch, writer.publish_snapshot
        )

    def optimize(
        self,
        level: Level | None,
        layers: Iterable[LayerMapping],
        workers: int,
        progress: Progress,
    ) -> OptimizeReport:
        """Plan bases again and give back the space of what no longer counts.

        Args:
            level: What encodings to prefer; None for the library's own level.
            layers: The named tensors of all models: the rows of quantized ones are needed.
            workers: Threads that plan.
            progress: Told about bytes of fragments planned.
        """
        before = self._compactor.pack_bytes()
        config = self._writer.config
        report = Optimizer(
            self._catalog,
            self._decoder,
            config,
            config.level if level is None else level,
            self._writer.batch,
            quantized_rows(layers),
            workers,
            progress,
        ).run()
        if report.changed_count:
            with self._writer.batch() as batch:
                refresh_stored_bytes(batch, self._catalog)
        leased_bytes = self._drop_unneeded()
        kept = self._compactor.run()
        freed_bytes = before - self._compactor.pack_bytes()
        row = self._catalog.row("SELECT coalesce(sum(record_size), 0) FROM fragments")
        return replace(
            report,
            after_bytes=int(row[0]) if row else 0,
            freed_bytes=freed_bytes,
            kept=kept,
            leased_bytes=leased_bytes,
        )

    def _drop_unneeded(self) -> int:
        """Drop what no model needs; gives the record bytes that must stay for now instead."""
        with no_leases(self._directory) as alone:
            if not alone:
                return unreferenced_bytes(self._catalog)
            with self._writer.batch() as batch:
                unneeded = unneeded_fragments(self._catalog).tolist()
                if unneeded:
                    batch.drop_fragments(unneeded)
                    batch.commit()
        return 0
