"""The values that all rooms share: ids, dtypes, and the public records of a library.

Leaf module: standard library only, so that `fragfs ls` starts without numpy. Values are frozen;
sizes and offsets are bytes; ranges are half-open.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field
from typing import NamedTuple

from fragfs.errors import UsageError

__all__ = [
    "DTYPES_BY_NAME",
    "FRAGMENT_BYTES_MAX",
    "LIBRARY_FORMAT_VERSION",
    "PREDICTORS_FROM_BASES",
    "SHARED_INODE_BYTES_MIN",
    "Dtype",
    "Extent",
    "FileEntry",
    "Fragment",
    "FragmentId",
    "FragmentIdentity",
    "FragmentMetadata",
    "FragmentType",
    "LayerMapping",
    "Level",
    "LibraryConfig",
    "LibraryStats",
    "ModelInfo",
    "ModelManifest",
    "Predictor",
    "SpanKind",
    "TensorRef",
]

LIBRARY_FORMAT_VERSION = 3
"""Version of the on-disk format. Newer libraries are refused, older ones migrated."""

FRAGMENT_BYTES_MAX = 16 << 20
"""Largest raw fragment: 2**21 elements of 8 bytes. Bounds what one random read may decode."""

SHARED_INODE_BYTES_MIN = 1 << 20
"""Files at least this large with equal bytes share one inode, hence one copy in the page cache."""


class FragmentId(bytes):
    """BLAKE3-256 of a fragment's raw bytes: 32 bytes, compared and hashed as bytes."""

    __slots__ = ()

    def __new__(cls, digest: bytes | bytearray | memoryview) -> FragmentId:
        """Wrap a digest of exactly 32 bytes."""
        if len(digest) != 32:
            raise UsageError(f"a fragment id has 32 bytes, not {len(digest)}")
        return super().__new__(cls, digest)

    @classmethod
    def parse(cls, text: str) -> FragmentId:
        """Read the 64 hex digits that `hex()` wrote.

        Raises:
            UsageError: `text` is not exactly 64 hex digits.
        """
        if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
            raise UsageError(f"not a fragment id (64 hex digits): {text!r}")
        return cls(bytes.fromhex(text))

    @property
    def short(self) -> str:
        """The first 12 hex digits, for messages."""
        return self[:6].hex()

    def __repr__(self) -> str:
        return f"FragmentId({self.hex()})"

    __str__ = bytes.hex  # str(id) is the full hex, never b'...'


class Dtype(enum.Enum):
    """How the bytes of a fragment are to be read as elements.

    Value: (code in records, bits per element, bits of the exponent field, bits of the mantissa).
    The exponent is 0 for everything that is not a float. Codes are on disk: never renumber.
    `BYTES` has no element structure (headers, text, unknown files); `QUANT` is blocks of packed
    quantized weights, where match finding does not pay but entropy coding may.
    """

    BYTES = (0, 8, 0, 0)
    QUANT = (1, 8, 0, 0)
    BOOL = (2, 8, 0, 0)
    U8 = (3, 8, 0, 0)
    I8 = (4, 8, 0, 0)
    U16 = (5, 16, 0, 0)
    I16 = (6, 16, 0, 0)
    U32 = (7, 32, 0, 0)
    I32 = (8, 32, 0, 0)
    U64 = (9, 64, 0, 0)
    I64 = (10, 64, 0, 0)
    F16 = (11, 16, 5, 10)
    BF16 = (12, 16, 8, 7)
    F32 = (13, 32, 8, 23)
    F64 = (14, 64, 11, 52)
    C64 = (15, 64, 8, 23)
    F8_E4M3 = (16, 8, 4, 3)
    F8_E5M2 = (17, 8, 5, 2)
    F8_E8M0 = (18, 8, 8, 0)
    F8_E4M3FNUZ = (19, 8, 4, 3)
    F8_E5M2FNUZ = (20, 8, 5, 2)
    F6_E2M3 = (21, 6, 2, 3)
    F6_E3M2 = (22, 6, 3, 2)
    F4 = (23, 4, 2, 1)
    C128 = (24, 128, 11, 52)

    @property
    def code(self) -> int:
        """Number of this dtype in fragment records (FORMAT.md, "Dtypes")."""
        return self.value[0]

    @property
    def bits(self) -> int:
        """Bits per element; 4 and 6 are packed without padding between elements."""
        return self.value[1]

    @property
    def exponent_bits(self) -> int:
        """Width of the exponent field of each float (per part, for complex numbers)."""
        return self.value[2]

    @property
    def mantissa_bits(self) -> int:
        """Width of the stored mantissa of each float (per part, for complex numbers)."""
        return self.value[3]

    @classmethod
    def of_code(cls, code: int) -> Dtype | None:
        """The dtype with this record code, or None if no such code is known."""
        return _DTYPES_BY_CODE.get(code)


