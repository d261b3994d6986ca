// The ops on raw memory: no torch, no Python, and no CUDA to include this. csrc/README.md fixes what they compute.
//
// Memory   The caller owns every buffer, results' too; a call keeps none after it returns (on CUDA: after its work on
//          the stream is done). An output overlaps no other argument. Elements need their own alignment, nothing more.
// Shapes   stand behind each pointer: arrays are dense and row-major but for those given with strides, which count
//          elements and may be any, 0 (broadcast) and negative ones too. Boxes are xyxy.
// Checks   None, unless a function says that it throws: pointers, sizes and options must be as documented.
// Threads  Functions may be called from several threads at once. `threads`, at least 1, is how many may work on one
//          call, the caller's among them; the others live as long as the call. No result depends on their number.
// Errors   std::bad_alloc; in `cuda` also std::runtime_error with the op's name and CUDA's message, and
//          std::invalid_argument for an input beyond a documented limit. Outputs then hold anything.
#pragma once

#include <cstddef>
#include <cstdint>

namespace yolonas {

enum class ScalarType : int { Float32 = 0, Float16 = 1, BFloat16 = 2, Float64 = 3 };

// One feature map, any strides: NCHW and channels_last are read where they lie.
struct Map {
    const void* data;  // [B, channels, height, width], of a ScalarType given beside it; points at element [0, 0, 0, 0]
    int64_t height, width;
    int64_t stride_batch, stride_channel, stride_height, stride_width;
};

// Both maps are of one type and of the same h and w.
struct Level {
    Map class_logits;  // [B, num_classes, h, w]
    Map box_logits;    // [B, 4 * bins, h, w]: left, top, right, bottom, each a distribution over `bins` distances
    float stride;      // canvas pixels per grid cell, above 0
};

// Rows of logits, any strides.
struct Rows {
    const void* data;  // [rows, bins]
    int64_t rows, bins;
    int64_t stride_row, stride_bin;
};

constexpr int kMaxLevels = 8;  // num_levels is from 1 to this

// decode_nms makes detections of a head's raw maps: threshold, the best candidates, their boxes alone, NMS.
struct DecodeNmsOptions {
    int64_t batch;           // B, from 0
    int64_t num_classes;     // from 1; anchors of all levels * num_classes < 2^32
    int64_t bins;            // from 1
    float score_threshold;   // 0 to 1: a candidate has score > score_threshold
    float iou_threshold;     // 0 to 1: a box is suppressed by a better one of its class with IoU > iou_threshold
    int64_t pre_nms_top_k;   // from 1: candidates per image that enter the NMS
    int64_t max_detections;  // K, from 1
    bool multi_label;        // every (anchor, class) is a candidate; otherwise each anchor's best class
    bool class_agnostic;     // boxes suppress boxes of every class
};

// Every element is written. Rows past an image's count hold boxes 0, scores 0, labels -1, anchors -1.
struct DetectionsOut {
    float* boxes;      // [B, K, 4] canvas pixels, not clipped
    float* scores;     // [B, K] descending by logit
    int64_t* labels;   // [B, K]
    int64_t* anchors;  // [B, K] index over all levels, row-major within a level
    int64_t* counts;   // [B]
};

namespace cpu {

// Seconds that each stage took, summed over the images.
struct StageTimes {
    double scan, select, decode, nms;
};

// With `times`, which the stages' times are added to, one thread does all the work.
void decode_nms(const Level* levels, int num_levels, ScalarType type, const DecodeNmsOptions& options,
                const DetectionsOut& out, int threads, StageTimes* times = nullptr);

// Writes the boxes of all anchors, [B, A, 4] canvas pixels; A sums height * width over the levels. Boxes are float, of
// float64 logits double. NaN where a logit is NaN or +inf, or all of a side are -inf.
void dfl_decode(const Map* box_logits, const float* strides, int num_levels, ScalarType type, int64_t batch,
                int64_t bins, void* boxes, int threads);

// From the gradient of those boxes [B, A, 4] (float; double for float64 logits), writes that of the logits into
// logit_gradients, maps of the same sizes and type as box_logits with strides of their own, which do not overlap. Where
// a side's gradient is 0 they stay as they are, and the logits are not read: they start as zeros.
void dfl_decode_backward(const void* gradient, const Map* box_logits, const float* strides, int num_levels,
                         ScalarType type, int64_t batch, int64_t bins, const Map* logit_gradients, int threads);

// Distribution focal loss of every row: lse(x) - (1 - f) * x[l] - f * x[l + 1] with target = l + f, in bins, clamped to
// [0, bins - 1]; bins >= 2. targets and loss [rows] are float, for float64 logits double. NaN where the target or a
// logit is NaN, a logit is +inf, or all are -inf.
void dfl_loss(const Rows& logits, ScalarType type, const void* targets, void* loss, int threads);

// From the gradient of that loss [rows], writes that of the logits: gradient * (softmax(x) - (1 - f) e_l - f e_{l+1}).
// logit_gradients are of the logits' sizes and type and do not overlap. Rows whose gradient is 0 stay as they are, and
// their logits are not read: logit_gradients start as zeros.
void dfl_loss_backward(const void* gradient, const Rows& logits, ScalarType type, const void* targets,
                       const Rows& logit_gradients, int threads);

// Greedy NMS of boxes [n, 4], scores [n] in descending order of score (NaN first, ties: ascending index), within equal
// labels [n], any integers; labels may be null: one class. iou_threshold is from 0 to 1. Writes the kept indices in
// that order into keep [n] and returns how many. Instantiated for float and double. Works on the caller's thread.
// Throws std::invalid_argument where n is 2^31 or more.
template <typename T>
int64_t batched_nms(const T* boxes, const T* scores, const int64_t* labels, int64_t n, T iou_threshold, int64_t* keep);

}  // namespace cpu

namespace cuda {

using Stream = void*;  // a cudaStream_t; this header needs no CUDA

// Device memory that the call below needs for its intermediate results, in bytes, aligned as cudaMalloc's.
// Throws std::invalid_argument where an image has 2^32 candidates or more.
size_t decode_nms_workspace(const Level* levels, int num_levels, const DecodeNmsOptions& options);

// As cpu::decode_nms on memory of `device`; the structs themselves lie on the host. Enqueues on `stream` and returns
// without waiting, so it can be captured into a CUDA graph; the thread's current device stays what it was.
void decode_nms(const Level* levels, int num_levels, ScalarType type, const DecodeNmsOptions& options,
                const DetectionsOut& out, void* workspace, int device, Stream stream);

// The following as their namesakes of cpu, on device memory: they enqueue on `stream` and return without waiting.
void dfl_decode(const Map* box_logits, const float* strides, int num_levels, ScalarType type, int64_t batch,
                int64_t bins, void* boxes, int device, Stream stream);
void dfl_decode_backward(const void* gradient, const Map* box_logits, const float* strides, int num_levels,
                         ScalarType type, int64_t batch, int64_t bins, const Map* logit_gradients, int device,
                         Stream stream);
void dfl_loss(const Rows& logits, ScalarType type, const void* targets, void* loss, int device, Stream stream);
void dfl_loss_backward(const void* gradient, const Rows& logits, ScalarType type, const void* targets,
                       const Rows& logit_gradients, int device, Stream stream);

// Throws std::invalid_argument where n is 2^31 or more.
template <typename T>
size_t batched_nms_workspace(int64_t n);

// As cpu::batched_nms on device memory; the number kept goes to kept [1] on the device. Enqueues and does not wait.
template <typename T>
void batched_nms(const T* boxes, const T* scores, const int64_t* labels, int64_t n, T iou_threshold, int64_t* keep,
                 int64_t* kept, void* workspace, int device, Stream stream);

}  // namespace cuda
}  // namespace yolonas
