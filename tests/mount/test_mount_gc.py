"""Collecting garbage while the library is mounted."""

import hashlib
import os

import numpy as np
import pytest

from fragfs.library.add import AddOptions
from fragfs.library.lease import live_leases
from fragfs.library.library import FragmentLibrary
from fragfs.mount.unmount import unmount
from fragfs.types import LibraryConfig
from tests.library.test_bases import base_weights, quantized, tuned, write_model
from tests.models import digests
from tests.mount.support import Reader, drop_pages, is_alive, wait_until, write_safetensors

pytestmark = [pytest.mark.mount, pytest.mark.slow]

CONFIG = LibraryConfig(fragment_elements=1 << 14, pack_bytes_max=1 << 20)

READ = """
with open(sys.argv[1], "rb") as file:
    size = os.fstat(file.fileno()).st_size
    first = file.read(1000)
    pause()
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    print(hashlib.sha256(first + file.read()).hexdigest())
"""

MAPPED = """
import mmap
with open(sys.argv[1], "rb") as file:
    data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    assert len(data[:100]) == 100
pause()
print(hashlib.sha256(data).hexdigest())
"""


@pytest.fixture
def sources(tmp_path):
    made = {}
    for seed, name in enumerate(("stays", "goes", "gone")):
        made[name] = tmp_path / "sources" / name
        made[name].mkdir(parents=True)
        write_safetensors(made[name] / "model.safetensors", seed=seed, tensor_count=3)
    return made


@pytest.fixture
def library(tmp_path, sources):
    with FragmentLibrary.create(tmp_path / "lib", CONFIG) as made:
        for path in sources.values():
            made.add([path], AddOptions())
        yield made


def stored_bytes(library, name):
    return library.stats(name).exclusive_bytes


@pytest.mark.parametrize("program", [READ, MAPPED], ids=["read", "mapped"])
def test_an_open_file_keeps_itself_and_nothing_else(mounts, library, sources, program):
    report = mounts(library.path)
    path = report.mountpoint / "goes" / "model.safetensors"
    sizes = {name: stored_bytes(library, name) for name in sources}
    with Reader(program, path) as reader:
        library.remove("goes")
        library.remove("gone")
        found = library.collect(wait_s=30)
        [kept] = found.leases
        assert kept.process == report.pid
        assert kept.what == f"mount on {report.mountpoint}"
        assert not kept.everything
        assert kept.kept_bytes <= sizes["goes"]
        assert found.dropped_bytes >= sizes["gone"]
        assert found.freed_bytes > 0.5 * sizes["gone"]
        status, output, _ = reader.proceed()
    assert status == 0, output
    assert output.strip() == digests(sources["goes"])["model.safetensors"]
    # Closed: the mount says so by itself, and the next run frees it without an unmount.
    wait_until(lambda: not any(lease.pins for lease in live_leases(library.path)))
    found = library.collect(wait_s=30)
    assert found.leases == ()
    assert found.dropped_bytes >= kept.kept_bytes
    drop_pages(report.mountpoint / "stays")
    assert digests(report.mountpoint / "stays") == digests(sources["stays"])
    assert "Error" not in mounts.read_log()


def test_two_mounts_each_keep_what_they_have_open(mounts, library, sources):
    first, second = mounts(library.path), mounts(library.path)
    with (
        Reader(READ, first.mountpoint / "goes" / "model.safetensors") as one,
        Reader(READ, second.mountpoint / "gone" / "model.safetensors") as other,
    ):
        library.remove("goes")
        library.remove("gone")
        found = library.collect(wait_s=30)
        assert {kept.process for kept in found.leases} == {first.pid, second.pid}
        assert not any(kept.everything for kept in found.leases)
        for reader, name in ((one, "goes"), (other, "gone")):
            status, output, _ = reader.proceed()
            assert status == 0, output
            assert output.strip() == digests(sources[name])["model.safetensors"]


