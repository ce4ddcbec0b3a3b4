"""What is done where a Triton kernel does not compile, fit or launch, for all ops alike."""

from __future__ import annotations

import torch

from peft_fast.backends.fallback import Fallback
from peft_fast.backends.triton import first_line, interpreting


def _judge(error):
    """Compilers and launches that fail are ours; exhausted memory, a vendor's GEMM, a broken device or a bug is not."""
    if type(error) is RuntimeError and "out of memory" in str(error):  # from Triton's loader
        raise torch.OutOfMemoryError(str(error)) from error
    from triton.runtime.errors import InterpreterError

    bugs = (InterpreterError, AssertionError) if interpreting() else ()
    if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError, *bugs)) or "CUBLAS" in str(error):
        raise error
    # what a stream refuses while it is captured may work on the next call
    return _what(error), not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _what(error):
    from triton.compiler.errors import CompilationError

    # a compilation error shows the source before it says what is wrong
    line = str(error).strip().splitlines()[-1] if isinstance(error, CompilationError) else first_line(error)
    return f"{type(error).__name__}: {line}"


guarded = Fallback("Triton", _judge)