_DTYPES_BY_CODE = {member.code: member for member in Dtype}

DTYPES_BY_NAME = {
    member.name: member for member in Dtype if member not in (Dtype.BYTES, Dtype.QUANT)
}
"""safetensors dtype names (upper case, as in the header) to dtypes."""


class Predictor(enum.IntEnum):
    """What a fragment's residual is taken against (FORMAT.md, "Predictors"). Codes are on disk."""

    RAW = 0
    CONSTANT = 1
    ZSTD = 2
    PLANES = 3
    DELTA = 4
    SPARSE = 5
    CAST = 6
    BLEND = 7
    QUANTIZE = 8
    DECAY = 9


PREDICTORS_FROM_BASES = frozenset(
    (
        Predictor.DELTA,
        Predictor.SPARSE,
        Predictor.CAST,
        Predictor.BLEND,
        Predictor.QUANTIZE,
        Predictor.DECAY,
    )
)
"""Predictors that read other fragments."""


class Level(enum.IntEnum):
    """What encodings a library prefers. Codes are on disk.

    FAST decodes quickest, SMALL stores least; BALANCED groups residuals where that saves enough.
    """

    BALANCED = 0
    FAST = 1
    SMALL = 2


class SpanKind(enum.IntEnum):
    """What a byte range of a file is. Codes are on disk, in extents."""

    OPAQUE = 0
    HEADER = 1
    TENSOR = 2
    BUNDLE = 3
    GAP = 4
    TAIL = 5
    MEMBER = 6


@dataclass(frozen=True, slots=True)
class Extent:
    """A byte range of a file and the fragment that supplies it.

    Attributes:
        offset: Where the range starts in the file.
        size: Its length; at least 1.
        fragment: Number of the fragment in the catalog.
        fragment_offset: Where the range starts in the fragment's raw bytes.
        kind: What the range is.
        first: True for the first extent of its tensor, member or other span.
    """

    offset: int
    size: int
    fragment: int
    fragment_offset: int
    kind: SpanKind
    first: bool


@dataclass(frozen=True, slots=True)
class FragmentMetadata:
    """Where a fragment is stored and how large it is: one row of the catalog.

    Attributes:
        number: The catalog's integer for it, never reused.
        id: BLAKE3-256 of the raw bytes.
        pack: Number of the pack that holds its record.
        offset: Where the record starts in the pack.
        record_size: Bytes of the whole record, header included.
        raw_size: Bytes after decoding.
        predictor: What the residual is taken against.
    """

    number: int
    id: FragmentId
    pack: int
    offset: int
    record_size: int
    raw_size: int
    predictor: int


class FragmentIdentity(NamedTuple):
    """What a fragment is, wherever and however it is stored.

    Attributes:
        number: The catalog's integer for it, never reused.
        id: BLAKE3-256 of the raw bytes.
        raw_size: Bytes it has.
        has_bases: Whether it is predicted from others; may change with how it is stored.
        is_base: Whether others are predicted from it; may change as models come and go.
    """

    number: int
    id: FragmentId
    raw_size: int
    has_bases: bool
    is_base: bool


@dataclass(frozen=True, slots=True)
class Fragment:
    """A fragment in its stored form: what a record of a pack says.

    Attributes:
        id: BLAKE3-256 of the raw bytes.
        dtype: Element type the encoding works on.
        raw_size: Bytes after decoding; at most FRAGMENT_BYTES_MAX.
        raw_checksum: XXH3-64 of the raw bytes, checked on every decode.
        predictor: What the residual is taken against.
        params: Predictor parameters (FORMAT.md, "Predictors").
        payload: The encoded residual.
        bases: Fragments the prediction reads, in the predictor's order; empty for those that
            predict from nothing.
    """

    id: FragmentId
    dtype: Dtype
    raw_size: int
    raw_checksum: int
    predictor: Predictor
    params: bytes
    payload: bytes | memoryview
    bases: tuple[FragmentId, ...] = ()


