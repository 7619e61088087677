"""The capture file: an archive of tensors, plain containers and one JSON string.

NOTE on the layout. ``torch.save`` of one dictionary:

- ``nanhunt_capture``: format version, an integer.
- ``meta``: JSON: step, environment, target, what was seen, and a checksum for each tensor by its path.
- ``payload``: nested dicts, lists and tensors: ``batches`` and ``control`` (what the loop handed over), ``calls`` (the
  model's own inputs and the gradients of its outputs), ``model`` (parameters and buffers), ``optimizer`` (its state
  dict), ``rng``, ``buffers_before`` (buffers as they were before the step's first forward).

Nothing in it is code: it always loads with ``weights_only=True``, and a file that does not is refused.

The legacy form is a dictionary of ``windows``, ``labels`` and ``global_step``: a batch only.
"""

import hashlib
import json
import os
import pickle
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanhunt.errors import CaptureError

FORMAT_VERSION = 1

_PLAIN = (str, int, float, bool, bytes, type(None), torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True)
class Capture:
    """One saved step.

    Attributes:
        path: Where it was read from; None for one that was not written yet.
        meta: Step, environment, target, what was seen.
        payload: Tensors in plain containers; see the NOTE of this module.
        is_legacy: Whether the file holds a batch only.
    """

    meta: dict[str, Any]
    payload: dict[str, Any]
    path: Path | None = None
    is_legacy: bool = False

    @property
    def step(self) -> int:
        """Optimizer step, from 0."""
        return int(self.meta["step"])

    @property
    def batches(self) -> list[Any]:
        """What the loop handed over since the last optimizer step, one entry per micro-step."""
        return list(self.payload.get("batches", []))

    @property
    def has_state(self) -> bool:
        """Whether weights are inside."""
        return "model" in self.payload


