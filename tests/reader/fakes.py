"""A library in memory with the methods that the reader and the mount use."""

import threading
import time
from array import array
from contextlib import nullcontext
from itertools import count
from pathlib import Path

from fragfs.cache.layered import LayeredFragmentCache
from fragfs.cache.memory import MemoryFragmentCache
from fragfs.errors import NotFoundError
from fragfs.library.extents import ExtentMap, ExtentMapBuilder, OpenContent
from fragfs.library.lease import Lease
from fragfs.library.tree import Directory, File
from fragfs.types import ModelInfo, SpanKind

MTIME_NS = 1_700_000_000_123_456_789


def extents_of(sizes, fragments=None, offsets=None):
    """An extent map with the given sizes; fragments 1, 2, ... from their start by default."""
    builder = ExtentMapBuilder()
    for index, size in enumerate(sizes):
        builder.append(
            size,
            fragments[index] if fragments else index + 1,
            offsets[index] if offsets else 0,
            SpanKind.OPAQUE,
            first=index == 0,
        )
    return builder.build()


def _nobody(number):
    raise NotFoundError(f"fragment {number} is only known by number")


def memory_cache(bytes_max=1 << 20):
    """A cache of one process, without a shared one behind it."""
    return LayeredFragmentCache(_nobody, MemoryFragmentCache(bytes_max), None)


def content_of(extents, number=1024):
    return OpenContent(number, extents.size, MTIME_NS, bytes(32), extents.size // 2, extents)


class FakeLibrary:
    """Models in memory. `decodes` records every decode; `failing` maps fragments to errors."""

    def __init__(self, path="/nowhere"):
        self.path = Path(path)
        self.uuid = bytes(16)
        self.nodes = {b"": Directory(MTIME_NS, None)}
        self.contents = {}
        self.fragments = {}
        self.decodes = []
        self.failing = {}
        self.decode_s = 0.0
        self._numbers = count(1024)
        self._fragment_numbers = count(1)
        self._version = 1
        self._lock = threading.Lock()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def hold_lease(self, what):
        return nullcontext(Lease(None, what))

    def generation(self):
        return self._version

    def has_content(self, number):
        return number in self.contents

    def close_removed_packs(self):
        pass

    def close(self):
        pass

    # --- building

    def add(self, model, name, data, fragment_bytes=1000):
        """Add a file; returns its content number."""
        extents = ExtentMapBuilder()
        for start in range(0, len(data), fragment_bytes):
            number = next(self._fragment_numbers)
            self.fragments[number] = bytes(data[start : start + fragment_bytes])
            size = len(self.fragments[number])
            extents.append(size, number, 0, SpanKind.OPAQUE, first=start == 0)
        return self._publish(model, name, extents.build())

    def add_repeated(self, model, name, size, fragment):
        """Add a file of any size that repeats one fragment."""
        number = next(self._fragment_numbers)
        self.fragments[number] = fragment
        whole, rest = divmod(size, len(fragment))
        sizes = array("I", [len(fragment)] * whole + ([rest] if rest else []))
        extents = ExtentMap(
            sizes,
            array("q", [number]) * len(sizes),
            array("I", [0]) * len(sizes),
            bytes(len(sizes)),
        )
        return self._publish(model, name, extents)

    def remove(self, path):
        self.nodes = {
            p: node for p, node in self.nodes.items() if p != path and not p.startswith(path + b"/")
        }
        self._version += 1

    def _publish(self, model, name, extents):
        number = next(self._numbers)
        self.contents[number] = content_of(extents, number)
        path = model + b"/" + name
        parts = path.split(b"/")
        for depth in range(1, len(parts)):
            parent = b"/".join(parts[:depth])
            inside = parent == model or parent.startswith(model + b"/")
            self.nodes[parent] = Directory(MTIME_NS + number, model if inside else None)
        self.nodes[path] = File(number, extents.size, MTIME_NS, model)
        self._version += 1
        return number

    # --- the library's interface

    def lookup(self, path):
        return self.nodes.get(path)

    def list_directory(self, path):
        if not isinstance(self.nodes.get(path), Directory):
            return None
        prefix = path + b"/" if path else b""
        return sorted(
            (p[len(prefix) :], node)
            for p, node in self.nodes.items()
            if p and p.startswith(prefix) and b"/" not in p[len(prefix) :]
        )

    def data_version(self):
        return self._version

    def models(self):
        names = sorted({node.model for node in self.nodes.values() if node.model is not None})
        return [ModelInfo(i, name, 0, 0, 1, 0, 0) for i, name in enumerate(names)]

    def model(self, name):
        for model in self.models():
            if model.name == name:
                return model
        raise NotFoundError(f"no model {name!r}")

    def open_content(self, number):
        if number not in self.contents:
            raise NotFoundError(f"content {number} is gone")
        return self.contents[number]

    def models_of_content(self, number):
        return sorted(
            {n.model for n in self.nodes.values() if isinstance(n, File) and n.content == number}
        )

    def identities(self, numbers):
        raise NotFoundError(f"fragments {numbers} are only known by number")

    def decode_fragment(self, number, source):
        with self._lock:
            self.decodes.append(number)
        if self.decode_s:
            time.sleep(self.decode_s)
        if number in self.failing:
            raise self.failing[number]
        raw = memoryview(self.fragments[number])
        source.put(number, raw)
        return raw
