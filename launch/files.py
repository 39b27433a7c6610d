"""Files that are whole or not there."""

from __future__ import annotations

from pathlib import Path


def check_folder(word: str, path: str | None) -> None:
    """Raises ValueError where `path`, given as `word`, is something else than a folder or nothing."""
    if path == "":
        raise ValueError(f"{word}= is empty: name a folder, such as {word}=results")
    if path is not None and Path(path).exists() and not Path(path).is_dir():
        raise ValueError(f"{word}={path} is a file: name a folder")


def save(path: Path, content: str | bytes) -> None:
    """Writes beside the target, then renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)
