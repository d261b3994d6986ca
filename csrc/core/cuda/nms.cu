// NMS with torchvision's contract: ranks by (score, index), then the exact greedy pass. Memory linear in the boxes.
#include "../ops.h"
#include "greedy.cuh"
#include "launch.cuh"
#include "sort.cuh"

namespace yolonas::cuda {

namespace {

constexpr int kThreads = 256;

// Descending keys are descending scores, NaN first as torch sorts, then ascending indices.
struct WideKey {
    uint64_t score, index;
    __device__ bool operator<(const WideKey& other) const {
        return score < other.score || (score == other.score && index < other.index);
    }
};

__device__ void make_key(float score, uint32_t index, uint64_t& key) { key = candidate_key(score, index); }
__device__ void make_key(double score, uint32_t index, WideKey& key) {
    uint64_t ordered = ~uint64_t{0};
    if (score == score) {
        const uint64_t bits = bit_cast<uint64_t>(score + 0.0), sign = uint64_t{1} << 63;  // -0 + 0 = +0
        ordered = bits & sign ? ~bits : bits | sign;
    }
    key = {ordered, ~uint64_t{index}};
}

__device__ uint32_t index_of(uint64_t key) { return candidate_index(key); }
__device__ uint32_t index_of(const WideKey& key) { return static_cast<uint32_t>(~key.index); }

template <typename T>
struct KeyOf;
template <>
struct KeyOf<float> {
    using type = uint64_t;
};
template <>
struct KeyOf<double> {
    using type = WideKey;
};

template <typename T>
struct Buffers {
    using Key = typename KeyOf<T>::type;
    bool sorts;  // else ranks are counted
    int64_t length;
    Key* keys;          // [length] where sorted
    uint32_t* indices;  // [n] of the box at each rank
    Ranked<T> ranked;
    size_t bytes;

    Buffers(void* workspace, int64_t n, bool grouped)
        : sorts(!counting_pays(1, n)), length(sorts ? sort_length(n) : 0) {
        if (n > std::numeric_limits<int32_t>::max())
            throw std::invalid_argument("batched_nms: more than 2^31 - 1 boxes");
        Slices slices(workspace);
        keys = slices.take<Key>(length);
        indices = slices.take<uint32_t>(n);
        ranked = take_ranked<T>(slices, 1, n, n, nullptr, grouped);
        bytes = slices.bytes();
    }
};

// A key for each thread; zeros, below all others, fill up to the length of the sort.
template <typename T, typename Key>
__global__ void __launch_bounds__(kThreads) make_keys(const T* scores, int64_t n, Key* keys, int64_t length) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= length) return;
    Key key{};
    if (i < n) make_key(scores[i], static_cast<uint32_t>(i), key);
    keys[i] = key;
}

template <typename T>
__device__ void place(int64_t index, int64_t rank, const T* boxes, const int64_t* labels, const Ranked<T>& ranked,
                      uint32_t* indices) {
    indices[rank] = static_cast<uint32_t>(index);
    ranked.boxes[rank] = {boxes[4 * index], boxes[4 * index + 1], boxes[4 * index + 2], boxes[4 * index + 3]};
    ranked.removed[rank] = 0;
    if (ranked.groups) ranked.groups[rank] = labels[index];
}

// Threads (kCountKeys, kCountParts), blocks [n / kCountKeys].
template <typename T, typename Key>
__global__ void __launch_bounds__(kCountKeys* kCountParts)
    place_by_counting(const T* scores, const T* boxes, const int64_t* labels, Ranked<T> ranked, uint32_t* indices) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kCountKeys + threadIdx.x;
    const auto key_at = [&](int64_t i) {
        Key key{};
        make_key(scores[i], static_cast<uint32_t>(i), key);
        return key;
    };
    const bool present = index < ranked.n;
    const uint32_t rank = count_above(present ? key_at(index) : Key{}, ranked.n, key_at);
    if (present && threadIdx.y == 0) place(index, rank, boxes, labels, ranked, indices);
}

template <typename T, typename Key>
__global__ void __launch_bounds__(kThreads)
    place_sorted(const Key* keys, const T* boxes, const int64_t* labels, Ranked<T> ranked, uint32_t* indices) {
    const int64_t rank = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (rank < ranked.n) place(index_of(keys[rank]), rank, boxes, labels, ranked, indices);
}

struct WriteKept {
    const uint32_t* indices;
    int64_t *keep, *kept;

    __device__ void operator()(int64_t, int64_t rank, int64_t slot) const { keep[slot] = indices[rank]; }
    __device__ void finish(int64_t, int64_t count) const {
        if (threadIdx.x == 0) *kept = count;
    }
};

}  // namespace

template <typename T>
size_t batched_nms_workspace(int64_t n) {
    return Buffers<T>(nullptr, n, true).bytes;
}

template <typename T>
void batched_nms(const T* boxes, const T* scores, const int64_t* labels, int64_t n, T iou_threshold, int64_t* keep,
                 int64_t* kept, void* workspace, int device, Stream stream) {
    using Key = typename Buffers<T>::Key;
    const Queue queue("batched_nms", device, stream);
    if (n == 0) return queue.zero(kept, sizeof(*kept));
    const Buffers<T> buffers(workspace, n, labels != nullptr);
    if (buffers.sorts) {
        queue.launch(make_keys<T, Key>, ceil_div(buffers.length, kThreads), kThreads, scores, n, buffers.keys,
                     buffers.length);
        sort_descending(queue, buffers.keys, 1, buffers.length);
        queue.launch(place_sorted<T, Key>, ceil_div(n, kThreads), kThreads, buffers.keys, boxes, labels, buffers.ranked,
                     buffers.indices);
    } else {
        queue.launch(place_by_counting<T, Key>, ceil_div(n, kCountKeys), dim3(kCountKeys, kCountParts), scores, boxes,
                     labels, buffers.ranked, buffers.indices);
    }
    greedy_nms(queue, buffers.ranked, iou_threshold, WriteKept{buffers.indices, keep, kept});
}

template size_t batched_nms_workspace<float>(int64_t);
template size_t batched_nms_workspace<double>(int64_t);
template void batched_nms<float>(const float*, const float*, const int64_t*, int64_t, float, int64_t*, int64_t*, void*,
                                 int, Stream);
template void batched_nms<double>(const double*, const double*, const int64_t*, int64_t, double, int64_t*, int64_t*,
                                  void*, int, Stream);

}  // namespace yolonas::cuda
