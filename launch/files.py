"""Files that are whole or not there."""

from __future__ import annotations

from pathlib import Path


def save(path: Path, content: str | bytes) -> None:
    """Writes beside the target, then renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)
