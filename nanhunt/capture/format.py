"""The capture file: an archive of tensors, plain containers and one JSON string.

NOTE on the layout. ``torch.save`` of one dictionary:

- ``nanhunt_capture``: format version, an integer.
- ``checksum``: of ``meta`` and of everything in ``payload`` but the tensors' values.
- ``meta``: JSON: step, environment, target, what was seen, and a checksum for each tensor by its path.
- ``payload``: nested dicts, lists and tensors: ``batches`` and ``control`` (what the loop handed over), ``calls`` (the
  model's own inputs and the gradients of its outputs), ``model`` (parameters and buffers), ``optimizer`` (its state
  dict), ``rng``, ``buffers_before`` (buffers as they were before the step's first forward).

Nothing in it is code: it always loads with ``weights_only=True``, and a file that does not is refused.

The legacy form is a dictionary of ``windows``, ``labels`` and ``global_step``: a batch only.
"""

import contextlib
import hashlib
import json
import os
import pickle
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanhunt.errors import CaptureError, first_line

FORMAT_VERSION = 1

_COPY_AGAIN = "copy it again from where it was written"
_AS_IS = (bool, type(None), torch.dtype, torch.device)

# A subclass (an enum, a NumPy scalar) would be stored as a reference to its class, which is code.
_EXACT: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
    (bytes, bytes.__bytes__),
)


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
        CaptureError: If a leaf or a key is neither a tensor nor plain data, or a tensor has no values to copy.
    """
    if isinstance(value, Tensor):
        return _plain_tensor(value, path)
    if isinstance(value, Mapping):
        return {_plain_key(key, path): plain(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(plain(item, f"{path}.{position}") for position, item in enumerate(value))
    if isinstance(value, list | set | frozenset):
        return [plain(item, f"{path}.{position}") for position, item in enumerate(value)]
    if hasattr(value, "__array__") and not isinstance(value, np.generic):
        return _plain_array(value, path)
    return _plain_leaf(value, path)


def _plain_tensor(value: Tensor, path: str) -> Tensor:
    try:
        source = value.detach()
        whole = (source if type(source) is Tensor else source.as_subclass(Tensor)).to("cpu", copy=True)
        if whole.layout is torch.strided:
            whole = whole.resolve_conj().resolve_neg().contiguous()
    except (RuntimeError, TypeError) as error:
        raise _cannot_store(value, path, error) from error
    if type(whole) is not Tensor:
        raise _cannot_store(value, path)
    return whole


def _plain_array(value: Any, path: str) -> Tensor:
    try:
        array = np.array(value, order="C")
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except (RuntimeError, TypeError, ValueError) as error:
        raise _cannot_store(value, path, error) from error


def _plain_key(key: Any, path: str) -> Any:
    if isinstance(key, tuple):
        return tuple(_plain_key(item, path) for item in key)
    return _plain_leaf(key, f"{path}.{key}")


def _plain_leaf(value: Any, path: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, _AS_IS):
        return value
    for kind, exact in _EXACT:
        if isinstance(value, kind):
            return exact(value)
    raise _cannot_store(value, path)


def _cannot_store(value: Any, path: str, error: Exception | None = None) -> CaptureError:
    reason = f": {first_line(error)}" if error is not None else ""
    return CaptureError(f"cannot store a {type(value).__name__} at {path.lstrip('.') or 'the top'}{reason}")


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
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().reshape(-1)
    if flat.stride(0) != 1:
        # A single element counts as contiguous whatever its stride; `view` wants 1.
        flat = flat.clone(memory_format=torch.contiguous_format)
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _checksums(payload: Any) -> dict[str, str]:
    """The checksum of each tensor by its path; those of paths that read alike are joined."""
    found: dict[str, str] = {}
    for path, tensor in tensor_paths(payload):
        found[path] = found.get(path, "") + checksum(tensor)
    return found


def _description_checksum(meta: str, payload: Any) -> str:
    """BLAKE2b-128 of the JSON text and of the payload without the tensors' values."""
    return hashlib.blake2b(f"{meta}\n{_outline(payload)}".encode(), digest_size=16).hexdigest()


def _outline(value: Any) -> str:
    if isinstance(value, Tensor):
        return "tensor"
    if isinstance(value, Mapping):
        return f"dict({', '.join(f'{key!r}: {_outline(item)}' for key, item in value.items())})"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({', '.join(_outline(item) for item in value)})"
    return repr(value) if isinstance(value, (*_AS_IS, str, int, float, bytes, torch.Size)) else type(value).__name__


