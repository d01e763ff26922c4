"""The files of a public dataset: found in a folder or on the system, or downloaded."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dask_isgd.errors import DataError

_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files of a dataset, and how to get them.

    ``files`` maps names to the SHA-256 that was published; ``limit`` is the largest download in bytes.
    """

    name: str
    files: Mapping[str, str]
    base_url: str | None = None
    """None: nothing is downloaded."""
    limit: int = 0
    variable: str
    """Environment variable that may name a folder with the files."""
    folders: tuple[str, ...] = ()
    """Folders that are searched before anything is downloaded."""
    advice: str = ""
    """Another way to get the files."""

    def find(self, folder: str | Path | None = None) -> dict[str, Path]:
        """Return a path for every file.

        Files are in ``folder``, else in the folder that the environment names, else in a known folder, else they are
        downloaded. In a folder a file may be with or without ``.gz``. Only downloads are checked against their
        SHA-256, because packagers may have compressed the same content again.
        """
        named = folder or os.environ.get(self.variable)
        if named:
            found = self._in(Path(named))
            missing = sorted(self.files.keys() - found.keys())
            if missing:
                raise DataError(
                    f"{self.name}: got no {', '.join(missing)} in {str(named)!r}, wanted {len(self.files)} files; "
                    f"{self._advice()}"
                )
            return found
        for known in self.folders:
            found = self._in(Path(known))
            if found.keys() == self.files.keys():
                return found
        return {name: self._download(name) for name in self.files}

    def _in(self, folder: Path) -> dict[str, Path]:
        names = {name: (name, name.removesuffix(".gz")) for name in self.files}
        there = {name: [folder / n for n in either if (folder / n).is_file()] for name, either in names.items()}
        return {name: paths[0] for name, paths in there.items() if paths}

    def _download(self, name: str) -> Path:
        import pooch

        if self.base_url is None:
            raise DataError(f"{self.name}: {name} is not on this machine; {self._advice()}")
        url = f"{self.base_url}/{name}"
        try:
            path = pooch.retrieve(
                url,
                known_hash=f"sha256:{self.files[name]}",
                fname=name,
                path=pooch.os_cache("dask_isgd") / self.name,
                downloader=self._fetch,
            )
        except (OSError, ValueError) as error:  # pooch raises ValueError if the hash differs
            reason = getattr(error, "reason", None) or error
            raise DataError(f"{self.name}: cannot download {url} ({reason}); {self._advice()}") from error
        return Path(path)

    def _fetch(self, url: str, output_file: str, _: Any) -> None:
        """Download a file for pooch: by https up to the last redirect, and at most ``limit`` bytes."""
        with urllib.request.urlopen(url, timeout=60) as reply, Path(output_file).open("wb") as file:
            if not reply.url.startswith("https://"):
                raise urllib.error.URLError(f"redirected to {reply.url}, wanted https")
            size = 0
            while block := reply.read(_BLOCK):
                size += len(block)
                if size > self.limit:
                    raise urllib.error.URLError(f"more than {self.limit:,} bytes")
                file.write(block)

    def _advice(self) -> str:
        folder = f"pass the folder that holds them (--from, source= or {self.variable}=)"
        return f"{folder} or {self.advice}" if self.advice else folder