class FragmentType(enum.Enum):
    """The role of a tensor in a network, read off its dotted name.

    A label for reports; nothing about storage depends on it.
    """

    ATTENTION_QUERY = "attention query"
    ATTENTION_KEY = "attention key"
    ATTENTION_VALUE = "attention value"
    ATTENTION_OUTPUT = "attention output"
    FEED_FORWARD = "feed forward"
    NORMALIZATION = "normalization"
    EMBEDDING = "embedding"
    CONVOLUTION = "convolution"
    GENERIC = "generic"

    @classmethod
    def from_tensor_name(cls, name: str) -> FragmentType:
        """Classify by whole dotted segments, so that "diffusion" is not a feed-forward layer."""
        segments = name.lower().split(".")
        for kind, words in _TYPE_WORDS:
            for index, segment in enumerate(segments):
                if segment in words:
                    return kind
                pair = f"{segment}.{segments[index + 1]}" if index + 1 < len(segments) else ""
                if pair in words:
                    return kind
        return cls.GENERIC


_TYPE_WORDS: tuple[tuple[FragmentType, frozenset[str]], ...] = (
    (
        FragmentType.NORMALIZATION,
        frozenset(
            "norm norm1 norm2 norm3 ln ln_1 ln_2 ln_f layernorm layer_norm rmsnorm batchnorm"
            " bn1 bn2 input_layernorm post_attention_layernorm q_norm k_norm group_norm groupnorm"
            " attn_norm ffn_norm output_norm norm_out final_layer_norm".split()
        ),
    ),
    (FragmentType.ATTENTION_QUERY, frozenset("q_proj query to_q wq attn_q q_lin".split())),
    (FragmentType.ATTENTION_KEY, frozenset("k_proj key to_k wk attn_k k_lin".split())),
    (FragmentType.ATTENTION_VALUE, frozenset("v_proj value to_v wv attn_v v_lin".split())),
    (
        FragmentType.ATTENTION_OUTPUT,
        frozenset(
            "o_proj out_proj to_out wo attn_output out_lin attn.c_proj attention.output".split()
        ),
    ),
    (
        FragmentType.FEED_FORWARD,
        frozenset(
            "mlp ffn ff feed_forward feedforward intermediate fc1 fc2 up_proj down_proj gate_proj"
            " gate_up_proj lin1 lin2 w1 w2 w3 ffn_up ffn_down ffn_gate experts output.dense".split()
        ),
    ),
    (
        FragmentType.EMBEDDING,
        frozenset(
            "embed_tokens embeddings word_embeddings position_embeddings wte wpe embedding"
            " tok_embeddings token_embedding token_embd lm_head shared".split()
        ),
    ),
    (
        FragmentType.CONVOLUTION,
        frozenset("conv conv1 conv2 conv_in conv_out".split()),
    ),
)


@dataclass(frozen=True, slots=True)
class TensorRef:
    """One stored piece of a tensor.

    Attributes:
        fragment: The fragment that holds the piece.
        offset: Where the piece starts in the fragment's raw bytes.
        size: Bytes of the piece.
        fragment_index: Position of the piece among the pieces of its tensor, from 0.
    """

    fragment: FragmentId
    offset: int
    size: int
    fragment_index: int


