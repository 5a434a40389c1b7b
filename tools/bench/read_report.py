"""The tables of the section "read". Pure: samples in, tables out."""

from __future__ import annotations

from dataclasses import dataclass

from tools.bench.report import Table
from tools.bench.samples import Key, Sample, Samples, median

__all__ = ["READ_METHODS", "ReadFacts", "report"]

READ_METHODS = {
    "load": "safetensors",
    "read": "read(), 1 MiB",
    "mmap": "mmap, front to back",
    "names": "mmap, tensors by name",
    "natural": "mmap, tensors in natural order",
    "sequential": "mmap, MADV_SEQUENTIAL",
    "populate": "mmap, MAP_POPULATE",
    "shuffled": "mmap, tensors at random",
    "threads": "pread(), 4 threads, one descriptor",
    "backwards": "pread(), last to first",
    "processes": "safetensors, 4 processes",
}
"""Rows; the reader times single touches besides."""

_STATES = {
    "disk": "disk",
    "tmpfs": "tmpfs",
    "squashfs": "squashfs",
    "squashfuse": "squashfuse",
    "c": "C server",
    "cold": "cold",
    "a": "switch A",
    "a_asked": "A, no passthrough",
    "a_new": "A, new mount",
    "a_plain": "A, no prefill",
    "b": "switch B",
    "warm": "warm",
    "warm_asked": "warm, no passthrough",
}

_RATIOS = (
    ("warm", "disk"),
    ("warm_asked", "disk"),
    ("a", "c"),
    ("a_asked", "c"),
    ("a_new", "c"),
    ("a_plain", "c"),
    ("a", "disk"),
    ("a_asked", "disk"),
    ("b", "c"),
    ("cold", "c"),
    ("cold", "disk"),
)

_TOUCHED = {
    **_STATES,
    "cold_f32": "cold, f32 model of 128 MiB",
    "cold_small": "cold, level `small`, 128 MiB",
}

_SERVED = frozenset(_STATES) - {"disk", "tmpfs", "squashfs", "squashfuse"}
_UNKNOWN = "-"


@dataclass(frozen=True)
class ReadFacts:
    """What the tables say besides samples.

    Attributes:
        size: Bytes of the model.
        fragment_count: Its fragments.
        loader: What safetensors fills: "torch", "numpy" or None.
        read_ahead_kb: How far the kernel read ahead on mounts.
        wide_read_ahead_kb: The same in the table of its own.
        notes: What is missing, and why.
    """

    size: int
    fragment_count: int
    loader: str | None
    read_ahead_kb: int
    wide_read_ahead_kb: int
    notes: tuple[str, ...] = ()


def report(samples: Samples, facts: ReadFacts) -> list[Table]:
    """All tables; figures are in the first and where they belong."""
    tables = [
        _rates(samples, facts),
        _ratios(samples, facts),
        _touches(samples),
        _wide(samples, facts),
        _processes(samples, facts),
        _costs(samples, facts),
    ]
    return [table for table in tables if table.rows]


def _label(method: str, facts: ReadFacts) -> str:
    text = READ_METHODS[method]
    return text.replace("safetensors", f"safetensors + {facts.loader}") if facts.loader else text


def _text(value: float | None, form: str = ".2f", scale: float = 1) -> str:
    return _UNKNOWN if value is None else format(value / scale, form)


