// The ops on raw memory: no torch, no Python, results written into memory that the caller owns.
// Shapes stand behind each pointer; strides are in elements; boxes are xyxy.
#pragma once

#include <cstddef>
#include <cstdint>

namespace yolonas {

enum class ScalarType : int { Float32 = 0, Float16 = 1, BFloat16 = 2 };

// One feature map, any strides: NCHW and channels_last are read where they lie.
struct Map {
    const void* data;  // [B, channels, height, width]
    int64_t height, width;
    int64_t stride_batch, stride_channel, stride_height, stride_width;
};

struct Level {
    Map class_logits;  // [B, num_classes, h, w]
    Map box_logits;    // [B, 4 * bins, h, w]: left, top, right, bottom, each a distribution over `bins` distances
    float stride;      // canvas pixels per grid cell
};

constexpr int kMaxLevels = 8;

struct DecodeNmsOptions {
    int64_t batch, num_classes, bins;
    float score_threshold;   // a candidate has score > score_threshold
    float iou_threshold;     // a box is suppressed by a better one of its class with IoU > iou_threshold
    int64_t pre_nms_top_k;   // candidates per image that enter the NMS
    int64_t max_detections;  // K
    bool multi_label;        // every (anchor, class) is a candidate; otherwise each anchor's best class
    bool class_agnostic;     // boxes suppress boxes of every class
};

// Rows past an image's count hold boxes 0, scores 0, labels -1, anchors -1.
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

// Writes the boxes of all anchors, [B, A, 4] canvas pixels; A sums height * width over the levels.
void dfl_decode(const Map* box_logits, const float* strides, int num_levels, ScalarType type, int64_t batch,
                int64_t bins, float* boxes, int threads);

// Greedy NMS in descending order of score (ties: ascending index), within equal labels; labels may be null: one class.
// Writes the kept indices in that order into keep [n] and returns how many. Instantiated for float and double.
template <typename T>
int64_t batched_nms(const T* boxes, const T* scores, const int64_t* labels, int64_t n, T iou_threshold, int64_t* keep);

}  // namespace cpu

namespace cuda {

using Stream = void*;  // a cudaStream_t; this header needs no CUDA

// Device memory that the call below needs for its intermediate results, in bytes, aligned as cudaMalloc's.
// Throws std::invalid_argument where an image has 2^32 candidates or more.
size_t decode_nms_workspace(const Level* levels, int num_levels, const DecodeNmsOptions& options);

// As cpu::decode_nms on device memory; enqueues on `stream` and returns without waiting.
void decode_nms(const Level* levels, int num_levels, ScalarType type, const DecodeNmsOptions& options,
                const DetectionsOut& out, void* workspace, int device, Stream stream);

void dfl_decode(const Map* box_logits, const float* strides, int num_levels, ScalarType type, int64_t batch,
                int64_t bins, float* boxes, int device, Stream stream);

template <typename T>
size_t batched_nms_workspace(int64_t n);

// As cpu::batched_nms on device memory; the number kept goes to kept [1] on the device.
template <typename T>
void batched_nms(const T* boxes, const T* scores, const int64_t* labels, int64_t n, T iou_threshold, int64_t* keep,
                 int64_t* kept, void* workspace, int device, Stream stream);

}  // namespace cuda
}  // namespace yolonas
