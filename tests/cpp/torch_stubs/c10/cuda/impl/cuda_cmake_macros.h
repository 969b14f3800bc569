// torch's build writes this header when it has CUDA; a CPU-only torch has all others and lacks this one.
#pragma once

#define C10_CUDA_BUILD_SHARED_LIBS
