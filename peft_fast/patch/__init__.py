"""Which PEFT layers take the fast path, and how that is switched on, counted and undone."""

from peft_fast.patch.known import forward_known
from peft_fast.patch.merging import merged
from peft_fast.patch.summary import Report, report
from peft_fast.patch.switch import accelerate, disable, disabled, enable, restore

__all__ = ["Report", "accelerate", "disable", "disabled", "enable", "forward_known", "merged", "report", "restore"]
