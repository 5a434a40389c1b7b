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
from fragfs.library.collect import GcReport
from fragfs.library.estimate import EstimateReport
from fragfs.library.explain import Explanation
from fragfs.library.library import FragmentLibrary
from fragfs.library.optimize import OptimizeReport
from fragfs.similarity.index import (
    DEFAULT_SIMILARITY_THRESHOLD,
    SimilarityIndex,
    SimilarityMatch,
    SimilarityThreshold,
)
from fragfs.similarity.signature import FragmentSignature, SignatureConfig
from fragfs.types import (
    LIBRARY_FORMAT_VERSION,
    Fragment,
    FragmentId,
    FragmentMetadata,
    FragmentType,
    LayerMapping,
    Level,
    LibraryConfig,
    LibraryStats,
    ModelManifest,
    TensorRef,
)

__all__ = [
    "DEFAULT_SIMILARITY_THRESHOLD",
    "LIBRARY_FORMAT_VERSION",
    "AddOptions",
    "EstimateReport",
    "Explanation",
    "FormatError",
    "Fragment",
    "FragmentError",
    "FragmentId",
    "FragmentLibrary",
    "FragmentMetadata",
    "FragmentSignature",
    "FragmentType",
    "GcReport",
    "IntegrityError",
    "LayerMapping",
    "Level",
    "LibraryConfig",
    "LibraryStats",
    "LimitError",
    "ModelManifest",
    "NotFoundError",
    "OptimizeReport",
    "SignatureConfig",
    "SimilarityIndex",
    "SimilarityMatch",
    "SimilarityThreshold",
    "StorageError",
    "TensorRef",
    "UsageError",
]