def _rates(samples: Samples, facts: ReadFacts) -> Table:
    states = [state for state in _STATES if state in samples.states()]
    table = Table(
        f"Read: GB/s of a bf16 file of {facts.size / 1e6:.0f} MB",
        ["", *(_STATES[state] for state in states)],
        notes=[
            "Every read is a new process; memory it will need was touched right before. Medians."
            " Disk and tmpfs: a plain file in the page cache. squashfs (kernel) and squashfuse:"
            " zstd, the image in the page cache. C server: one thread over the raw file in memory,"
            " the mount's pages cold. Cold: a new mount and an empty fragment cache, packs in the"
            " page cache. Switch A: the model in the fragment cache, the mount's pages dropped; of"
            " a mount by root the kernel reads it from there (passthrough). New mount: the same"
            " cache, another mount that has served nothing. No prefill: nor passthrough. Switch B:"
            " a fine-tune whose base was read, its own residuals never decoded. Warm: read right"
            " before. Read-ahead of the C server and of fragfs:"
            f" {facts.read_ahead_kb} KiB, or what the system says where this is not root.",
            *facts.notes,
        ],
    )
    for method in READ_METHODS:
        rates = {state: samples.rate(state, method) for state in states}
        if any(rates.values()):
            table.add(_label(method, facts), *(_text(rate, scale=1e9) for rate in rates.values()))
            for state, rate in rates.items():
                _put(table, f"read.{method}.{state}_rate", rate)
    for state, text in (
        ("decode", "decoding alone, one thread"),
        ("decode_b", "decoding alone, the fine-tune, its base decoded"),
    ):
        rate = samples.rate(state, "decode")
        _put(table, f"read.{state}_rate", rate)
        column = "b" if state == "decode_b" else "cold"
        table.add(text, *(_text(rate, scale=1e9) if s == column else "" for s in states))
    leftover = max(
        (s.leftover for state in states for m in READ_METHODS for s in samples.of(state, m)),
        default=0,
    )
    if leftover > 0.01:
        table.notes.append(f"Up to {leftover:.0%} of the pages were not cold: figures flatter.")
    return table


def _put(table: Table, name: str, value: float | None) -> None:
    if value is not None:
        table.figures[name] = value


def _ratios(samples: Samples, facts: ReadFacts) -> Table:
    table = Table(
        "Read: ratios within a round",
        [
            "",
            *(f"{_STATES[over]} / {_STATES[under]}" for over, under in _RATIOS),
            "cold / decoding",
            "B / decoding",
        ],
        notes=["Medians of the ratios of rates, each of two reads in the same round."],
    )
    for method in READ_METHODS:
        if method == "processes":
            continue
        found = {
            f"{over}_of_{under}": samples.ratio((over, method), (under, method))
            for over, under in _RATIOS
        }
        for state, decode in (("cold", "decode"), ("b", "decode_b")):
            found[f"{state}_of_decode"] = samples.ratio((state, method), (decode, "decode"))
        if any(value is not None for value in found.values()):
            table.add(_label(method, facts), *map(_text, found.values()))
            for name, value in found.items():
                _put(table, f"read.{method}.{name}", value)
    for state in ("cold", "a", "a_asked"):
        threads = samples.ratio((state, "threads"), (state, "read"))
        _put(table, f"read.threads.{state}_of_one", threads)
        backwards = samples.ratio((state, "backwards"), (state, "read"))
        _put(table, f"read.backwards.{state}_of_forwards", backwards)
        if threads is not None and backwards is not None:
            table.notes.append(
                f"{_STATES[state]}: 4 threads / one {threads:.2f}, last to first /"
                f" first to last {backwards:.2f}."
            )
    return table


def _touches(samples: Samples) -> Table:
    table = Table(
        "Read: random touches of 4 KiB, mapped, microseconds",
        ["", "p50", "p99"],
        notes=[
            "One touch for 128 KiB of the file, at least 1,024: cold, about one in sixteen decodes."
        ],
    )
    for state, text in _TOUCHED.items():
        p50, p99 = samples.p50(state, "touch"), samples.p99(state, "touch")
        if p50 is not None and p99 is not None:
            table.add(text, f"{p50 * 1e6:.1f}", f"{p99 * 1e6:.0f}")
            table.figures[f"read.touch.{state}_p50_s"] = p50
            table.figures[f"read.touch.{state}_p99_s"] = p99
    ratio = samples.ratio_of_p50(("a", "touch"), ("c", "touch"))
    _put(table, "read.touch.a_of_c_p50", ratio)
    if ratio is not None:
        table.notes.append(f"Switch A / C server, p50: {ratio:.2f}.")
    return table


