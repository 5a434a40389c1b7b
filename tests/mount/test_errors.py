import errno

import pytest
import trio
from pyfuse3 import FUSEError

import fragfs.errors
from fragfs.errors import FragmentError, IntegrityError, NotFoundError, StorageError
from fragfs.mount.errors import FaultLog, answering, errno_of


class Handlers:
    def __init__(self):
        self.faults = FaultLog()

    @answering
    async def handle(self, outcome):
        """Documented."""
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    @answering
    async def wait(self):
        await trio.sleep_forever()


async def errno_after(handlers, error):
    with pytest.raises(FUSEError) as caught:
        await handlers.handle(error)
    return caught.value.errno


async def test_results_and_fuse_errors_pass():
    handlers = Handlers()
    assert await handlers.handle(5) == 5
    assert await errno_after(handlers, FUSEError(errno.EROFS)) == errno.EROFS
    assert handlers.handle.__doc__ == "Documented."


@pytest.mark.parametrize("name", fragfs.errors.__all__)
async def test_every_error_of_ours_has_an_errno(name):
    error = getattr(fragfs.errors, name)("it broke")
    expected = {"NotFoundError": errno.ENOENT, "UsageError": errno.EINVAL}.get(name, errno.EIO)
    assert errno_of(error) == expected
    assert await errno_after(Handlers(), error) == expected


async def test_a_bug_is_eio_and_logged_with_its_traceback_once(caplog):
    handlers = Handlers()
    for _ in range(3):
        assert await errno_after(handlers, ZeroDivisionError("a bug")) == errno.EIO
    assert len(caplog.records) == 1
    assert "ZeroDivisionError: a bug" in caplog.text
    assert "Traceback" in caplog.text


async def test_cancellation_leaves_the_handler(autojump_clock, caplog):
    with trio.move_on_after(1) as scope:
        await Handlers().wait()
    assert scope.cancelled_caught
    assert caplog.records == []


async def test_a_missing_name_is_not_logged(caplog):
    await errno_after(Handlers(), NotFoundError("nothing there"))
    assert caplog.records == []


def report(faults, error):
    faults.report(error, "org/m/f", lambda: [b"org/m", b"caf\xe9"])


def test_a_fault_is_logged_once_per_fragment_and_cause(caplog):
    faults = FaultLog()
    for _ in range(3):
        report(faults, IntegrityError("damaged", fragment="aa", remedy="restore it"))
    report(faults, IntegrityError("damaged", fragment="bb", remedy="restore it"))
    report(faults, StorageError("unreadable", fragment="aa"))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert messages[0] == (
        "I/O error reading org/m/f (models: org/m, caf\\xe9): damaged; restore it"
    )
    assert all(record.levelname == "ERROR" for record in caplog.records)


def test_a_catalog_that_cannot_name_models_does_not_hide_the_fault(caplog):
    def failing():
        raise FragmentError("the catalog is gone")

    FaultLog().report(IntegrityError("damaged"), "f", failing)
    assert "unknown, the catalog is gone" in caplog.text
    assert "damaged" in caplog.text


def test_the_memory_of_faults_is_bounded(caplog):
    faults = FaultLog()
    for number in range(5000):
        report(faults, IntegrityError("damaged", fragment=str(number)))
    assert len(faults._seen) <= 4096
    assert len(caplog.records) == 5000


def test_the_last_faults_are_kept_short():
    faults = FaultLog()
    assert faults.recent() == []
    for number in range(9):
        report(faults, IntegrityError(f"damaged {number} " + "x" * 5000, remedy="restore it"))
    faults.report(ZeroDivisionError("a bug"), "getattr")
    faults.report(ZeroDivisionError("a bug"), "getattr")
    recent = faults.recent()
    assert [fault["error"][:9] for fault in recent[:-1]] == [f"damaged {n}" for n in (5, 6, 7, 8)]
    assert recent[-1]["error"] == "ZeroDivisionError('a bug')"
    assert recent[-1]["what"] == "getattr"
    assert recent[-1]["at_s"] > 1_700_000_000
    assert len(str(recent)) < 5000
