"""The oracle: which models the library must hold, and who is busy with which.

Whoever changes a model takes it, and nobody else changes it meanwhile; whoever reads it shares it,
and nobody takes it meanwhile. Safe in threads.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tools.soak.sources import Version

__all__ = ["Shelf"]

_TAKEN = -1


class Shelf:
    """What the library holds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: dict[str, Version] = {}
        self._users: dict[str, int] = {}
        self._named = 0
        self._former: list[str] = []

    def models(self) -> dict[str, Version]:
        """A copy: model names and what they are."""
        with self._lock:
            return dict(self._models)

    @property
    def size(self) -> int:
        """Bytes of all models."""
        return sum(version.size for version in self.models().values())

    def take(self, chosen: random.Random, count: int = 1) -> list[str]:
        """Take up to `count` models that nobody uses."""
        with self._lock:
            free = sorted(name for name in self._models if not self._users.get(name))
            names = chosen.sample(free, min(count, len(free)))
            self._users.update(dict.fromkeys(names, _TAKEN))
        return names

    def take_new(self, chosen: random.Random) -> str:
        """Take a name that no model has: a new one, or one that was given up."""
        with self._lock:
            former = [name for name in self._former if not self._users.get(name)]
            if former and chosen.random() < 0.3:
                name = chosen.choice(former)
                self._former.remove(name)
            else:
                self._named += 1
                folder = chosen.choice(("", "org/", "org/deep/", "other org/"))
                name = f"{folder}model{self._named}"
            self._users[name] = _TAKEN
        return name

    def take_names(self, names: list[str]) -> None:
        """Take names that nobody can have."""
        with self._lock:
            self._users.update(dict.fromkeys(names, _TAKEN))

    def give_back(self, names: list[str]) -> None:
        """Let others have what was taken."""
        with self._lock:
            for name in names:
                del self._users[name]

    @contextmanager
    def shared(self, chosen: random.Random) -> Iterator[tuple[str, Version] | None]:
        """Use a model that stays as it is meanwhile; None if there is none."""
        with self._lock:
            free = sorted(name for name in self._models if self._users.get(name) != _TAKEN)
            name = chosen.choice(free) if free else None
            if name is not None:
                self._users[name] = self._users.get(name, 0) + 1
                version = self._models[name]
        if name is None:
            yield None
            return
        try:
            yield name, version
        finally:
            with self._lock:
                self._users[name] -= 1

    def set(self, name: str, version: Version | None) -> None:
        """Say what a model is now; None if it is no more."""
        with self._lock:
            old = self._models.pop(name, None)
            if version is not None:
                version.users += 1
                self._models[name] = version
            else:
                self._former.append(name)
            if old is not None:
                old.users -= 1
        self._sweep(old)

    def keep(self, version: Version) -> None:
        """Keep the files of a version until `drop`."""
        with self._lock:
            version.users += 1

    def drop(self, version: Version) -> None:
        """Give up a version; its files go with its last user."""
        with self._lock:
            version.users -= 1
        self._sweep(version)

    def _sweep(self, version: Version | None) -> None:
        if version is not None and version.users == 0:
            version.remove()