def _wide(samples: Samples, facts: ReadFacts) -> Table:
    states = ("c", "a", "a_asked")
    table = Table(
        f"Read: GB/s where the kernel reads ahead by {facts.wide_read_ahead_kb} KiB",
        ["", *(_STATES[state] for state in states), "A / C server", "A, no passthrough / C server"],
    )
    for method in READ_METHODS:
        rates = [samples.rate(f"{state}_wide", method) for state in states]
        if any(rates):
            ratios = {
                state: samples.ratio((f"{state}_wide", method), ("c_wide", method))
                for state in states[1:]
            }
            cells = [_text(rate, scale=1e9) for rate in rates]
            table.add(_label(method, facts), *cells, *map(_text, ratios.values()))
            for state, ratio in ratios.items():
                _put(table, f"read.{method}.{state}_wide_of_c_wide", ratio)
    return table


def _processes(samples: Samples, facts: ReadFacts) -> Table:
    table = Table("Read: four processes load one model", ["", "seconds"])
    for state, text in (("disk", "plain file"), ("cold", "fragfs, cold")):
        seconds = samples.seconds(state, "processes")
        if seconds is not None:
            table.add(text, f"{seconds:.2f}")
            table.figures[f"read.processes.{state}_s"] = seconds
    plain: Key = ("disk", "processes")
    share = samples.share_of_bound(
        ("cold", "processes"), [(1.0, plain), (1.2, ("decode", "decode"))]
    )
    _put(table, "read.processes.share_of_bound", share)
    if share is not None:
        table.add("fragfs / (plain file + 1.2 decodes)", f"{share:.2f}")
    decodes = samples.counter("cold", "processes", "decodes")
    if decodes is not None:
        each = decodes / facts.fragment_count
        table.figures["read.processes.decodes_each"] = each
        table.add("decodes / fragments", f"{each:.3f}")
    return table


def _costs(samples: Samples, facts: ReadFacts) -> Table:
    table = Table(
        "Read: what it took the server",
        [
            "",
            "READs",
            "decodes",
            "decoded / returned",
            "pushed / file",
            "CPU s per GB",
            "RssAnon, MB",
        ],
        notes=[
            "Medians of a read; RssAnon, of all its processes, is the most that was seen. What the"
            " server does not count is -."
        ],
    )
    for state in (state for state in _STATES if state in _SERVED):
        for method in READ_METHODS:
            found = samples.of(state, method)
            if found:
                table.add(f"{_STATES[state]}: {_label(method, facts)}", *_cost(found))
                _put_costs(table, f"read.{method}.{state}", found)
    return table


def _cost(found: list[Sample]) -> list[str]:
    def counted(name: str) -> float | None:
        return median(sample.counters.get(name) for sample in found)

    return [
        _text(counted("reads"), ",.0f"),
        _text(counted("decodes"), ",.0f"),
        _text(median(map(_decoded_of_returned, found))),
        _text(median(map(_pushed_of_read, found))),
        _text(median(map(_cpu_per_byte, found)), scale=1e-9),
        _text(max((s.anon_bytes for s in found if s.anon_bytes), default=None), ".0f", 1e6),
    ]


def _put_costs(table: Table, name: str, found: list[Sample]) -> None:
    for counter in ("reads", "decodes", "bytes_decoded", "bytes_returned", "pushed_bytes"):
        value = median(sample.counters.get(counter) for sample in found)
        _put(table, f"{name}_{counter}", value)
    _put(table, f"{name}_decoded_of_returned", median(map(_decoded_of_returned, found)))
    _put(table, f"{name}_cpu_s_per_byte", median(map(_cpu_per_byte, found)))
    anon = max((s.anon_bytes for s in found if s.anon_bytes is not None), default=None)
    _put(table, f"{name}_anon_bytes", anon)


def _decoded_of_returned(sample: Sample) -> float | None:
    """Of what was read: pages that were pushed are returned as well, without a READ."""
    decoded = sample.counters.get("bytes_decoded")
    return None if decoded is None else decoded / sample.size


def _pushed_of_read(sample: Sample) -> float | None:
    pushed = sample.counters.get("pushed_bytes")
    return None if pushed is None else pushed / sample.size


def _cpu_per_byte(sample: Sample) -> float | None:
    return None if sample.cpu_s is None else sample.cpu_s / sample.size