@dataclass(frozen=True, slots=True)
class LayerMapping:
    """A named tensor of one file and the fragments that hold it, front to back.

    Attributes:
        name: The tensor's name as the file spells it.
        file: Path of the file inside its model.
        dtype: The dtype's name as the file spells it.
        shape: Elements per dimension; () for a scalar.
        offset: Where the tensor's bytes start in the file.
        refs: Pieces that cover the tensor in order; empty for a zero-size tensor.
        fragment_type: The tensor's role, read off its name.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    refs: tuple[TensorRef, ...]
    fragment_type: FragmentType

    @property
    def total_size(self) -> int:
        """Bytes of the tensor in the file."""
        return sum(ref.size for ref in self.refs)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a model.

    Attributes:
        path: Path inside the model, components joined by "/", as bytes.
        content: Number of the content it shows: its inode number in a mount.
        size: Bytes of the file.
        sha256: SHA-256 of the whole file: 32 bytes.
        mode: Permission bits of the source (0o7777).
        mtime_ns: Modification time of the source.
        stored_bytes: Record bytes of the file's own fragments, bases not included.
        verdict: What the importer found: "" if unremarkable, else e.g. why safe_open rejects it.
    """

    path: bytes
    content: int
    size: int
    sha256: bytes
    mode: int
    mtime_ns: int
    stored_bytes: int
    verdict: str


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One model as `fragfs ls` shows it.

    Attributes:
        number: The catalog's integer for it, never reused.
        name: Its path in the library, as bytes.
        added_ns: When it was first added, in nanoseconds since the epoch.
        mtime_ns: When its set of files or its root directory last changed.
        file_count: How many files it has.
        logical_bytes: Sum of the file sizes.
        stored_bytes: Record bytes of its files' fragments; what is shared counts in each model.
    """

    number: int
    name: bytes
    added_ns: int
    mtime_ns: int
    file_count: int
    logical_bytes: int
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class ModelManifest:
    """A model with all its files and named tensors.

    Attributes:
        model: The model.
        files: Every file, ordered by path.
        layers: Every named tensor of every file that names tensors.
    """

    model: ModelInfo
    files: tuple[FileEntry, ...]
    layers: tuple[LayerMapping, ...] = ()

    @property
    def fragment_ids(self) -> frozenset[FragmentId]:
        """The distinct fragments its named tensors are held in."""
        return frozenset(ref.fragment for layer in self.layers for ref in layer.refs)


@dataclass(frozen=True, slots=True)
class LibraryConfig:
    """Settings fixed when a library is created and kept inside it.

    Attributes:
        fragment_elements: Elements of a tensor per fragment; a power of two in [2**12, 2**21].
            Siblings are matched fragment by fragment, so it never changes afterwards.
        closure_max: How many fragments one read may have to decode, itself included; 1 to 8. A
            merge of two fine-tunes of a stored model takes four.
        zstd_level: Level for bytes that are not tensors; 1 to 19.
        pack_bytes_max: A pack is sealed once it has this many bytes; 2**20 to 2**34.
        level: What encodings to prefer.
    """

    fragment_elements: int = 1 << 19
    closure_max: int = 4
    zstd_level: int = 12
    pack_bytes_max: int = 256 << 20
    level: Level = Level.BALANCED

    def __post_init__(self) -> None:
        elements = self.fragment_elements
        if elements & (elements - 1) or not 1 << 12 <= elements <= 1 << 21:
            raise UsageError(
                f"fragment_elements must be a power of two from 4096 to 2097152, not {elements}"
            )
        for name, low, high in (
            ("closure_max", 1, 8),
            ("zstd_level", 1, 19),
            ("pack_bytes_max", 1 << 20, 1 << 34),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UsageError(f"{name} must be from {low} to {high}, not {value}")


@dataclass(frozen=True, slots=True)
class LibraryStats:
    """What a library (or one model of it) holds and what was saved, all recomputed from disk.

    A model needs the fragments in its files, and those that decoding them takes.

    Attributes:
        model_count: Models counted.
        file_count: Files in them, by name.
        logical_bytes: Sum of the file sizes.
        unique_bytes: Raw bytes of the distinct fragments in the files.
        stored_bytes: Record bytes of those fragments.
        exclusive_bytes: Record bytes that no other model needs: what removing the model would free
            (whole library: all that is needed).
        shared_bytes: Record bytes of fragments in its files that other models need as well (whole
            library: that at least two models need).
        base_bytes: Record bytes of fragments that are needed only because others are predicted
            from them: they are in none of the files.
        fragment_count: Distinct fragments in the files.
        shared_fragment_count: Those of them needed by at least two models.
        unreferenced_bytes: Record bytes in the library that no model needs.
        disk_bytes: Apparent bytes of everything in the library directory (0 for one model).
        saved_bytes: Bytes saved, by mechanism: "exact" (logical - unique), then one entry per
            predictor (raw - stored of the fragments that use it).
        predicted_bytes: Raw bytes of the fragments that are predicted from a model's, by the name
            of that model (as `os.fsdecode` has it): the oldest one with the base in its files. ""
            stands for bases that are in no model's files any more.
    """

    model_count: int
    file_count: int
    logical_bytes: int
    unique_bytes: int
    stored_bytes: int
    exclusive_bytes: int
    shared_bytes: int
    base_bytes: int
    fragment_count: int
    shared_fragment_count: int
    unreferenced_bytes: int
    disk_bytes: int
    saved_bytes: dict[str, int] = field(default_factory=dict)
    predicted_bytes: dict[str, int] = field(default_factory=dict)
