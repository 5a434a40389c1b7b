from pathlib import Path

import click
import pytest

from fragfs.cli.mount_options import FstabOptions, parse_fstab_options, parse_number
from fragfs.cli.options import parse_size
from fragfs.errors import UsageError


def test_words_for_mount_and_systemd_are_passed_over():
    text = "defaults,noauto,_netdev,nofail,user,nosuid,nodev,ro,noatime,x-systemd.automount"
    assert parse_fstab_options(f"{text},X-mount.mkdir=0755,comment=mine,,") == FstabOptions()
    assert parse_fstab_options("") == FstabOptions()


def test_what_fragfs_understands():
    text = "allow_other,nonempty,uid=1000,gid=0,umask=027,library=/srv/m,model=a,model=org/b"
    assert parse_fstab_options(text) == FstabOptions(
        allow_other=True,
        nonempty=True,
        uid=1000,
        gid=0,
        umask=0o027,
        library=Path("/srv/m"),
        models=(b"a", b"org/b"),
    )
    assert parse_fstab_options("allow_root").allow_root
    assert parse_fstab_options("rw,uid=1,uid=2") == FstabOptions(writable=True, uid=2)


@pytest.mark.parametrize(
    "word",
    ["alow_other", "allow_other=1", "uid", "uid=", "library=", "ro=1", "=", "noauto=x", "rw=yes"],
)
def test_unknown_words_are_refused(word):
    with pytest.raises(UsageError, match="unknown mount option"):
        parse_fstab_options(f"ro,{word}")


@pytest.mark.parametrize(
    ("name", "text"),
    [("uid", "root"), ("uid", "-1"), ("gid", "4294967295"), ("umask", "8"), ("umask", "1000")],
)
def test_bad_numbers_are_refused(name, text):
    with pytest.raises(UsageError, match=f"{name}={text} is not"):
        parse_number(name, text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("96M", 96 << 20),
        ("96m", 96 << 20),
        ("96MiB", 96 << 20),
        ("96MB", 96_000_000),
        ("1.5G", 3 << 29),
        ("2 TiB", 2 << 40),
        ("12B", 12),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1X", "1MM", "1,5G"])
def test_bad_sizes_are_refused(text):
    with pytest.raises(click.BadParameter, match="is not a size"):
        parse_size(text)
