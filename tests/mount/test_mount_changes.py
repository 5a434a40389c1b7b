"""Models that come, go and change while they are mounted."""

import mmap
import os

import pytest

from fragfs.library.add import AddOptions
from fragfs.library.library import FragmentLibrary
from tests.mount.support import Reader, wait_until

pytestmark = [pytest.mark.mount, pytest.mark.slow]

OLD, NEW = b"old " * 500_000, b"NEW!" * 500_000
SOON_S = 1.0


@pytest.fixture
def library(tmp_path):
    with FragmentLibrary.create(tmp_path / "lib") as made:
        yield made


def add(library, tmp_path, name, files):
    source = tmp_path / "sources" / name.decode().replace("/", "_")
    source.mkdir(parents=True, exist_ok=True)
    for file, data in files.items():
        (source / file).write_bytes(data)
    return library.add([source], AddOptions(name=name))


def test_added_models_appear_within_a_second(mounts, library, tmp_path):
    root = mounts(library.path).mountpoint
    assert os.listdir(root) == []
    assert not (root / "org" / "m").exists()
    add(library, tmp_path, b"org/m", {"f": OLD})
    assert wait_until((root / "org" / "m" / "f").exists) < SOON_S
    assert os.listdir(root) == ["org"]
    before = os.stat(root / "org").st_mtime_ns
    add(library, tmp_path, b"org/n", {"f": NEW})
    assert wait_until((root / "org" / "n").exists) < SOON_S
    # Directory times follow: that is what ComfyUI and A1111 look at.
    assert wait_until(lambda: os.stat(root / "org").st_mtime_ns != before) < SOON_S
    assert sorted(os.listdir(root / "org")) == ["m", "n"]


def test_removed_models_disappear_and_open_files_stay(mounts, library, tmp_path):
    add(library, tmp_path, b"org/m", {"f": OLD})
    add(library, tmp_path, b"stays", {"f": b"stays"})
    root = mounts(library.path).mountpoint
    path = root / "org" / "m" / "f"
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
        library.remove(b"org/m")
        assert wait_until(lambda: not path.exists()) < SOON_S
        assert os.listdir(root) == ["stays"]
        assert not (root / "org").exists()
        assert os.fstat(file.fileno()).st_size == len(OLD)
        assert file.read() == OLD
        assert mapped[:] == OLD
        mapped.close()
    with pytest.raises(FileNotFoundError):
        path.open("rb")


def test_a_replaced_file_and_its_old_reader_each_have_their_bytes(mounts, library, tmp_path):
    add(library, tmp_path, b"org/m", {"f": OLD, "same": b"same"})
    root = mounts(library.path).mountpoint
    path = root / "org" / "m" / "f"
    # Half of it read before, half after: pages of both times belong to the old bytes.
    with Reader(
        """
mapped = map_file(sys.argv[1])
first = mapped[:len(mapped) // 2]
pause()
whole = first + mapped[len(mapped) // 2:]
print(whole == b"old " * 500_000)
""",
        path,
    ) as reader:
        old_inode = path.stat().st_ino
        library.remove(b"org/m")
        add(library, tmp_path, b"org/m", {"f": NEW, "same": b"same"})
        wait_until(lambda: path.exists() and path.stat().st_ino != old_inode)
        assert path.read_bytes() == NEW
        status, output, _ = reader.proceed()
        assert (status, output) == (0, "True\n")
    assert path.read_bytes() == NEW


def test_replacing_in_place_within_the_second_never_mixes_bytes(mounts, library, tmp_path):
    """No waiting: whatever is opened right after a change is one version, whole."""
    root = mounts(library.path).mountpoint
    path = root / "m" / "f"
    for round_number in range(6):
        data = b"%d" % round_number * 1_500_000
        add(library, tmp_path, b"m", {"f": data})
        wait_until(path.exists)
        with path.open("rb") as file:
            found = file.read()
        assert set(found) == {found[0]}
        assert len(found) == 1_500_000
        library.remove(b"m")


def test_files_of_a_model_come_and_go(mounts, library, tmp_path):
    add(library, tmp_path, b"m", {"a": b"a", "b": b"b"})
    root = mounts(library.path).mountpoint / "m"
    assert sorted(os.listdir(root)) == ["a", "b"]
    library.remove(b"m", [b"a"])
    assert wait_until(lambda: not (root / "a").exists()) < SOON_S
    assert os.listdir(root) == ["b"]
    library.move(b"m", b"n")
    assert wait_until(lambda: not root.exists()) < SOON_S
    assert (root.parent / "n" / "b").read_bytes() == b"b"
