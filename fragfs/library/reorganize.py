"""All of `fragfs optimize`: plan again, forget what nothing needs, give the space back."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace

from fragfs.library.catalog import Catalog
from fragfs.library.collect import Collector
from fragfs.library.decode import FragmentDecoder
from fragfs.library.hints import quantized_rows
from fragfs.library.optimize import Optimizer, OptimizeReport
from fragfs.library.progress import Progress
from fragfs.library.publish import refresh_stored_bytes
from fragfs.library.writer import LibraryWriter
from fragfs.types import LayerMapping, Level

log = logging.getLogger(__name__)

__all__ = ["Reorganizer"]


class Reorganizer:
    """Changes how a library stores what it holds, and nothing of what it holds.

    Args:
        catalog: Its catalog.
        decoder: Decodes its fragments.
        writer: Begins batches.
        collector: Forgets what nothing needs and gives the space back.
    """

    def __init__(
        self,
        catalog: Catalog,
        decoder: FragmentDecoder,
        writer: LibraryWriter,
        collector: Collector,
    ) -> None:
        self._catalog = catalog
        self._decoder = decoder
        self._writer = writer
        self._collector = collector

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
            progress: Told about bytes of fragments planned, then of those copied.
        """
        before = self._collector.pack_bytes()
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
            # Who reads the copy sees a change, and says what it needs, once the copy has it.
            self._writer.renew_snapshot()
        collected = self._collector.run(progress)
        row = self._catalog.row("SELECT coalesce(sum(record_size), 0) FROM fragments")
        return replace(
            report,
            after_bytes=int(row[0]) if row else 0,
            freed_bytes=before - self._collector.pack_bytes(),
            kept=collected.kept_packs,
            leased_bytes=collected.leased_bytes,
        )
