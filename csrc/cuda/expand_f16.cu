#include "cuda/expand.cuh"

namespace peft_fast::cuda {
template void launch_expand<Half>(const Expand&, Stream);
}
