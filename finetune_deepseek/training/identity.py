"""What tells a model from others, and from itself after more training: by all files that decide what it does."""

import hashlib
import os
from pathlib import Path

from .saved import ADAPTER_FILE, CONFIG_FILE, RECORD_FILE, Saved

# Not what runs write beside a model: results, cards, the state of training, outputs with names of a user's choice.
FILES = (
    *(CONFIG_FILE, ADAPTER_FILE, RECORD_FILE, "generation_config.json", "catalogue/*.json", "image_tokens/*"),
    *("*tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.jinja"),
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "adapter_model.bin", "*.py"),
)
WHOLE_BYTES, PARTS, PART_BYTES = 2**28, 64, 2**20  # larger files are read in parts only, evenly spread


def identity(saved: Saved) -> str:
    """SHA-256 of the files of a model or adapter and of an adapter's base; the commit stands for a Hub id's.

    It is the same wherever the folder lies. Of weights larger than 256 MB a part is read.
    """
    if saved.commit:
        return hashlib.sha256(f"{saved.name}@{saved.commit}".encode()).hexdigest()
    digest = hashlib.sha256()
    for path in sorted({path for pattern in FILES for path in saved.folder.glob(pattern) if path.is_file()}):
        digest.update(f"{path.name} {path.stat().st_size} ".encode() + content_of(path))
    digest.update(identity(saved.base).encode() if saved.base else b"")
    return digest.hexdigest()


def content_of(path: Path) -> bytes:
    """32 bytes for what is in a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").digest()
        for part in range(PARTS):
            file.seek((size - PART_BYTES) * part // (PARTS - 1))
            digest.update(file.read(PART_BYTES))
    return digest.digest()
