"""The public names of fragfs in one place: `from fragfs.prelude import FragmentLibrary`.

What is listed here is the Python interface; everything else may move between releases. Nothing
inside fragfs imports this module.
"""

from fragfs.errors import (
    FormatError,
    FragmentError,
    IntegrityError,
    LimitError,
    NotFoundError,
    StorageError,
    UsageError,
)
from fragfs.library.add import AddOptions
from fragfs.library.library import FragmentLibrary
from fragfs.types import (
    LIBRARY_FORMAT_VERSION,
    Fragment,
    FragmentId,
    FragmentMetadata,
    FragmentType,
    LayerMapping,
    LibraryConfig,
    LibraryStats,
    ModelManifest,
    TensorRef,
)

__all__ = [
    "LIBRARY_FORMAT_VERSION",
    "AddOptions",
    "FormatError",
    "Fragment",
    "FragmentError",
    "FragmentId",
    "FragmentLibrary",
    "FragmentMetadata",
    "FragmentType",
    "IntegrityError",
    "LayerMapping",
    "LibraryConfig",
    "LibraryStats",
    "LimitError",
    "ModelManifest",
    "NotFoundError",
    "StorageError",
    "TensorRef",
    "UsageError",
]
