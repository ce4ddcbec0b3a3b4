"""Who else watches a run: the Trainer's own callbacks for W&B, TensorBoard and the like, named by report_to."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft_fast.errors import SettingsError, UnsupportedError, fail
from peft_fast.recipes.config import Config, near

BOARD = "tensorboard"


def check(name: str) -> None:
    """Refuses a name of report_to that transformers does not know, or whose package is not here."""
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK as KNOWN

    if name not in KNOWN:
        given, need = f"report_to: {name}{near(name, KNOWN)}", f"of {', '.join(sorted(KNOWN))}"
        fail(SettingsError, given, need, "correct it or leave it out")
    if name not in get_available_reporting_integrations():
        do = f"run `pip install {name}`"
        fail(UnsupportedError, f"report_to: {name}", f"the package of {name}: {do}", do)


def named(config: Config) -> list[str] | str:
    """What TrainingArguments makes callbacks of; TensorBoard's is `board`'s."""
    return [name for name in config.report_to if name != BOARD] or "none"


def board(folder: Path) -> Any:
    """TensorBoard's callback, with its files in ``folder`` rather than among the checkpoints."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        fail(UnsupportedError, "report_to: tensorboard", "TensorBoard", "run `pip install tensorboard`", error)
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(log_dir=str(folder)))


@contextlib.contextmanager
def closed(config: Config) -> Iterator[None]:
    """A run of W&B that training opens inside ends with it, or the next training would go on in it.

    One that was open before is its owner's.
    """
    wandb = sys.modules.get("wandb") if "wandb" in config.report_to else None
    if wandb is None or wandb.run is not None:
        yield
        return
    failed = True
    try:
        yield
        failed = False
    except Exception as error:
        failed = not _pruned(error)
        raise
    finally:
        if wandb.run is not None:
            wandb.finish(exit_code=int(failed))


def _pruned(error: Exception) -> bool:
    """Is it how a search ends a trial that is not worth going on with?"""
    optuna = sys.modules.get("optuna")
    return optuna is not None and isinstance(error, optuna.TrialPruned)
