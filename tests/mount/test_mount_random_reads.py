"""Seeded random reads of every kind of file, in every way there is, compared with the source."""

import ctypes
import io
import mmap
import os
import random
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from fragfs.types import Dtype
from tests.models import safetensors_bytes

pytestmark = [pytest.mark.mount, pytest.mark.slow]

PAGE = mmap.PAGESIZE
SEEDS = range(10)
STEPS = 120
"""For each file and seed."""

POSIX_FADV = {
    "normal": os.POSIX_FADV_NORMAL,
    "random": os.POSIX_FADV_RANDOM,
    "sequential": os.POSIX_FADV_SEQUENTIAL,
    "willneed": os.POSIX_FADV_WILLNEED,
}
ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "U16": 2,
    "I16": 2,
    "U32": 4,
    "I32": 4,
    "U64": 8,
    "I64": 8,
    "F16": 2,
    "BF16": 2,
    "F32": 4,
    "F64": 8,
    "C64": 8,
    "C128": 16,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
}
"""Of the dtypes whose elements are whole bytes; F4 and F6 come as rows that are."""

FLOATS = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64}


def tensor_bytes(rng, dtype, count):
    if dtype in FLOATS:
        return (rng.standard_normal(count) * 0.02).astype(FLOATS[dtype]).tobytes()
    if dtype == "BOOL":
        return rng.integers(0, 2, count, np.uint8).tobytes()
    return rng.bytes(count * ITEM_BYTES[dtype])


def gguf_bytes(rng):
    def string(text):
        return struct.pack("<Q", len(text)) + text

    blocks = np.zeros(3000, np.dtype([("scale", "<f2"), ("codes", "i1", (32,))]))
    blocks["scale"] = rng.random(3000) * 0.01
    blocks["codes"] = rng.normal(0, 30, (3000, 32))
    plain = (rng.standard_normal(50_000) * 0.02).astype("<f2").tobytes()
    quantized = blocks.tobytes()
    quantized += bytes(-len(quantized) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, 1)
    head += string(b"general.architecture") + struct.pack("<I", 8) + string(b"llama")
    head += string(b"q") + struct.pack("<IQIQ", 1, 96_000, 8, 0)
    head += string(b"f") + struct.pack("<IQIQ", 1, 50_000, 1, len(quantized))
    return head + bytes(-len(head) % 32) + quantized + plain


