import subprocess
import sys
from pathlib import Path

import pytest

from fragfs.errors import UsageError
from fragfs.mount.options import MountOptions


def test_options_survive_json():
    options = MountOptions(
        Path("/library\udcff"),
        Path("/m é"),
        models=(b"org/m", b"caf\xe9"),
        allow_root=True,
        uid=7,
        umask=0o077,
        log_file=Path("/log"),
        grace_s=2.5,
        workers=3,
    )
    assert MountOptions.from_json(options.to_json()) == options
    plain = MountOptions(Path("/l"), Path("/m"))
    assert MountOptions.from_json(plain.to_json()) == plain


def test_the_default_umask_takes_off_nothing_of_0444_and_0555():
    assert MountOptions(Path("/l"), Path("/m")).umask_or_default & 0o555 == 0


@pytest.mark.parametrize(
    "values",
    [
        {"allow_other": True, "allow_root": True},
        {"umask": 0o1000},
        {"umask": -1},
        {"cache_bytes_max": -1},
        {"grace_s": -1.0},
        {"workers": 0},
    ],
)
def test_nonsense_is_refused(values):
    with pytest.raises(UsageError):
        MountOptions(Path("/l"), Path("/m"), **values)


def test_what_the_command_line_imports_is_light():
    program = (
        "import sys, fragfs.mount.options, fragfs.mount.launch, fragfs.mount.unmount\n"
        "heavy = {'pyfuse3', 'trio', 'numpy', 'sqlite3'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
