"""A library whose fragments are predicted from each other, for decoders and fetchers."""

import shutil

import pytest

from fragfs.library.decode import NO_SOURCE
from fragfs.library.library import FragmentLibrary
from tests.library.families import make_library


class Family:
    """A library, and what is in it."""

    def __init__(self, path):
        self.path = path
        with FragmentLibrary.open(path) as library:
            self.numbers = []
            for model in library.models():
                for entry in library.files(model.name):
                    node = library.lookup(model.name + b"/" + entry.path)
                    for extent in library.open_content(node.content).extents:
                        if extent.fragment not in self.numbers:
                            self.numbers.append(extent.fragment)
            self.raws = {n: bytes(library.decode_fragment(n, NO_SOURCE)) for n in self.numbers}
            self.bases = {n: library.bases(n) for n in self.numbers}
            self.ids = {n: library.fragment(n).id for n in self.numbers}
            self.records = {n: library.fragment(n) for n in self.numbers}
        self.plain = [n for n in self.numbers if not self.bases[n]]
        self.predicted = [n for n in self.numbers if self.bases[n]]

    def dependents(self, number):
        return [n for n in self.numbers if number in self.bases[n]]

    def damage(self, number):
        """Flip a byte of a fragment's record."""
        record = self.records[number]
        (pack,) = [p for p in (self.path / "packs").iterdir() if int(p.stem) == record.pack]
        with pack.open("r+b") as file:
            file.seek(record.offset + record.record_size // 2)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 0x10]))


@pytest.fixture(scope="session")
def _family(tmp_path_factory):
    return make_library(tmp_path_factory.mktemp("family"), 1 << 14)[1]


@pytest.fixture(scope="session")
def shared_family(_family):
    """The family; tests must not change it."""
    return Family(_family)


@pytest.fixture
def own_family(_family, tmp_path):
    """A family of one's own."""
    shutil.copytree(_family, tmp_path / "library")
    return Family(tmp_path / "library")
