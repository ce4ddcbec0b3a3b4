"""Pictures and recordings from a path, bytes or a dataset's cell: decoded when they are needed, checked before."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_fast.errors import DataError, UnsupportedError, fail

if TYPE_CHECKING:
    from datasets import Dataset

END_OF_JPEG = b"\xff\xd9"
TAIL = 4096


def _opened(value: Any) -> Any:
    """A path, or a file of the bytes."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    return io.BytesIO(value) if isinstance(value, bytes) else value


def name(value: Any) -> str:
    """What a message calls it: the file's name without its folders."""
    if isinstance(value, dict):
        value = value.get("path") or "encoded in the row"
    return Path(value).name if isinstance(value, str | Path) else type(value).__name__


def load_image(value: Any) -> Any:
    """A PIL image in RGB, turned as its EXIF says; of a path, bytes, {"bytes", "path"} or an image."""
    from PIL import Image, ImageOps

    try:
        picture = value if isinstance(value, Image.Image) else Image.open(_opened(value))
        return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        fail(DataError, f"{name(value)}: {error}", "an image that can be read", "replace or remove the file", error)


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the wheel without its libsndfile
        fail(UnsupportedError, "a recording", "the package soundfile", "pip install 'peft_fast[train]'", error)
    return soundfile


def load_audio(value: Any, rate: int, max_seconds: float | None = None) -> np.ndarray:
    """(samples,) float32 at ``rate`` per second, channels averaged; no more than ``max_seconds`` of it.

    Of a path, bytes, {"bytes", "path"}, or what a dataset decodes to, {"array", "sampling_rate"}.
    """
    if isinstance(value, dict) and value.get("array") is not None:
        sound, given = np.asarray(value["array"], dtype=np.float32), int(value["sampling_rate"])
        sound = sound if sound.ndim == 1 else sound.mean(-1 if sound.shape[-1] < sound.shape[0] else 0)
        sound = sound[: int(max_seconds * given)] if max_seconds else sound
    else:
        soundfile = _soundfile()
        try:
            with soundfile.SoundFile(_opened(value)) as file:
                given = file.samplerate
                frames = int(max_seconds * given) if max_seconds else -1
                sound = file.read(frames, dtype="float32", always_2d=True).mean(1)
        except (soundfile.SoundFileError, OSError, RuntimeError) as error:
            fail(DataError, f"{name(value)}: {error}", "a recording that can be read", "replace or remove it", error)
    if given != rate and len(sound):
        from scipy.signal import resample_poly

        shared = int(np.gcd(given, rate))
        sound = resample_poly(sound, rate // shared, given // shared)
    return np.ascontiguousarray(sound, dtype=np.float32)


def encoded(value: Any) -> bytes:
    """A PIL image, or {"array", "sampling_rate"}, as the bytes of a file that holds all of it."""
    file = io.BytesIO()
    if isinstance(value, dict):
        rate = int(value["sampling_rate"])
        _soundfile().write(file, np.asarray(value["array"], dtype=np.float32), rate, format="WAV", subtype="FLOAT")
    else:
        (value if value.mode in ("1", "L", "RGB", "RGBA") else value.convert("RGB")).save(file, "PNG")
    return file.getvalue()


def audio_seconds(value: Any) -> float:
    """Length of a recording, from its head alone."""
    if isinstance(value, dict) and value.get("array") is not None:
        return len(value["array"]) / value["sampling_rate"]
    found = _soundfile().info(_opened(value))
    return found.frames / found.samplerate


def cells(rows: Dataset, role: str) -> Iterator[Any]:
    """The cells of a column, a few at a time: they may hold whole files."""
    for batch in rows.select_columns([role]).iter(256):
        yield from batch[role]


def wrong(rows: Dataset, role: str, holds: str) -> dict[int, tuple[str, str]]:
    """place -> (file, why it cannot be used); a cut file is found, and only files that may be cut are decoded."""
    look = _wrong_image if holds == "image" else _wrong_audio
    found: dict[int, tuple[str, str]] = {}
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(rows), 256):
            values = rows.select_columns([role])[start : start + 256][role]
            for place, (value, reason) in enumerate(zip(values, pool.map(look, values), strict=True), start):
                if reason:
                    found[place] = (name(value), reason)
    return found


def _wrong_image(value: Any) -> str | None:
    from PIL import Image

    if isinstance(value, Image.Image):
        return None
    try:
        opened = _opened(value)
        raw = opened.getvalue() if isinstance(opened, io.BytesIO) else Path(opened).read_bytes()
        with Image.open(io.BytesIO(raw)) as picture:
            if picture.format == "JPEG" and END_OF_JPEG in raw[-TAIL:]:
                return None
            if picture.format == "PNG":
                picture.verify()  # every chunk has a checksum
                return None if b"IEND" in raw[-TAIL:] else "cut off"
            picture.load()
    except Exception as error:  # decoders raise what they like on broken bytes
        return _reason(error)
    return None


def _wrong_audio(value: Any) -> str | None:
    if isinstance(value, dict) and value.get("array") is not None:
        return None if len(value["array"]) else "no sound, 0 seconds"
    try:
        return None if audio_seconds(value) > 0 else "no sound, 0 seconds"
    except UnsupportedError:
        raise
    except Exception as error:  # as above
        return _reason(error)


def _reason(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "cannot identify" in text:
        return "no image of a known format"
    return text.partition(": ")[2] or text if text.startswith("Error opening") else text


def digests(parts: Sequence[Dataset], role: str, whole: bool = False) -> list[list[str]]:
    """Of each row's file, in all of the parts, a digest of its bytes.

    If not ``whole``, a file whose size no other has is not read: its size tells it from them.
    """
    counted = None if whole else Counter(_size(cell) for part in parts for cell in cells(part, role))
    return [[_digest(cell, counted) for cell in cells(part, role)] for part in parts]


def _size(cell: Any) -> int:
    try:
        opened = _opened(cell)
        return len(opened.getvalue()) if isinstance(opened, io.BytesIO) else Path(opened).stat().st_size
    except (OSError, TypeError):
        return -1


def _digest(cell: Any, counted: Counter | None) -> str:
    size = _size(cell)
    if size < 0:
        return repr(cell)
    if counted and counted[size] == 1:
        return str(size)
    opened = _opened(cell)
    raw = opened.getvalue() if isinstance(opened, io.BytesIO) else Path(opened).read_bytes()
    return hashlib.blake2b(raw, digest_size=16).hexdigest()
