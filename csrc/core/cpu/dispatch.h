// Run-time choice of the instruction set, so that one binary serves any x86-64 and is fast on a new one.
#pragma once

#include <cstdint>  // for __GLIBC__, where there is one

// Compiles a function, and by YOLONAS_DISPATCH all it calls, for each level of x86-64; the first call takes the best
// the CPU has. Results do not depend on it: the same operations run in wider registers, and none are contracted.
// The choice needs glibc's loader, and is made before a sanitizer is ready for it.
#if defined(YOLONAS_DISPATCH)
#elif defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define YOLONAS_DISPATCH __attribute__((flatten, target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define YOLONAS_DISPATCH
#endif
