"""Settings: one frozen dataclass, and the only place that reads the environment.

| variable | field | default | meaning |
|---|---|---|---|
| PEFT_FAST_BACKEND | backend | auto | auto, reference, torch, cpu, triton or cuda |
| PEFT_FAST_ISA | isa | auto | auto, portable, avx2, avx512, avx512_bf16 or amx: the most a CPU kernel may use |
| PEFT_FAST_PACK_MB | pack_mb | 0 | MiB for frozen weights kept in the order the CPU tiles read them; 0 = never |
| PEFT_FAST_EXACT | exact | 0 | 1: adapters of a patched model are computed in their own dtype, as PEFT does |
| PEFT_FAST_MIN_TOKENS | min_tokens | 128 | patched layers take a call from this many tokens on; fewer go to PEFT |
| PEFT_FAST_GROUPS | groups | 1 | 0: layers that read one x, as q, k and v do, run one by one |
| PEFT_FAST_BLOCKS | blocks | 1 | 0: the layers of an MLP block run one by one |
| PEFT_FAST_DISABLE | disable | 0 | 1: patched models run PEFT's own forward |
| PEFT_FAST_QUIET | quiet | 0 | 1: accelerate() and run print nothing |
| PEFT_FAST_LIBRARY | library | | another build of the compiled operators than the package's own |
| PEFT_FAST_CACHE | cache_dir | ~/.cache/peft_fast | downloads and tuning results |
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

from peft_fast.errors import SettingsError, fail

BACKENDS = ("auto", "reference", "torch", "cpu", "triton", "cuda")
ISAS = ("auto", "portable", "avx2", "avx512", "avx512_bf16", "amx")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything a user can set; see the module's table."""

    backend: str = "auto"
    isa: str = "auto"
    pack_mb: int = 0
    exact: bool = False
    min_tokens: int = 128
    groups: bool = True
    blocks: bool = True
    disable: bool = False
    quiet: bool = False
    library: Path | None = None
    cache_dir: Path = Path("~/.cache/peft_fast")

    def __post_init__(self) -> None:
        _one_of("backend", self.backend, BACKENDS)
        _one_of("isa", self.isa, ISAS)
        if self.pack_mb < 0:
            given, need = f"pack_mb={self.pack_mb}", "0 (never) or a number of MiB"
            fail(SettingsError, given, need, "unset PEFT_FAST_PACK_MB")
        if self.min_tokens < 0:
            given, need = f"min_tokens={self.min_tokens}", "0 (every call) or a number of tokens"
            fail(SettingsError, given, need, "unset PEFT_FAST_MIN_TOKENS")
        object.__setattr__(self, "cache_dir", Path(self.cache_dir).expanduser())


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        fail(
            SettingsError,
            f"{name}={value!r}",
            "one of " + ", ".join(allowed),
            f"set PEFT_FAST_{name.upper()} to one of these or unset it",
        )


def _bool(name: str, text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("", "0", "false", "no", "off"):
        return False
    fail(SettingsError, f"{name}={text!r}", "0 or 1", f"set {name} to 0 or 1, or unset it")


def _int(name: str, text: str, what: str) -> int:
    try:
        return int(text)
    except ValueError:
        fail(SettingsError, f"{name}={text!r}", "a whole number", f"set {name} to {what}, or unset it")


def from_env(env: Mapping[str, str]) -> Settings:
    """Settings from an environment; raises SettingsError naming the first variable that is wrong."""
    kinds = {
        "backend": str,
        "isa": str,
        "pack_mb": lambda text: _int("PEFT_FAST_PACK_MB", text, "a number of MiB"),
        "min_tokens": lambda text: _int("PEFT_FAST_MIN_TOKENS", text, "a number of tokens"),
        "exact": lambda text: _bool("PEFT_FAST_EXACT", text),
        "groups": lambda text: _bool("PEFT_FAST_GROUPS", text),
        "blocks": lambda text: _bool("PEFT_FAST_BLOCKS", text),
        "disable": lambda text: _bool("PEFT_FAST_DISABLE", text),
        "quiet": lambda text: _bool("PEFT_FAST_QUIET", text),
        "library": Path,
        "cache_dir": Path,
    }
    names = {field: "PEFT_FAST_" + ("CACHE" if field == "cache_dir" else field.upper()) for field in kinds}
    return Settings(**{field: kind(env[names[field]]) for field, kind in kinds.items() if env.get(names[field])})


def set_aside(env: MutableMapping[str, str] = os.environ) -> list[str]:
    """Drops the variables that hold no valid value, for doctor, which looks at all else -> what to do, one each."""
    wrong = []
    while True:
        try:
            from_env(env)
            return wrong
        except SettingsError as error:
            _, need, do = str(error).splitlines()
            name = next(name for name in env if name.startswith("PEFT_FAST_") and name in do)
            value = env.pop(name)
            wrong.append(f"{name}={value!r} is not valid, {need}: every command but this one refuses it; {do[4:]}")


_current: Settings | None = None


def get() -> Settings:
    """The settings in force; the environment is read at the first call."""
    global _current
    if _current is None:
        _current = from_env(os.environ)
    return _current


@contextlib.contextmanager
def override(**changes: object) -> Iterator[Settings]:
    """Settings with some fields changed, for the length of a ``with`` block."""
    global _current
    before = get()
    _current = dataclasses.replace(before, **changes)
    try:
        yield _current
    finally:
        _current = before
