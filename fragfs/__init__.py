"""fragfs: one deduplicated, compressed library for model files, read through a mount.

Import from `fragfs.prelude` for the public names. This module stays empty so that importing any
room costs only that room.
"""

__all__ = ["__version__"]


def __getattr__(name: str) -> str:
    """Look the installed version up when it is asked for, not on every start."""
    if name != "__version__":
        raise AttributeError(f"module 'fragfs' has no attribute {name!r}")
    from importlib.metadata import version

    return version("fragfs")