def write_capture(capture: Capture, folder: Path) -> Path:
    """Writes ``bad_batch_{step:06d}.pt``, whole or not at all, and never over another file.

    Returns:
        The path: with a ``-1``, ``-2`` suffix where the name was taken.

    Raises:
        CaptureError: If the folder cannot be made or written, or the disk is full.
    """
    try:
        meta = json.dumps({**capture.meta, "checksums": _checksums(capture.payload)})
    except (TypeError, ValueError) as error:
        raise CaptureError(f"cannot store the description of the step: {first_line(error)}") from error
    content = {
        "nanhunt_capture": FORMAT_VERSION,
        "meta": meta,
        "checksum": _description_checksum(meta, capture.payload),
        "payload": capture.payload,
    }
    # Opened by hand: a file of `tempfile` can be read by its owner alone, whatever the umask says.
    temporary = folder / f".nanhunt-{uuid.uuid4().hex}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        return _publish(temporary, folder / f"bad_batch_{capture.step:06d}.pt")
    except (OSError, RuntimeError, AttributeError, TypeError, pickle.PicklingError) as error:
        raise CaptureError(
            f"cannot write the capture to {folder}: {_reason(error)}", help="check free space and rights"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _reason(error: BaseException) -> str:
    """What the system said, where it said something; torch reports a full disk as a position it did not expect."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return first_line(error)


def _publish(temporary: Path, wanted: Path) -> Path:
    """Gives the finished file its name; a hard link fails where the name is taken, so nothing is ever overwritten."""
    for attempt in range(10_000):
        path = wanted if attempt == 0 else wanted.with_stem(f"{wanted.stem}-{attempt}")
        try:
            os.link(temporary, path)
        except FileExistsError:
            continue
        except OSError:
            if not _rename(temporary, path):
                continue
        _flush_folder(path.parent)
        return path
    raise CaptureError(f"10,000 captures of this step are in {wanted.parent} already", help="clear the folder")


def _rename(temporary: Path, path: Path) -> bool:
    """For a file system without hard links: takes the name exclusively, then replaces it; False where it is taken."""
    try:
        path.open("xb").close()
    except FileExistsError:
        return False
    try:
        temporary.replace(path)
    except OSError:
        path.unlink()
        raise
    return True


def _flush_folder(folder: Path) -> None:
    """Makes the new name survive a power cut, where the system can; the file itself is on the disk already."""
    with contextlib.suppress(OSError):
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
    _check_file(path)
    _check_archive(path)
    try:
        with warnings.catch_warnings():
            # What torch warns of here is how the file was written, which the reader of this file cannot change.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CaptureError(
            f"{path} holds code or objects, not only tensors and plain data; refused without running it",
            help="a capture is written by nanhunt.watch; a checkpoint must load with weights_only=True",
        ) from error
    # These are a stranger's bytes: whatever they make the parser raise means the same.
    except Exception as error:
        raise CaptureError(f"{path} is damaged: {first_line(error)}") from error


def _check_file(path: Path) -> None:
    """Refuses what is no file with something in it."""
    try:
        if not path.exists():
            raise CaptureError(f"no such file: {path}")
        if path.is_dir():
            raise CaptureError(f"{path} is a folder", help="name one of the files in it")
        if not path.is_file():
            raise CaptureError(f"{path} is no regular file", help="save what comes from a pipe to a file first")
        if path.stat().st_size == 0:
            raise CaptureError(f"{path} is empty", help=_COPY_AGAIN)
    except OSError as error:
        raise CaptureError(f"cannot read {path}: {error.strerror or first_line(error)}") from error


def _check_archive(path: Path) -> None:
    """Refuses what is not a whole, uncompressed zip archive, before anything in it is interpreted."""
    try:
        with path.open("rb") as file:
            start = file.read(2)
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except OSError as error:
        raise CaptureError(f"cannot read {path}: {error.strerror or first_line(error)}") from error
    except Exception as error:
        whole = "an archive written by torch.save"
        what = f"truncated or damaged: it begins like {whole} but has no end" if start == b"PK" else f"not {whole}"
        raise CaptureError(f"{path} is {what}", help=_COPY_AGAIN) from error
    # torch.save never compresses; a compressed entry could unfold to any size.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CaptureError(f"{path} is not written by torch.save: it has compressed entries")
    # torch.load leaves the memory of an entry that is marked as a folder (0x10) as it finds it.
    if any(entry.external_attr & 0x10 for entry in entries):
        raise CaptureError(f"{path} is damaged: an entry is marked as a folder", help=_COPY_AGAIN)


def _read_current(path: Path, content: dict[str, Any]) -> Capture:
    version = content["nanhunt_capture"]
    if type(version) is int and version > FORMAT_VERSION:
        raise CaptureError(
            f"{path} has capture format {version}; this nanhunt reads up to {FORMAT_VERSION}", help="update nanhunt"
        )
    unreadable = CaptureError(f"{path} is damaged: its description cannot be read", help=_COPY_AGAIN)
    try:
        meta, payload = json.loads(content["meta"]), content["payload"]
        is_whole = content.get("checksum") in (None, _description_checksum(content["meta"], payload))
        checksums = meta.pop("checksums")
        found = _checksums(payload)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise unreadable from error
    if type(version) is not int or not is_whole or not _is_well_formed(meta, payload, checksums):
        raise unreadable
    differing = [name for name in [*found, *checksums] if checksums.get(name) != found.get(name)]
    if differing:
        raise CaptureError(
            f"{path} is damaged: the checksum of {differing[0]} does not match its values", help=_COPY_AGAIN
        )
    return Capture(meta, payload, path)


def _is_well_formed(meta: Any, payload: Any, checksums: Any) -> bool:
    """Whether what every reader of a capture relies on is there."""
    if not isinstance(meta, dict) or not isinstance(payload, dict) or not isinstance(checksums, dict):
        return False
    if type(meta.get("step")) is not int or not isinstance(meta.get("target"), dict | None):
        return False
    if not all(isinstance(payload.get(key, []), list) for key in ("batches", "control", "calls")):
        return False
    model = payload.get("model", {})
    return isinstance(model, dict) and all(isinstance(value, Tensor) for value in model.values())


def _read_legacy(path: Path, content: dict[str, Any]) -> Capture:
    step = 0
    with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):
        step = int(content.get("global_step", 0))
    meta = {"step": step}
    batch = {"windows": content["windows"], "labels": content["labels"]}
    return Capture(meta, {"batches": [batch]}, path, is_legacy=True)
