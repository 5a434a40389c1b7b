"""Optimizing a library while it is mounted."""

import contextlib
import os

import pytest

from fragfs.library.add import AddOptions
from fragfs.library.library import FragmentLibrary
from fragfs.mount.unmount import unmount
from fragfs.types import Level, LibraryConfig
from tests.models import digests
from tests.mount.soak_reading import helpers_of
from tests.mount.support import Reader, drop_pages, is_alive, wait_until, write_safetensors

pytestmark = [pytest.mark.mount, pytest.mark.slow]

READ = """
with open(sys.argv[1], "rb") as file:
    size = os.fstat(file.fileno()).st_size
    first = file.read(1000)
    pause()
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    print(hashlib.sha256(first + file.read()).hexdigest())
"""


@pytest.fixture
def sources(tmp_path):
    made = {}
    for seed, name in enumerate(("stays", "goes")):
        made[name] = tmp_path / "sources" / name
        made[name].mkdir(parents=True)
        write_safetensors(made[name] / "model.safetensors", seed=seed, tensor_count=3)
    return made


@pytest.fixture
def library(tmp_path, sources):
    config = LibraryConfig(fragment_elements=1 << 14, pack_bytes_max=1 << 20)
    with FragmentLibrary.create(tmp_path / "lib", config) as made:
        for path in sources.values():
            made.add([path], AddOptions())
        yield made


def pack_bytes(library):
    return sum(path.stat().st_size for path in (library.path / "packs").iterdir())


def end(report):
    unmount(report.mountpoint)
    wait_until(lambda: not is_alive(report.pid))


def test_an_open_file_outlives_its_model(mounts, library, sources):
    report = mounts(library.path)
    path = report.mountpoint / "goes" / "model.safetensors"
    before = pack_bytes(library)
    with Reader(READ, path) as reader:
        library.remove("goes")
        wait_until(lambda: not path.exists())
        found = library.optimize(workers=1)
        assert found.leased_bytes > 0.5 * (sources["goes"] / "model.safetensors").stat().st_size
        status, output, _ = reader.proceed()
    assert status == 0, output
    assert output.strip() == digests(sources["goes"])["model.safetensors"]
    end(report)
    found = library.optimize(workers=1)
    assert found.leased_bytes == 0
    assert found.freed_bytes > 0.4 * before
    assert not [item for item in library.verify() if item.error]


def test_open_files_are_read_on_while_everything_moves(mounts, library, sources):
    """Packs are retired and removed under a mount that has them open."""
    report = mounts(library.path)
    path = report.mountpoint / "stays" / "model.safetensors"
    with Reader(READ, path) as reader:
        library.optimize(Level.FAST, workers=1)
        library.remove("goes")
        library.optimize(Level.SMALL, workers=1)
        status, output, _ = reader.proceed()
    assert status == 0, output
    assert output.strip() == digests(sources["stays"])["model.safetensors"]
    drop_pages(report.mountpoint / "stays")
    assert digests(report.mountpoint / "stays") == digests(sources["stays"])
    assert "Error" not in mounts.read_log()


def test_a_mount_sees_what_was_optimized_before_it(mounts, library, sources):
    library.remove("goes")
    library.optimize(Level.FAST, workers=1)
    root = mounts(library.path).mountpoint
    assert os.listdir(root) == ["stays"]
    assert digests(root / "stays") == digests(sources["stays"])


def removed_packs(pid):
    """Packs that a process has open although they were removed."""
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(f"/proc/{pid}/fd/{name}")
            if target.endswith(".pack (deleted)"):
                found.add(target)
    return found


def test_a_mount_lets_go_of_removed_packs(mounts, library, sources):
    """The daemon and its decoders: what they keep open is not free on the disk."""
    report = mounts(library.path)
    for name in sources:
        assert digests(report.mountpoint / name) == digests(sources[name])
    decoders, _ = helpers_of(report.mountpoint)
    assert decoders
    packs = {path.name for path in (library.path / "packs").iterdir()}
    library.optimize(Level.FAST, workers=1)
    assert packs - {path.name for path in (library.path / "packs").iterdir()}
    for pid in (report.pid, *decoders):
        wait_until(lambda pid=pid: not removed_packs(pid), 30)
    assert digests(report.mountpoint / "stays") == digests(sources["stays"])
