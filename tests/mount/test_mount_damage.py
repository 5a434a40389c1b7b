"""Damage below a mount: EIO for whoever reads it, everything else reads on, the mount stays up."""

import errno
import hashlib
import json
import os
import shutil

import pytest

from tests.faults.damages import cell_damages, file_damages, pack_damages, page_damages
from tests.faults.template import Template
from tests.mount.support import run_reader

pytestmark = [pytest.mark.mount, pytest.mark.slow]

DAMAGES = (
    "LAST: deleted",
    "FIRST: truncated in half",
    "FIRST: middle block zeroed",
    "FIRST: an older copy",
    "LAST: header library_uuid flipped",
    "record middle raw_checksum forged",
    "record middle payload forged",
    "record middle id forged",
    "record middle zeroed",
    "record fragment of predictor 3 1 payload middle flipped",
    "record fragment of predictor 4 1 base 0 forged",
    "record fragment of predictor 5 1 params forged",
    "bytes swapped",
    "fragments.number middle: another number",
    "fragments.offset first: another number",
    "contents.extents middle: a flipped bit",
    "contents.size last: another number",
    "files.content first: another number",
)

READ = """
import hashlib, json, os, sys
found = {}
for name in json.loads(sys.argv[2]):
    try:
        with open(os.path.join(sys.argv[1], name), "rb") as file:
            found[name] = hashlib.sha256(file.read()).hexdigest()
    except OSError as error:
        found[name] = error.errno
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return Template(tmp_path_factory.mktemp("damage"))


@pytest.fixture(scope="module")
def table(template):
    """Every damage of the table that a closed library can have."""
    found = [*pack_damages(template.path), *page_damages(template.path)]
    found += [*cell_damages(template.path), *file_damages(template.hot, template.older)]
    return found


@pytest.mark.parametrize("name", DAMAGES)
def test_a_mount_outlives_damage(mounts, template, table, name):
    packs = sorted(f"packs/{pack.name}" for pack in (template.path / "packs").iterdir())
    name = name.replace("FIRST", packs[0]).replace("LAST", packs[-1])
    damage = next(damage for damage in table if name in damage.name)
    path = template.copy()
    damage.apply(path)
    touched = {os.fsdecode(b"/".join(key)) for key in template.touched(path)}
    expected = {
        os.fsdecode(b"/".join(key)): hashlib.sha256(data).hexdigest()
        for key, data in template.expected.items()
    }
    report = mounts(path)
    for _ in range(2):
        output = run_reader(READ, report.mountpoint, json.dumps([*expected])).stdout
        found = json.loads(output)
        failed = {key for key, value in found.items() if value != expected[key]}
        assert {found[key] for key in failed} == {errno.EIO}, found
        assert damage.area != "pack" or failed <= touched
        assert failed < expected.keys()
    assert "later" in os.listdir(report.mountpoint)
    assert mounts.read_log().count("I/O error reading") or damage.area != "pack"
    shutil.rmtree(path)