def test_a_mount_that_died_keeps_nothing(mounts, library):
    report = mounts(library.path)
    assert len(live_leases(library.path)) == 1
    os.kill(report.pid, 9)
    wait_until(lambda: not is_alive(report.pid))
    wait_until(lambda: not live_leases(library.path))
    library.remove("goes")
    found = library.collect(wait_s=0)
    assert found.leases == ()
    assert found.dropped_count


def test_a_mount_without_open_files_is_in_nobodys_way(mounts, library):
    report = mounts(library.path)
    library.remove("goes")
    found = library.collect(wait_s=30)
    assert found.leases == ()
    assert found.dropped_count
    assert library.stats().unreferenced_bytes == 0
    unmount(report.mountpoint)
    wait_until(lambda: not live_leases(library.path))


# --- half of a family


def make_family(directory):
    """A base and nineteen models that are made from it."""
    base = base_weights()
    rng = np.random.default_rng(3)
    made = {"model00": write_model(directory / "model00", base)}
    for number in range(1, 20):
        values = tuned(base, number, strength=(3e-5, 2e-4, 1e-3)[number % 3])
        kind = ("F32", "BF16", "F16", "F32", "BF16")[number % 5]
        if number == 7:
            values, kind = quantized(base), "I8"
        if number % 6 == 5:
            rows = rng.integers(0, 300, 20)
            values = {name: value.copy() for name, value in base.items()}
            values["embed.weight"][rows] *= np.float32(1.5)
        made[f"model{number:02}"] = write_model(directory / f"model{number:02}", values, kind)
    return made


def library_bytes(path):
    """Packs and catalog; not the snapshot, a second catalog, nor SQLite's log of recent changes."""
    packs = sum(file.stat().st_size for file in (path / "packs").iterdir())
    return packs + (path / "catalog.sqlite").stat().st_size


@pytest.mark.parametrize("removed", ["even", "odd"])
def test_half_of_a_family_leaves_what_the_other_half_takes(mounts, tmp_path, removed):
    """The base is among the even ones."""
    family = make_family(tmp_path / "sources")
    gone = [name for name in family if int(name[-2:]) % 2 == ("even", "odd").index(removed)]
    left = [name for name in family if name not in gone]
    fresh, path = tmp_path / "fresh", tmp_path / "lib"
    with FragmentLibrary.create(fresh, CONFIG) as library:
        for name in left:
            library.add([family[name]], AddOptions())
        library.optimize(workers=2)
    with FragmentLibrary.create(path, CONFIG) as library:
        for source in family.values():
            library.add([source], AddOptions())
        whole = library_bytes(path)
        root = mounts(path).mountpoint
        shown = root / left[0] / "model.safetensors"
        expected = {name: digests(family[name])["model.safetensors"] for name in family}
        with (
            Reader(READ, shown) as reader,
            library.open_file(left[1], "model.safetensors") as stream,
            open(root / gone[0] / "model.safetensors", "rb") as opened,
        ):
            for name in gone:
                library.remove(name)
            if removed == "even":
                found = library.collect(wait_s=30)
                assert found.base_bytes > 0
                assert {name.decode() for name, _ in found.base_users} <= set(left)
            assert [item.error for item in library.verify()] == [None] * len(left)
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert hashlib.sha256(opened.read()).hexdigest() == expected[gone[0]]
            opened.close()
            wait_until(
                lambda: not any(lease.pins for lease in live_leases(path) if "mount" in lease.what)
            )
            library.collect(wait_s=30)
            library.optimize(workers=2)
            library.collect(wait_s=30)
            status, output, _ = reader.proceed()
            assert status == 0, output
            assert output.strip() == expected[left[0]]
            assert hashlib.sha256(stream.read()).hexdigest() == expected[left[1]]
        assert [item.error for item in library.verify()] == [None] * len(left)
        drop_pages(root / left[-1])
        assert digests(root / left[-1]) == digests(family[left[-1]])
    assert library_bytes(path) < 0.8 * whole
    assert library_bytes(path) <= 1.03 * library_bytes(fresh)
