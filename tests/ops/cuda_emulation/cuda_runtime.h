// As much of CUDA as csrc/core/cuda needs to compile as plain C++ and to run on the CPU, so that the kernels' own
// source is tested where there is no GPU. Every CUDA thread is a fiber of one CPU thread. Blocks run one after the
// other in random order; within a block the order of the threads is drawn anew after every barrier, so that a missing
// barrier gives wrong results. A barrier or a warp function that some threads of the block or warp do not reach ends
// the program. Compile with -U_FORTIFY_SOURCE, whose longjmp refuses to go to another stack.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

inline std::mt19937 random{0};

constexpr unsigned kWarp = 32, kMostThreads = 1024;

struct Fiber {
    enum class State { Ready, AtBlockBarrier, AtWarpFunction, Done } state;
    dim3 index;
    int line;                              // of the barrier
    uint32_t given;                        // to the warp function
    std::array<uint32_t, kWarp> received;  // from the lanes of the warp
    jmp_buf resume;
    std::unique_ptr<char[]> stack;
};

inline std::vector<Fiber> fibers;
inline Fiber* current;
inline jmp_buf scheduler;
inline const std::function<void()>* body;

[[noreturn]] inline void fail(const char* what, int line) {
    std::printf("emulation: %s at line %d\n", what, line);
    std::exit(2);
}

// Back to the scheduler, until it resumes this fiber. _setjmp and _longjmp switch stacks without a system call.
inline void leave() {
    if (_setjmp(current->resume) == 0) _longjmp(scheduler, 1);
}

inline void resume(Fiber& fiber) {
    current = &fiber;
    threadIdx = fiber.index;
    if (_setjmp(scheduler) == 0) _longjmp(fiber.resume, 1);
}

inline void wait(Fiber::State state, int line) {
    current->state = state;
    current->line = line;
    leave();
}

inline void run_fiber() {  // one kernel after the other
    for (leave();; leave()) {
        (*body)();
        current->state = Fiber::State::Done;
    }
}

inline void make_fibers() {
    constexpr size_t kStack = 64 << 10;
    fibers.resize(kMostThreads);
    for (Fiber& fiber : fibers) {
        fiber.stack.reset(new char[kStack]);
        ucontext_t context;
        getcontext(&context);
        context.uc_stack.ss_sp = fiber.stack.get();
        context.uc_stack.ss_size = kStack;
        makecontext(&context, run_fiber, 0);
        current = &fiber;
        if (_setjmp(scheduler) == 0) setcontext(&context);
    }
}

// Lets every warp go on whose 32 lanes wait at one warp function. False where none does.
inline bool release_warps(unsigned threads) {
    bool released = false;
    for (unsigned first = 0; first < threads; first += kWarp) {
        const auto waits = [&](unsigned t) { return fibers[t].state == Fiber::State::AtWarpFunction; };
        const unsigned end = std::min(first + kWarp, threads);
        unsigned waiting = 0;
        std::array<uint32_t, kWarp> given{};
        for (unsigned t = first; t < end; ++t) {
            waiting += waits(t) && (waiting == 0 || fibers[t].line == fibers[first].line);
            given[t - first] = fibers[t].given;
        }
        if (waiting == 0) continue;
        if (waiting < kWarp) fail("some lanes did not reach the warp function", fibers[first].line);
        for (unsigned t = first; t < end; ++t) {
            fibers[t].received = given;
            fibers[t].state = Fiber::State::Ready;
        }
        released = true;
    }
    return released;
}

inline void run_block(unsigned threads) {
    std::vector<unsigned> order(threads);
    std::iota(order.begin(), order.end(), 0u);
    for (unsigned t = 0; t < threads; ++t) {
        fibers[t].state = Fiber::State::Ready;
        fibers[t].index = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y);
    }
    for (;;) {
        std::shuffle(order.begin(), order.end(), random);
        const auto awake = static_cast<uint32_t>(random());  // a bit for each warp: some run far ahead of others
        bool asleep = false;
        for (const unsigned t : order) {
            if (fibers[t].state != Fiber::State::Ready) continue;
            if (awake >> t / kWarp & 1)
                resume(fibers[t]);
            else
                asleep = true;
        }
        if (release_warps(threads) || asleep) continue;
        const auto done = [&](unsigned t) { return fibers[t].state == Fiber::State::Done; };
        if (std::all_of(order.begin(), order.end(), done)) return;
        for (const unsigned t : order) {
            if (done(t) || fibers[t].line != fibers[order[0]].line)
                fail("some threads did not reach the barrier", fibers[order[0]].line);
            fibers[t].state = Fiber::State::Ready;
        }
    }
}

inline void run(dim3 grid, dim3 block, const std::function<void()>& kernel) {
    const unsigned threads = block.x * block.y * block.z;
    if (threads == 0 || threads > kMostThreads || grid.x == 0) fail("wrong launch", 0);
    if (fibers.empty()) make_fibers();
    body = &kernel;
    gridDim = grid;
    blockDim = block;
    std::vector<unsigned> order(grid.x);
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), random);
    for (const unsigned b : order) {
        blockIdx = dim3(b, 0, 0);
        run_block(threads);
    }
}

inline const std::array<uint32_t, kWarp>& exchange(unsigned mask, uint32_t value, int line) {
    if (mask != 0xffffffffu) fail("only whole warps are emulated", line);
    current->given = value;
    wait(Fiber::State::AtWarpFunction, line);
    return current->received;
}

inline unsigned lane() {
    return (current->index.x + blockDim.x * (current->index.y + blockDim.y * current->index.z)) % kWarp;
}

}  // namespace emulation

inline void __syncthreads(int line = __builtin_LINE()) {
    emulation::wait(emulation::Fiber::State::AtBlockBarrier, line);
}

inline unsigned __ballot_sync(unsigned mask, bool predicate, int line = __builtin_LINE()) {
    const auto& values = emulation::exchange(mask, predicate, line);
    unsigned bits = 0;
    for (unsigned l = 0; l < emulation::kWarp; ++l) bits |= values[l] << l;
    return bits;
}

inline unsigned __match_any_sync(unsigned mask, uint32_t value, int line = __builtin_LINE()) {
    const auto& values = emulation::exchange(mask, value, line);
    unsigned bits = 0;
    for (unsigned l = 0; l < emulation::kWarp; ++l) bits |= (values[l] == value ? 1u : 0u) << l;
    return bits;
}

inline uint32_t __shfl_up_sync(unsigned mask, uint32_t value, unsigned distance, int line = __builtin_LINE()) {
    const auto& values = emulation::exchange(mask, value, line);
    return emulation::lane() < distance ? value : values[emulation::lane() - distance];
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }

inline uint32_t atomicAdd(uint32_t* address, uint32_t value) {
    const uint32_t before = *address;
    *address = before + value;
    return before;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    cudaStream_t stream;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
    emulation::run(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
    return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
    std::memset(memory, value, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
