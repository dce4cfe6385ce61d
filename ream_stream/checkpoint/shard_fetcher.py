"""Which shards of a streamed source are on the disk, and when.

A shard is fetched when the first layer needs it and deleted after the last one has; those
with tensors outside the layers stay from the beginning to the end. For a source that is on
the disk anyway nothing is fetched and nothing deleted.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from ream_stream import files

from .reader import Checkpoint


class ShardFetcher:
    """The shards of a source, layer by layer.

    Parameters
    ----------
    source
        What is read.
    layers
        Names of the tensors of each layer.
    outside
        Names of the others.
    """

    def __init__(
        self, source: Checkpoint, layers: Sequence[Iterable[str]], outside: Iterable[str]
    ) -> None:
        self._source = source
        self._always = self._files(outside)
        self._layers = [self._files(names) for names in layers]

    @property
    def peak_bytes(self) -> int:
        """Bytes of shards on the disk at most; 0 if they are there anyway."""
        if self._source.fetch is None:
            return 0
        size: dict[Path, int] = {}
        for entry in self._source.entries.values():
            size[entry.path] = max(entry.stop, size.get(entry.path, 0))
        return max(
            sum(size[path] for path in self._there(at)) for at in range(len(self._layers))
        )

    def fetch(self, layer: int) -> None:
        """Fetch the shards of a layer, and those with tensors outside the layers."""
        self._fetch(self._always | self._layers[layer])

    def fetch_outside(self) -> None:
        """Fetch the shards with tensors outside the layers."""
        self._fetch(self._always)

    def evict_after(self, layer: int) -> None:
        """Delete the shards that no later layer needs."""
        self._evict_all_but(self._always.union(*self._layers[layer + 1 :]))

    def evict_all(self) -> None:
        """Delete every shard that was fetched, and the folders of shards."""
        self._evict_all_but(set())
        if self._source.fetch is not None:
            for folder in {path.parent for path in self._source.files()}:
                files.remove(folder)

    def _fetch(self, needed: set[Path]) -> None:
        if self._source.fetch is not None:
            for path in sorted(needed):
                self._source.fetch(path)

    def _evict_all_but(self, needed: set[Path]) -> None:
        if self._source.fetch is not None:
            for path in sorted(set(self._source.files()) - needed):
                files.remove(path)

    def _there(self, at: int) -> set[Path]:
        """Return the shards on the disk while a layer is worked on."""
        seen = set[Path]().union(*self._layers[: at + 1])
        return self._always | self._layers[at] | (seen & set[Path]().union(*self._layers[at:]))

    def _files(self, names: Iterable[str]) -> set[Path]:
        return {self._source.entries[name].path for name in names}
