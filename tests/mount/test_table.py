from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from fragfs.mount.table import canonical_mountpoint, parse_mountinfo, read_mount_table

LINE = (
    b"42 27 0:39 / /mnt/my\\040models\\011\\134x ro,nosuid,nodev shared:5 master:1"
    b" - fuse.fragfs fragfs ro,user_id=0,default_permissions\n"
)


def test_a_line_with_escapes_and_optional_fields():
    (entry,) = parse_mountinfo(LINE)
    assert entry.mount_id == 42
    assert entry.device == "0:39"
    assert entry.minor == 39
    assert entry.mountpoint == Path("/mnt/my models\t\\x")
    assert entry.options == ("ro", "nosuid", "nodev", "user_id=0", "default_permissions")
    assert (entry.filesystem_type, entry.source) == ("fuse.fragfs", "fragfs")
    assert entry.is_fragfs


def test_names_that_are_not_utf8_survive():
    (entry,) = parse_mountinfo(b"1 0 0:1 / /m\xff rw - ext4 /dev/sd\xfe rw\n")
    assert bytes(entry.mountpoint) == b"/m\xff"
    assert not entry.is_fragfs


@given(st.integers(0, len(LINE)))
def test_a_line_that_is_cut_short_is_left_out_or_right(length):
    for entry in parse_mountinfo(LINE[:length]):
        assert entry.mountpoint == Path("/mnt/my models\t\\x")


def test_the_real_table_has_proc_and_the_root():
    places = {entry.mountpoint: entry for entry in read_mount_table()}
    assert places[Path("/proc")].filesystem_type == "proc"
    assert Path("/") in places
    assert not places[Path("/")].is_fragfs


def test_a_mount_point_is_spelled_without_links(tmp_path):
    (tmp_path / "real" / "m").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "direct").symlink_to("real/m")
    spelled = tmp_path.resolve() / "real" / "m"
    assert canonical_mountpoint(tmp_path / "link" / "m") == spelled
    assert canonical_mountpoint(tmp_path / "direct") == spelled
    assert canonical_mountpoint(tmp_path / "real" / "x" / ".." / "m") == spelled
    assert canonical_mountpoint(Path("/proc")) == Path("/proc")
