"""launch(kernel, …): Triton's own launch, but a kernel that was launched before is found by a key of ours.

Triton looks at every argument of every launch anew, which takes the host longer than a small layer takes the GPU.
"""

from __future__ import annotations

import torch
import triton

from peft_fast.kernels.device import INTERPRETED, target

# versions whose compiled kernels are known to take the arguments below; others launch Triton's own way
KNOWN = triton.__version__.startswith(("3.6.", "3.7.")) and not INTERPRETED
_compiled: dict[tuple, object] = {}


def launch(kernel, grid, operands, free, sizes, constants, tile, **options):
    """kernel[grid](*operands, *free, *sizes, *constants): the order of the kernel's parameters.

    ``free`` are the numbers that specialise nothing, such as M; ``constants`` are its constexpr parameters,
    ``options`` the compiler's own, always the same for a kernel.
    """
    args = (*operands, *free, *sizes, *constants)
    if KNOWN:
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        # all that Triton compiles different code for, and no less
        wide = max(free, default=0) >= 1 << 31
        key = (kernel.__name__, device, wide, sizes, constants, tile.num_warps, tile.num_stages, *map(_kind, operands))
        if isinstance(target().arch, str):
            key += tuple(map(_near, operands))
        if (found := _compiled.get(key)) is not None:
            stream, hooks = driver.get_current_stream(device), triton.knobs.runtime
            found.run(
                *grid,
                *(1, 1)[: 3 - len(grid)],
                stream,
                found.function,
                found.packed_metadata,
                found.launch_metadata(grid, stream, *args),
                hooks.launch_enter_hook,
                hooks.launch_exit_hook,
                *args,
            )
            return
    found = kernel[grid](*args, num_warps=tile.num_warps, num_stages=tile.num_stages, **options)
    if KNOWN and found is not None:
        _compiled[key] = found


def _kind(argument):
    """What a kernel is specialised for in a tensor, a number, None, a tuple or a descriptor (of a constant block)."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, tuple):
        return tuple(map(_kind, argument))
    return type(argument) if argument is None or isinstance(argument, float) else argument.base.dtype


def _near(argument):
    """Does Triton address this memory with 32 bits, as it does on AMD where the storage is small enough?"""
    if isinstance(argument, tuple):
        return tuple(map(_near, argument))
    tensor = getattr(argument, "base", argument)
    return isinstance(tensor, torch.Tensor) and tensor.untyped_storage().size() < 1 << 31