def zip_bytes(rng):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("m/data.pkl", b"\x80\x02.")
        for number in range(4):
            file.writestr(f"m/data/{number}", tensor_bytes(rng, "BF16", 70_000 + number))
    return archive.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Contents by name, and where they are mounted."""
    from tests.mount.conftest import Mounts

    place = tmp_path_factory.mktemp("random-reads")
    rng = np.random.default_rng(11)
    contents = {
        f"{dtype}.safetensors": safetensors_bytes(
            {
                "a": (dtype, (301, 257), tensor_bytes(rng, dtype, 301 * 257)),
                "b": (dtype, (1000,), tensor_bytes(rng, dtype, 1000)),
            }
        )
        for dtype in ITEM_BYTES
    }
    contents["F4.safetensors"] = safetensors_bytes({"a": ("F4", (300, 256), rng.bytes(38_400))})
    for name in ("F6_E2M3", "F6_E3M2"):
        contents[f"{name}.safetensors"] = safetensors_bytes(
            {"a": (name, (300, 256), rng.bytes(300 * 256 * 6 // 8))}
        )
    wide = rng.standard_normal((700, 512)) * 0.02
    for number in range(2):
        tuned = (wide + number * 1e-4 * rng.standard_normal(wide.shape)).astype(ml_dtypes.bfloat16)
        contents[f"tuned{number}.safetensors"] = safetensors_bytes(
            {"w": ("BF16", wide.shape, tuned.tobytes())}
        )
    contents |= {
        "model.gguf": gguf_bytes(rng),
        "weights.pt": zip_bytes(rng),
        "opaque.bin": rng.bytes(3_456_789),
        "text.txt": b"".join(b"line %d of many\n" % n for n in range(60_000)),
        "zeros": bytes(2_500_000),
        "empty": b"",
        "one": b"1",
        "cut.safetensors": contents["F32.safetensors"][:100_001],
    }
    for size in (PAGE - 1, PAGE, PAGE + 1, 65_535, 65_536, 65_537, (1 << 20) - 1, (1 << 20) + 1):
        contents[f"edge{size}"] = rng.bytes(size)
    source = place / "m"
    source.mkdir()
    for name, data in contents.items():
        (source / name).write_bytes(data)
    from fragfs.library.add import AddOptions
    from fragfs.library.library import FragmentLibrary
    from fragfs.types import LibraryConfig

    # Small fragments: many reads cross their edges.
    with FragmentLibrary.create(place / "lib", LibraryConfig(fragment_elements=1 << 14)) as library:
        library.add([source], AddOptions(force=True))
    made = Mounts(place)
    yield contents, made(place / "lib", cache_bytes_max=4 << 20).mountpoint / "m"
    made.close()


def test_every_dtype_is_read(files):
    contents, _ = files
    kinds = {name.removesuffix(".safetensors") for name in contents}
    assert {dtype.name for dtype in Dtype} - {"BYTES", "QUANT"} <= kinds


def choose_range(chosen, size):
    """An offset and a length: near edges and over the end more often than chance has it."""
    at = chosen.choice(
        (
            chosen.randrange(size + 1),
            chosen.randrange(size // PAGE + 1) * PAGE,
            max(0, size - chosen.randrange(2 * PAGE)),
            0,
        )
    )
    at = max(0, at + chosen.choice((0, 0, -1, 1)))
    return at, chosen.choice((0, 1, 511, PAGE, PAGE + 1, 10_000, 131_072, 700_001))


def by_pread(fd, expected, chosen):
    at, size = choose_range(chosen, len(expected))
    assert os.pread(fd, size, at) == expected[at : at + size], (at, size)


def by_read(fd, expected, chosen):
    at, size = choose_range(chosen, len(expected))
    os.lseek(fd, at, os.SEEK_SET)
    for _ in range(3):
        data = os.read(fd, size)
        assert data == expected[at : at + size], (at, size)
        at += len(data)
    assert os.lseek(fd, 0, os.SEEK_CUR) == at


def by_readv(fd, expected, chosen):
    at, size = choose_range(chosen, len(expected))
    parts = [bytearray(chosen.choice((1, 17, PAGE, size + 1))) for _ in range(4)]
    got = os.preadv(fd, parts, at)
    wanted = expected[at : at + sum(map(len, parts))]
    assert got == len(wanted), at
    assert b"".join(parts)[:got] == wanted, at


def by_map(fd, expected, chosen):
    if not expected:
        return
    at, size = choose_range(chosen, len(expected))
    start = at // PAGE * PAGE
    length = min(len(expected) - start, size + PAGE)
    if length <= 0:
        return
    flags = chosen.choice((mmap.MAP_PRIVATE, mmap.MAP_SHARED))
    with mmap.mmap(fd, length, flags, mmap.PROT_READ, offset=start) as mapped:
        for _ in range(5):
            a = chosen.randrange(length)
            b = min(length, a + chosen.choice((1, 100, PAGE, 50_000)))
            assert mapped[a:b] == expected[start + a : start + b], (start, a, b)


def by_private_writes(fd, expected, chosen):
    """What is written to a private mapping stays there, and shows in no other way of reading."""
    if not expected:
        return
    with mmap.mmap(fd, len(expected), mmap.MAP_PRIVATE) as mapped:
        at = chosen.randrange(len(expected))
        flipped = bytes([expected[at] ^ 0xFF])
        mapped[at : at + 1] = flipped
        start, stop = max(0, at - 5000), at + 5000
        mine = expected[start:at] + flipped + expected[at + 1 : stop]
        assert mapped[start:stop] == mine, at
        assert os.pread(fd, 1, at) == expected[at : at + 1], at


def by_sendfile(fd, expected, chosen):
    at, size = choose_range(chosen, len(expected))
    sink = os.memfd_create("sink")
    try:
        sent = 0
        while sent < size and (got := os.sendfile(sink, fd, at + sent, size - sent)):
            sent += got
        assert os.pread(sink, size, 0) == expected[at : at + size], (at, size)
    finally:
        os.close(sink)


def by_splice(fd, expected, chosen):
    at, size = choose_range(chosen, len(expected))
    out, into = os.pipe()
    try:
        got = os.splice(fd, into, min(size, 65_536), offset_src=at)
        data = os.read(out, got) if got else b""
        assert data == expected[at : at + got], (at, size)
        assert got or at >= len(expected) or not size
    finally:
        os.close(out)
        os.close(into)


def by_direct(fd, expected, chosen):
    direct = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT)
    try:
        at = choose_range(chosen, len(expected))[0] // PAGE * PAGE
        with mmap.mmap(-1, 64 * PAGE) as buffer:
            size = chosen.choice((PAGE, 7 * PAGE, 64 * PAGE))
            got = os.preadv(direct, [memoryview(buffer)[:size]], at)
            assert buffer[:got] == expected[at : at + size], (at, size)
    finally:
        os.close(direct)


def forget(fd, expected, chosen):
    """Drop pages, so that what follows asks the daemon."""
    at, size = choose_range(chosen, len(expected))
    os.posix_fadvise(fd, *chosen.choice(((0, 0), (at, size))), os.POSIX_FADV_DONTNEED)


def advise(fd, expected, chosen):
    at, size = choose_range(chosen, len(expected))
    os.posix_fadvise(fd, at, size, chosen.choice(list(POSIX_FADV.values())))


def read_ahead(fd, expected, chosen):
    at, size = choose_range(chosen, len(expected))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.readahead(fd, ctypes.c_int64(at), ctypes.c_size_t(size)) == 0


WAYS = (
    by_pread,
    by_read,
    by_readv,
    by_map,
    by_map,
    by_private_writes,
    by_sendfile,
    by_splice,
    by_direct,
    forget,
    forget,
    advise,
    read_ahead,
)


def drop_all_caches():
    """What an administrator does; nothing where this user is none."""
    if os.geteuid() == 0:
        try:
            with open("/proc/sys/vm/drop_caches", "w") as control:
                control.write("3")
        except OSError:
            pass


@pytest.mark.parametrize("seed", SEEDS)
def test_random_reads_agree_with_the_source(files, seed):
    contents, mounted = files
    chosen = random.Random(seed)
    names = sorted(contents)
    chosen.shuffle(names)
    for index, name in enumerate(names):
        if index == len(names) // 2 and seed % 4 == 0:
            drop_all_caches()
        expected = contents[name]
        fd = os.open(mounted / name, os.O_RDONLY)
        try:
            for step in range(STEPS):
                way = chosen.choice(WAYS)
                try:
                    way(fd, expected, chosen)
                except (AssertionError, OSError) as error:
                    raise AssertionError(
                        f"{name}, seed {seed}, step {step}, {way.__name__}: {error!r:.500}"
                    ) from None
        finally:
            os.close(fd)


def test_random_reads_of_many_open_files_at_once(files):
    """One step here, one there: read-ahead state of many files beside each other."""
    contents, mounted = files
    chosen = random.Random(99)
    opened = {name: os.open(mounted / name, os.O_RDONLY) for name in contents}
    try:
        for _ in range(2000):
            name = chosen.choice(sorted(opened))
            chosen.choice(WAYS)(opened[name], contents[name], chosen)
    finally:
        for fd in opened.values():
            os.close(fd)


def test_the_comparison_sees_a_difference(files):
    """The ways above are no use if they pass whatever they read."""
    contents, mounted = files
    name = "opaque.bin"
    wrong = bytes(byte ^ 1 for byte in contents[name][:100_000]) + contents[name][100_000:]
    fd = os.open(mounted / name, os.O_RDONLY)
    try:
        for way in (w for w in WAYS if w.__name__.startswith("by_")):
            chosen = random.Random(5)

            def check(way=way, chosen=chosen):
                for _ in range(60):
                    way(fd, wrong, chosen)

            with pytest.raises(AssertionError):
                check()
    finally:
        os.close(fd)
