// Distribution focal loss: a thread for each row.
#include "../dfl.h"
#include "../ops.h"
#include "launch.cuh"

namespace yolonas::cuda {

namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    loss_of_rows(const __grid_constant__ Rows logits, const Real<T>* targets, Real<T>* loss) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (row >= logits.rows) return;
    const T* x = static_cast<const T*>(logits.data) + row * logits.stride_row;
    const auto softmax = dfl_softmax(x, logits.stride_bin, logits.bins);
    const auto target = dfl_target(targets[row], logits.bins);
    loss[row] = dfl_cross_entropy(softmax.largest, softmax.total, target, to_real(x[target.lower * logits.stride_bin]),
                                  to_real(x[(target.lower + 1) * logits.stride_bin]));
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    backward_of_rows(const Real<T>* gradient, const __grid_constant__ Rows logits, const Real<T>* targets,
                     const __grid_constant__ Rows out) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (row >= logits.rows) return;
    const T* x = static_cast<const T*>(logits.data) + row * logits.stride_row;
    T* result = static_cast<T*>(const_cast<void*>(out.data)) + row * out.stride_row;
    if (gradient[row] == Real<T>(0)) return;  // as of a weight of 0: those logits need not be read
    const auto softmax = dfl_softmax(x, logits.stride_bin, logits.bins);
    const auto target = dfl_target(targets[row], logits.bins);
    const Real<T> scale = gradient[row] / softmax.total;
    for (int64_t b = 0; b < logits.bins; ++b) {
        const Real<T> e = exp_nonpositive(to_real(x[b * logits.stride_bin]) - softmax.largest);
        result[b * out.stride_bin] = from_real<T>(cross_entropy_gradient(e, scale, gradient[row], b, target));
    }
}

}  // namespace

void dfl_loss(const Rows& logits, ScalarType type, const void* targets, void* loss, int device, Stream stream) {
    const Queue queue("dfl_loss", device, stream);
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        queue.launch(loss_of_rows<T>, ceil_div(logits.rows, kThreads), kThreads, logits,
                     static_cast<const Real<T>*>(targets), static_cast<Real<T>*>(loss));
    });
}

void dfl_loss_backward(const void* gradient, const Rows& logits, ScalarType type, const void* targets,
                       const Rows& logit_gradients, int device, Stream stream) {
    const Queue queue("dfl_loss_backward", device, stream);
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        queue.launch(backward_of_rows<T>, ceil_div(logits.rows, kThreads), kThreads,
                     static_cast<const Real<T>*>(gradient), logits, static_cast<const Real<T>*>(targets),
                     logit_gradients);
    });
}

}  // namespace yolonas::cuda
