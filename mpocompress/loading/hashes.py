"""By what files are known again: their SHA-256, as `sha256sum` has it."""

import hashlib
from collections.abc import Iterable
from pathlib import Path


def file_sha256(path: Path) -> str:
    """Of one file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listing_sha256(paths: Iterable[Path]) -> str:
    """Of the listing that `sha256sum` prints for several files, in the order of their names."""
    listing = "".join(f"{file_sha256(p)}  {p.name}\n" for p in sorted(paths, key=lambda p: p.name))
    return hashlib.sha256(listing.encode()).hexdigest()