def plain(value: Any, path: str = "") -> Any:
    """The same structure in dicts, lists and CPU tensors that are free of code and of shared, larger memory.

    Raises:
        CaptureError: If a leaf is neither a tensor nor plain data.
    """
    if isinstance(value, Tensor):
        return (
            value.detach().to("cpu", copy=True).contiguous() if value.layout is torch.strided else value.detach().cpu()
        )
    if isinstance(value, Mapping):
        return {key: plain(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(plain(item, f"{path}.{position}") for position, item in enumerate(value))
    if isinstance(value, list | set | frozenset):
        return [plain(item, f"{path}.{position}") for position, item in enumerate(value)]
    if isinstance(value, _PLAIN):
        return value
    if hasattr(value, "__array__"):
        return torch.as_tensor(value).clone()
    raise CaptureError(f"cannot store a {type(value).__name__} at {path.lstrip('.') or 'the top'}")


def tensor_paths(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a nest of plain containers with its dotted path."""
    if isinstance(value, Tensor):
        yield path.lstrip("."), value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensor_paths(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            yield from tensor_paths(item, f"{path}.{position}")


def checksum(tensor: Tensor) -> str:
    """BLAKE2b-128 of the tensor's bytes in C order, dtype and shape; '' where there is no single block."""
    if tensor.layout is not torch.strided:
        return ""
    digest = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16)
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_capture(capture: Capture, folder: Path) -> Path:
    """Writes ``bad_batch_{step:06d}.pt``, whole or not at all, and never over another file.

    Returns:
        The path: with a ``-1``, ``-2`` suffix where the name was taken.

    Raises:
        CaptureError: If the folder cannot be made or written, or the disk is full.
    """
    meta = dict(capture.meta)
    meta["checksums"] = {path: checksum(tensor) for path, tensor in tensor_paths(capture.payload)}
    content = {"nanhunt_capture": FORMAT_VERSION, "meta": json.dumps(meta), "payload": capture.payload}
    temporary = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".nanhunt-", suffix=".tmp", delete=False) as file:
            temporary = file.name
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        return _publish(temporary, folder / f"bad_batch_{capture.step:06d}.pt")
    except (OSError, RuntimeError) as error:
        raise CaptureError(
            f"cannot write the capture to {folder}: {error}", help="check free space and rights"
        ) from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def _publish(temporary: str, wanted: Path) -> Path:
    """Gives the finished file its name; a hard link fails where the name is taken, so nothing is ever overwritten."""
    for attempt in range(10_000):
        path = wanted if attempt == 0 else wanted.with_stem(f"{wanted.stem}-{attempt}")
        try:
            os.link(temporary, path)
        except FileExistsError:
            continue
        except OSError:
            # A file system without hard links: create the name exclusively, then replace it.
            try:
                path.open("xb").close()
            except FileExistsError:
                continue
            Path(temporary).replace(path)
        _flush_folder(path.parent)
        return path
    raise CaptureError(f"10,000 captures of this step are in {wanted.parent} already", help="clear the folder")


def _flush_folder(folder: Path) -> None:
    """Makes the new name survive a power cut, where the system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_capture(path: str | Path) -> Capture:
    """Reads a capture, current or legacy.

    Raises:
        CaptureError: If there is no such file, it is damaged, holds code, is no capture, or its format is newer.
    """
    path = Path(path)
    content = load_archive(path)
    if not isinstance(content, dict):
        raise CaptureError(f"{path} is not a capture: it holds a {type(content).__name__}")
    if "nanhunt_capture" in content:
        return _read_current(path, content)
    if {"windows", "labels"} <= set(content) and isinstance(content["windows"], Tensor):
        return _read_legacy(path, content)
    keys = ", ".join(sorted(str(key) for key in content)[:5])
    raise CaptureError(
        f"{path} is not a capture: it holds {keys or 'nothing'}", help="a capture is written by nanhunt.watch"
    )


def load_archive(path: Path) -> Any:
    """The content of a ``torch.save`` file that holds no code, with one-line errors.

    Raises:
        CaptureError: If the file is missing, damaged, compressed, or needs unpickling of more than plain data.
    """
    if not path.exists():
        raise CaptureError(f"no such file: {path}")
    if path.is_dir():
        raise CaptureError(f"{path} is a folder", help="name one of the files in it")
    _check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CaptureError(
            f"{path} holds code or objects, not only tensors and plain data; refused without running it",
            help="a capture is written by nanhunt.watch; a checkpoint must load with weights_only=True",
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, TypeError, AttributeError) as error:
        raise CaptureError(f"{path} is damaged: {str(error).splitlines()[0]}") from error


def _check_archive(path: Path) -> None:
    """Refuses what is not a whole, uncompressed zip archive, before anything in it is interpreted."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile as error:
        whole = "an archive written by torch.save"
        start = path.open("rb").read(2)
        what = f"truncated or damaged: it begins like {whole} but has no end" if start == b"PK" else f"not {whole}"
        raise CaptureError(f"{path} is {what}", help="copy it again from where it was written") from error
    except OSError as error:
        raise CaptureError(f"cannot read {path}: {error.strerror}") from error
    # torch.save never compresses; a compressed entry could unfold to any size.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CaptureError(f"{path} is not written by torch.save: it has compressed entries")


def _read_current(path: Path, content: dict[str, Any]) -> Capture:
    version = content["nanhunt_capture"]
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CaptureError(
            f"{path} has capture format {version}; this nanhunt reads up to {FORMAT_VERSION}", help="update nanhunt"
        )
    try:
        meta, payload = json.loads(content["meta"]), content["payload"]
        checksums, _ = meta.pop("checksums"), meta["step"]
        tensors = dict(tensor_paths(payload))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CaptureError(f"{path} is damaged: its description cannot be read") from error
    damaged = [name for name, tensor in tensors.items() if checksums.get(name) != checksum(tensor)]
    missing = sorted(set(checksums) - set(tensors))
    if damaged or missing:
        raise CaptureError(f"{path} is damaged: the checksum of {(damaged + missing)[0]} does not match its values")
    return Capture(meta, payload, path)


def _read_legacy(path: Path, content: dict[str, Any]) -> Capture:
    step = content.get("global_step", 0)
    meta = {"step": int(step) if isinstance(step, int | float | Tensor) else 0}
    batch = {"windows": content["windows"], "labels": content["labels"]}
    return Capture(meta, {"batches": [batch]}, path, is_legacy=True)
