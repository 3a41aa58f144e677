"""Which checkpoint a run goes on from: the last whole one, and what is wrong with one that isn't."""

import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ...data.files import read_json

STATE_FILE = "trainer_state.json"
TRAINING_FILES = (("optimizer.pt", "optimizer.bin"), ("scheduler.pt",))
NO_WAY_ON = ", as --save_only_model leaves; to begin anew with its weights, give it as --model_name_or_path"
READ_BYTES = 2**24  # at once
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def find_checkpoint(asked: str | None, folder: Path) -> str | None:
    """The checkpoint that --resume_from_checkpoint names; for `true` the last whole one in the output folder.

    Raises:
        ValueError: if the one that is named, or every one in the folder, is incomplete or damaged.
    """
    if not asked or asked.lower() == "false":
        return None
    if asked.lower() != "true":
        if fault := fault_of(Path(asked)):
            raise ValueError(f"--resume_from_checkpoint {asked}: {fault}.")
        return asked
    places = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    faults: dict[Path, str] = {}
    for path in sorted(places, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        fault = fault_of(path)
        if fault is None:
            for broken, reason in faults.items():
                print(f"passed over {broken}: {reason}")
            print(f"going on from {path}")
            return str(path)
        faults[path] = fault
    if faults:
        path, fault = next(iter(faults.items()))
        raise ValueError(
            f"--resume_from_checkpoint true: no whole checkpoint in {folder}; {path.name}: {fault}. To begin anew, "
            "add --overwrite_output_dir and leave this flag out."
        )
    print(f"no checkpoint in {folder} to go on from: the run begins at its first step")
    return None


def fault_of(folder: Path) -> str | None:
    """Why a run can't go on from a checkpoint, None if it can.

    torch's files are read whole and held against the checksums in them, which a run reads again to go on. Files of
    safetensors have none: their headers and lengths are looked at.
    """
    try:
        if read_json(folder / STATE_FILE) is None:  # Trainer writes it last
            return f"no checkpoint there (no {STATE_FILE}), or saving it was interrupted"
        indexes = [content for name in INDEX_FILES if (content := read_json(folder / name))]
    except ValueError as error:
        return str(error)
    for name in {file for index in indexes for file in index.get("weight_map", {}).values()}:
        if not (folder / name).is_file():
            return f"{folder / name} is missing"
    for path in sorted([*folder.glob("*.pt"), *folder.glob("*.pth"), *folder.glob("*.safetensors")]):
        if not _is_whole(path):
            return f"{path} is damaged"
    has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*"))
    parts = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("checkpoint-")]
    if parts:  # as FSDP and DeepSpeed write
        return None
    if not has_weights:
        return f"{folder} has no weights"
    # Trainer would begin both anew without a word.
    missing = [" or ".join(names) for names in TRAINING_FILES if not any((folder / name).is_file() for name in names)]
    return f"{folder} has no {', no '.join(missing)}{NO_WAY_ON}" if missing else None


def _is_whole(path: Path) -> bool:
    """Whether the parts of torch's zip file, or what a safetensors header promises, are there."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                return True
        with zipfile.ZipFile(path) as archive:
            for part in archive.infolist():
                with archive.open(part) as content:
                    while content.read(READ_BYTES):  # at the end the checksum is compared
                        pass
            return True
    except (SafetensorError, OSError, zipfile.BadZipFile):
        return False
