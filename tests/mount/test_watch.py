import ast
import errno
import threading
from pathlib import Path

import pytest

import fragfs.mount.watch
from fragfs.errors import StorageError
from fragfs.library.tree import Directory
from fragfs.mount.inodes import ROOT_INODE, InodeTable
from fragfs.mount.watch import CatalogWatcher, StaleName, Staleness, plan_invalidation
from tests.reader.fakes import FakeLibrary


class RecordingKernel:
    def __init__(self, error=None):
        self.forgotten = []
        self.error = error

    def forget_name(self, parent, name):
        self.forgotten.append((parent, name))
        if self.error:
            raise OSError(self.error, "refused")

    def forget_attributes(self, number):
        self.forgotten.append(number)
        if self.error:
            raise OSError(self.error, "refused")


class RecordingLease:
    def __init__(self):
        self.said = []

    def move(self):
        self.said.append("move")

    def let_go(self):
        self.said.append("let_go")


class Mounted:
    """A library, and a table in which everything has been looked up once."""

    def __init__(self):
        self.library = FakeLibrary()
        self.library.add(b"org/m", b"a", b"aaaa")
        self.library.add(b"org/m", b"b", b"bbbb")
        self.table = InodeTable(self.library.lookup(b""))
        self.kernel = RecordingKernel()
        self.lease = RecordingLease()
        self.numbers = {}
        self.look_up(self.table.get(ROOT_INODE))

    def look_up(self, directory):
        for name, node in self.library.list_directory(directory.path):
            inode = self.table.remember(directory, name, node)
            self.numbers[inode.path] = inode.number
            if isinstance(node, Directory):
                self.look_up(inode)

    def watcher(self):
        def drop(names):
            for name in names:
                self.table.drop_name(name.parent, name.name, name.number)

        return CatalogWatcher(
            self.library,
            self.library.data_version,
            self.table.known_directories,
            drop,
            self.kernel,
            self.lease,
            interval_s=0.001,
        )

    def plan(self):
        return plan_invalidation(self.table.known_directories(), self.library)


def test_nothing_is_stale_when_nothing_changed():
    assert Mounted().plan() == Staleness((), ())


def test_a_new_file_changes_only_the_time_of_its_directory():
    mounted = Mounted()
    mounted.library.add(b"org/m", b"c", b"cc")
    stale = mounted.plan()
    assert stale.names == ()
    assert mounted.numbers[b"org/m"] in stale.directories


def test_a_replaced_file_is_stale_and_its_neighbour_is_not():
    mounted = Mounted()
    number = mounted.numbers[b"org/m/a"]
    mounted.library.add(b"org/m", b"a", b"other bytes")
    assert mounted.plan().names == (StaleName(mounted.numbers[b"org/m"], b"a", number),)


def test_a_removed_model_is_stale_with_all_its_names():
    mounted = Mounted()
    mounted.library.remove(b"org/m")
    assert {name.name for name in mounted.plan().names} == {b"m", b"a", b"b"}


def test_a_file_that_became_a_directory_is_stale_and_the_reverse():
    mounted = Mounted()
    mounted.library.remove(b"org/m/a")
    mounted.library.add(b"org/m/a", b"inside", b"x")
    mounted.library.add(b"org", b"m", b"a file now")
    assert {name.name for name in mounted.plan().names} == {b"m", b"a", b"b"}


def test_a_look_without_commits_asks_for_nothing():
    mounted = Mounted()
    watcher = mounted.watcher()
    assert watcher.look() == Staleness((), ())
    assert watcher.look() is None
    mounted.library.remove(b"org/m/b")
    assert [name.name for name in watcher.look().names] == [b"b"]
    assert watcher.look() is None


def test_the_lease_is_moved_whatever_becomes_of_the_rest():
    mounted = Mounted()
    watcher = mounted.watcher()
    watcher.look()
    watcher.look()
    assert mounted.lease.said == ["move", "let_go"]

    def failing(path):
        raise StorageError("the catalog cannot be read")

    mounted.library.remove(b"org/m/b")
    mounted.library.lookup = failing
    with pytest.raises(StorageError):
        watcher.look()
    assert mounted.lease.said == ["move", "let_go", "move"]


def test_stale_names_are_dropped_before_the_kernel_is_told():
    mounted = Mounted()
    watcher = mounted.watcher()
    parent = mounted.numbers[b"org/m"]
    seen = []
    mounted.kernel.forget_name = lambda *_: seen.append(
        {known.number: known.names for known in mounted.table.known_directories()}[parent]
    )
    mounted.library.remove(b"org/m/b")
    watcher.look()
    assert [sorted(names) for names in seen] == [[b"a"]]


def test_a_kernel_that_forgot_by_itself_is_no_error(caplog):
    mounted = Mounted()
    mounted.kernel.error = errno.ENOENT
    mounted.library.remove(b"org/m")
    mounted.watcher().look()
    assert len(mounted.kernel.forgotten) >= 3
    assert caplog.records == []


def test_another_refusal_of_the_kernel_is_logged_and_survived(caplog):
    mounted = Mounted()
    mounted.kernel.error = errno.EPERM
    mounted.library.remove(b"org/m/a")
    watcher = mounted.watcher()
    watcher.look()
    assert "did not take an invalidation" in caplog.text
    assert watcher.look() is None


def test_a_catalog_that_fails_for_a_while_is_logged_once_and_caught_up_with(caplog):
    mounted = Mounted()
    watcher = mounted.watcher()
    stop = threading.Event()
    real, calls = mounted.library.lookup, []

    def failing(path):
        calls.append(path)
        if len(calls) <= 3:
            raise StorageError("the catalog cannot be read")
        return real(path)

    mounted.library.lookup = failing
    mounted.library.remove(b"org/m/a")
    thread = threading.Thread(target=watcher.run, args=(stop,))
    thread.start()
    deadline = threading.Event()
    for _ in range(2000):
        if mounted.kernel.forgotten:
            break
        deadline.wait(0.005)
    stop.set()
    thread.join(5)
    assert not thread.is_alive()
    assert (mounted.numbers[b"org/m"], b"a") in mounted.kernel.forgotten
    assert caplog.text.count("stay unseen") == 1


def test_h26_only_the_watching_thread_invalidates():
    """The two calls that may wait for requests are named once, outside every handler."""
    package = Path(fragfs.mount.watch.__file__).parent
    callers = {}
    for path in package.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and (
                node.attr.startswith(("invalidate_", "notify_", "_notify", "forget_"))
            ):
                callers.setdefault(path.name, set()).add(node.attr)
    assert callers == {
        "device.py": {"_notify"},
        "watch.py": {"forget_name", "forget_attributes"},
    }
    assert "DeviceNotifier" not in (package / "operations.py").read_text()


def test_h26_a_look_holds_no_lock_of_the_event_loop_while_it_invalidates():
    """While the kernel makes the watcher wait, lookups and new copies go on."""
    mounted = Mounted()
    watcher = mounted.watcher()
    entered, released = threading.Event(), threading.Event()

    def forget_name(*_):
        entered.set()
        assert released.wait(5)

    mounted.kernel.forget_name = forget_name
    mounted.library.remove(b"org/m/a")
    thread = threading.Thread(target=watcher.look)
    thread.start()
    assert entered.wait(5)
    mounted.look_up(mounted.table.get(ROOT_INODE))
    assert mounted.table.known_directories()
    released.set()
    thread.join(5)
    assert not thread.is_alive()
