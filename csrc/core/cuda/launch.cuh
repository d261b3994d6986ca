// What every op needs to enqueue its kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

namespace yolonas::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Enqueues on one stream; its device is current while this object lives. Errors name the op.
class Queue {
   public:
    Queue(const char* op, int device, void* stream) : op_(op), stream_(static_cast<cudaStream_t>(stream)) {
        check(cudaGetDevice(&previous_));
        switched_ = previous_ != device;
        if (switched_) check(cudaSetDevice(device));
    }
    ~Queue() {
        if (switched_) cudaSetDevice(previous_);
    }
    Queue(const Queue&) = delete;
    Queue& operator=(const Queue&) = delete;

    // A grid of one dimension, which alone has room for 2^31 - 1 blocks: kernels take the image out of blockIdx.x.
    template <typename... Parameters, typename... Arguments>
    void launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, const Arguments&... arguments) const {
        if (blocks == 0) return;
        if (blocks > std::numeric_limits<int32_t>::max())
            throw std::invalid_argument(std::string(op_) + ": the input is too large for one CUDA grid");
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(static_cast<unsigned>(blocks));
        config.blockDim = threads;
        config.stream = stream_;
        check(cudaLaunchKernelEx(&config, kernel, arguments...));
    }

    void zero(void* memory, size_t bytes) const { check(cudaMemsetAsync(memory, 0, bytes, stream_)); }

   private:
    void check(cudaError_t status) const {
        if (status == cudaSuccess) return;
        cudaGetLastError();  // reported here, so not left for whoever asks next
        throw std::runtime_error(std::string(op_) + ": " + cudaGetErrorString(status));
    }

    const char* op_;
    cudaStream_t stream_;
    int previous_ = 0;
    bool switched_ = false;
};

// Cuts arrays out of the caller's workspace; without one (null) it only adds up their sizes.
class Slices {
   public:
    explicit Slices(void* workspace) : begin_(reinterpret_cast<uintptr_t>(workspace)) {}

    template <typename T>
    T* take(int64_t count) {
        T* slice = reinterpret_cast<T*>(begin_ + bytes_);
        bytes_ += static_cast<size_t>(ceil_div(count * static_cast<int64_t>(sizeof(T)), kAlignment) * kAlignment);
        return slice;
    }

    size_t bytes() const { return bytes_; }

   private:
    static constexpr int64_t kAlignment = 256;
    uintptr_t begin_;
    size_t bytes_ = 0;
};

}  // namespace yolonas::cuda
