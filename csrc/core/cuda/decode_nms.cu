// decode_nms on CUDA. A scan collects the candidates' keys of each image, a selection keeps the best of them, a sort
// orders those; only their boxes are decoded; the greedy pass and the output follow. Nothing is read back by the host.
// The order in which keys are collected varies from run to run; the keys are unique, so the sort makes it one again.
#include "../ops.h"
#include "decode.cuh"
#include "greedy.cuh"
#include "launch.cuh"
#include "sort.cuh"

namespace yolonas::cuda {

namespace {

constexpr int kScanThreads = 256;
constexpr int kScanItems = 16;  // logits for each thread
constexpr int kScanBlock = kScanThreads * kScanItems;
constexpr int kSelectThreads = 1024;

struct ClassLevel {
    Map map;
    uint32_t first_anchor, cells, items, blocks;  // items: what the scan runs over, logits or anchors
    bool interleaved;  // logits are numbered cell * num_classes + class as in channels_last, not class * cells + cell
    bool dense;        // logit number i of an image lies at element i
};

struct ClassLevels {  // by value into the kernels
    ClassLevel level[kMaxLevels];
    int count;
    uint32_t num_classes;
    int64_t blocks;  // for each image, over all levels
};

struct Candidates {
    int64_t capacity;  // every candidate there can be
    uint64_t* keys;    // [B, capacity]
    uint32_t* counts;  // [B]
};

// The level of one of an image's blocks, which becomes the number within its level.
__device__ const ClassLevel& level_of(const ClassLevels& levels, uint32_t& block) {
    int l = 0;
    while (block >= levels.level[l].blocks) block -= levels.level[l++].blocks;
    return levels.level[l];
}

// The first of `count` slots for this thread, taken from `counter` by one atomic of the block. All threads call it.
__device__ uint32_t reserve(uint32_t count, uint32_t* counter) {
    __shared__ uint32_t total, begin;
    if (threadIdx.x == 0) total = 0;
    __syncthreads();
    const uint32_t place = count > 0 ? atomicAdd(&total, count) : 0;
    __syncthreads();
    if (threadIdx.x == 0) begin = total > 0 ? atomicAdd(counter, total) : 0;
    __syncthreads();
    return begin + place;
}

template <typename T>
struct alignas(16) Pack {  // one 16-byte load
    static constexpr int kSize = 16 / static_cast<int>(sizeof(T));
    T values[kSize];
};

struct Position {
    uint32_t cell, label;
};
__device__ Position position_of(const ClassLevels& levels, const ClassLevel& level, uint32_t item) {
    if (level.interleaved) return {item / levels.num_classes, item % levels.num_classes};
    return {item % level.cells, item / level.cells};
}

template <typename T>
__device__ const T* cell_logits(const ClassLevel& level, const T* image_logits, uint32_t cell) {
    const uint32_t width = static_cast<uint32_t>(level.map.width);
    return image_logits + cell / width * level.map.stride_height + cell % width * level.map.stride_width;
}

// Every (anchor, class) at or above the cutoff. Blocks [B, levels.blocks] of kScanBlock logits each; dense levels are
// read 16 bytes at a time.
template <typename T>
__global__ void __launch_bounds__(kScanThreads)
    scan_logits(const __grid_constant__ ClassLevels levels, float cutoff, Candidates candidates) {
    constexpr int kPack = Pack<T>::kSize, kPacks = kScanItems / kPack;
    const int64_t image = blockIdx.x / levels.blocks;
    uint32_t block = static_cast<uint32_t>(blockIdx.x % levels.blocks);
    const ClassLevel& level = level_of(levels, block);
    const T* logits = static_cast<const T*>(level.map.data) + image * level.map.stride_batch;
    const uint32_t begin = block * kScanBlock, left = level.items - begin;
    const bool packed = level.dense && left >= kScanBlock && reinterpret_cast<uintptr_t>(logits) % sizeof(Pack<T>) == 0;
    const auto offset = [&](int i) {
        return packed ? (i / kPack * kScanThreads + threadIdx.x) * kPack + i % kPack : i * kScanThreads + threadIdx.x;
    };
    const auto logit = [&](uint32_t item) {
        const Position position = position_of(levels, level, item);
        return to_float(cell_logits(level, logits, position.cell)[position.label * level.map.stride_channel]);
    };

    uint32_t hits = 0;
    if (packed) {
        const Pack<T>* packs = reinterpret_cast<const Pack<T>*>(logits + begin) + threadIdx.x;
        Pack<T> loaded[kPacks];
#pragma unroll
        for (int p = 0; p < kPacks; ++p) loaded[p] = packs[p * kScanThreads];
#pragma unroll
        for (int i = 0; i < kScanItems; ++i)
            if (to_float(loaded[i / kPack].values[i % kPack]) >= cutoff) hits |= 1u << i;
    } else {
        for (int i = 0; i < kScanItems; ++i)
            if (offset(i) < left && logit(begin + offset(i)) >= cutoff) hits |= 1u << i;
    }

    uint64_t* keys = candidates.keys + image * candidates.capacity;
    for (uint32_t place = reserve(__popc(hits), &candidates.counts[image]); hits; hits &= hits - 1) {
        const uint32_t item = begin + offset(__ffs(static_cast<int>(hits)) - 1);
        const Position position = position_of(levels, level, item);
        const uint32_t anchor = level.first_anchor + position.cell;
        keys[place++] = candidate_key(logit(item), anchor * levels.num_classes + position.label);
    }
}

// Each anchor's best class, the lowest on a tie, where it is at or above the cutoff. Blocks [B, levels.blocks], an
// anchor for each thread.
template <typename T>
__global__ void __launch_bounds__(kScanThreads)
    scan_anchors(const __grid_constant__ ClassLevels levels, float cutoff, Candidates candidates) {
    const int64_t image = blockIdx.x / levels.blocks;
    uint32_t block = static_cast<uint32_t>(blockIdx.x % levels.blocks);
    const ClassLevel& level = level_of(levels, block);
    const uint32_t cell = block * kScanThreads + threadIdx.x;
    float best = bit_cast<float>(0xff800000u);  // -inf
    uint32_t label = 0;
    if (cell < level.items) {
        const T* image_logits = static_cast<const T*>(level.map.data) + image * level.map.stride_batch;
        const T* logits = cell_logits(level, image_logits, cell);
        for (uint32_t c = 0; c < levels.num_classes; ++c) {
            const float logit = to_float(logits[c * level.map.stride_channel]);
            if (logit > best) {
                best = logit;
                label = c;
            }
        }
    }
    const bool hit = cell < level.items && best >= cutoff;
    const uint32_t place = reserve(hit ? 1 : 0, &candidates.counts[image]);
    const uint32_t index = (level.first_anchor + cell) * levels.num_classes + label;
    if (hit) candidates.keys[image * candidates.capacity + place] = candidate_key(best, index);
}

// The key of the given rank (from 1) in descending order, to all threads of the block: a radix selection, 8 bits at a
// time from the top, over keys [n].
__device__ uint64_t key_of_rank(const uint64_t* keys, uint32_t n, uint32_t rank) {
    constexpr int kDigits = 256, kShare = kDigits / kWarp;
    __shared__ uint32_t histogram[kDigits], found_digit, found_rank;
    __shared__ bool whole;  // the digit's keys are wanted to the last
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    uint64_t prefix = 0;
    for (int shift = 56;; shift -= 8) {
        if (threadIdx.x < kDigits) histogram[threadIdx.x] = 0;
        __syncthreads();
        for (uint32_t begin = 0; begin < n; begin += kSelectThreads) {
            const uint32_t i = begin + threadIdx.x;
            const uint64_t key = i < n ? keys[i] : 0;
            const bool member = i < n && (shift == 56 || (key ^ prefix) >> (shift + 8) == 0);
            const uint32_t digit = member ? static_cast<uint32_t>(key >> shift) % kDigits : kDigits;
            const uint32_t peers =
                __match_any_sync(kFullWarp, digit);  // logits share their top bits: one atomic for all
            if (member && lane == __ffs(static_cast<int>(peers)) - 1) atomicAdd(&histogram[digit], __popc(peers));
        }
        __syncthreads();
        if (threadIdx.x < kWarp) {  // lane 0 has the highest digits
            const int top = kDigits - 1 - lane * kShare;
            uint32_t own = 0;
            for (int d = top; d > top - kShare; --d) own += histogram[d];
            uint32_t up_to_own = own;
            for (int distance = 1; distance < kWarp; distance *= 2) {
                const uint32_t above = __shfl_up_sync(kFullWarp, up_to_own, distance);
                if (lane >= distance) up_to_own += above;
            }
            if (up_to_own - own < rank && rank <= up_to_own) {  // true of one lane
                uint32_t rest = rank - (up_to_own - own);
                int digit = top;
                for (; histogram[digit] < rest; --digit) rest -= histogram[digit];
                found_digit = static_cast<uint32_t>(digit);
                found_rank = rest;
                whole = histogram[digit] == rest;
            }
        }
        __syncthreads();
        prefix |= static_cast<uint64_t>(found_digit) << shift;
        rank = found_rank;
        if (whole) return prefix;  // at the latest at the last digit, as keys are unique
    }
}

// Blocks [B]: the best `most` keys of each image in any order, then zeros, below all keys. -> selected [B, length]
__global__ void __launch_bounds__(kSelectThreads)
    select_best(Candidates candidates, uint32_t most, uint64_t* selected, int64_t length) {
    __shared__ uint32_t taken;
    const uint64_t* keys = candidates.keys + blockIdx.x * candidates.capacity;
    selected += blockIdx.x * length;
    const uint32_t n = candidates.counts[blockIdx.x];
    const uint64_t least = n > most ? key_of_rank(keys, n, most) : 0;
    if (threadIdx.x == 0) taken = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += kSelectThreads)
        if (keys[i] >= least) selected[atomicAdd(&taken, 1u)] = keys[i];
    for (int64_t i = (n < most ? n : most) + threadIdx.x; i < length; i += kSelectThreads) selected[i] = 0;
}

// Blocks [B, n / kDecodeAnchors], a rank for each threadIdx.x. keys [B, length] -> ranked.boxes, groups, removed
template <typename T>
__global__ void __launch_bounds__(4 * kDecodeAnchors)
    decode_ranks(const __grid_constant__ BoxLevels levels, int64_t bins, uint32_t num_classes, const uint64_t* keys,
                 int64_t length, Ranked<float> ranked) {
    const int64_t blocks = ceil_div(ranked.n, kDecodeAnchors), image = blockIdx.x / blocks;
    const int64_t rank = blockIdx.x % blocks * kDecodeAnchors + threadIdx.x, slot = image * ranked.n + rank;
    const bool present = rank < ranked.count(image);
    const uint32_t index = present ? candidate_index(keys[image * length + rank]) : 0;
    const Box<float> box = decode_anchor<T>(levels, bins, image, present ? int64_t{index / num_classes} : -1);
    if (!present || threadIdx.y > 0) return;
    ranked.boxes[slot] = box;
    ranked.removed[slot] = !is_finite(box);  // keeps its place among the best, but neither appears nor suppresses
    if (ranked.groups) ranked.groups[slot] = index % num_classes;
}

// Blocks [B, chunks], a rank for each thread.
__global__ void __launch_bounds__(kChunk) write_detections(const uint64_t* keys, int64_t length, uint32_t num_classes,
                                                           Ranked<float> ranked, DetectionsOut out, int64_t most) {
    const int64_t chunks = ranked.chunks(), image = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
    const int64_t rank = chunk * kChunk + threadIdx.x, slot = kept_slot(ranked, image, chunk);
    if (slot >= 0) {
        const uint64_t key = keys[image * length + rank];
        const Box<float> box = ranked.boxes[image * ranked.n + rank];
        float* target = out.boxes + 4 * (image * most + slot);
        target[0] = box.x1;
        target[1] = box.y1;
        target[2] = box.x2;
        target[3] = box.y2;
        out.scores[image * most + slot] = sigmoid(candidate_logit(key));
        out.labels[image * most + slot] = candidate_index(key) % num_classes;
        out.anchors[image * most + slot] = candidate_index(key) / num_classes;
    }
    const int64_t count = ranked.found(image, chunks);
    if (rank == 0) out.counts[image] = count;
    for (int64_t i = image * most + count + rank; i < (image + 1) * most; i += chunks * kChunk) {
        for (int side = 0; side < 4; ++side) out.boxes[4 * i + side] = 0.0f;
        out.scores[i] = 0.0f;
        out.labels[i] = -1;
        out.anchors[i] = -1;
    }
}

bool is_dense(const Map& map, int64_t channels, bool interleaved) {
    const auto lies = [](int64_t size, int64_t stride, int64_t wanted) { return size == 1 || stride == wanted; };
    const int64_t pixel = interleaved ? channels : 1, plane = map.height * map.width;
    return lies(map.width, map.stride_width, pixel) && lies(map.height, map.stride_height, map.width * pixel) &&
           lies(channels, map.stride_channel, interleaved ? 1 : plane);
}

ClassLevels class_levels(const Level* levels, int num_levels, const DecodeNmsOptions& options) {
    ClassLevels result{};
    result.num_classes = static_cast<uint32_t>(options.num_classes);
    uint32_t anchors = 0;
    for (result.count = 0; result.count < num_levels; ++result.count) {
        ClassLevel& level = result.level[result.count];
        level.map = levels[result.count].class_logits;
        level.first_anchor = anchors;
        level.cells = static_cast<uint32_t>(level.map.height * level.map.width);
        level.interleaved = options.num_classes > 1 && level.map.stride_channel == 1;
        level.dense = is_dense(level.map, options.num_classes, level.interleaved);
        level.items = options.multi_label ? level.cells * result.num_classes : level.cells;
        level.blocks = static_cast<uint32_t>(ceil_div(level.items, options.multi_label ? kScanBlock : kScanThreads));
        result.blocks += level.blocks;
        anchors += level.cells;
    }
    return result;
}

BoxLevels box_levels(const Level* levels, int num_levels) {
    BoxLevels result{};
    for (result.count = 0; result.count < num_levels; ++result.count) {
        result.maps[result.count] = levels[result.count].box_logits;
        result.strides[result.count] = levels[result.count].stride;
    }
    return result;
}

struct Buffers {
    Candidates candidates;
    int64_t ranks, length;  // ranks: candidates that enter the NMS, at most
    uint64_t* selected;     // [B, length]
    Ranked<float> ranked;
    size_t bytes;

    Buffers(void* workspace, const Level* levels, int num_levels, const DecodeNmsOptions& options) {
        int64_t anchors = 0;
        for (int l = 0; l < num_levels; ++l) anchors += levels[l].class_logits.height * levels[l].class_logits.width;
        if (anchors * options.num_classes > std::numeric_limits<uint32_t>::max())
            throw std::invalid_argument("decode_nms: more than 2^32 - 1 candidates in an image");
        Slices slices(workspace);
        candidates.capacity = options.multi_label ? anchors * options.num_classes : anchors;
        candidates.counts = slices.take<uint32_t>(options.batch);
        candidates.keys = slices.take<uint64_t>(options.batch * candidates.capacity);
        ranks = options.pre_nms_top_k < candidates.capacity ? options.pre_nms_top_k : candidates.capacity;
        if (ranks < 1) ranks = 1;  // one empty chunk writes the counts and the padding
        length = sort_length(ranks);
        selected = slices.take<uint64_t>(options.batch * length);
        ranked = take_ranked<float>(slices, options.batch, ranks, options.max_detections, candidates.counts,
                                    !options.class_agnostic);
        bytes = slices.bytes();
    }
};

template <typename T>
void enqueue(const Queue& queue, const Level* levels, int num_levels, const DecodeNmsOptions& options,
             const DetectionsOut& out, const Buffers& buffers) {
    const ClassLevels classes = class_levels(levels, num_levels, options);
    const BoxLevels boxes = box_levels(levels, num_levels);
    const Ranked<float>& ranked = buffers.ranked;
    const float cutoff = cutoff_logit(options.score_threshold);
    queue.zero(buffers.candidates.counts, options.batch * sizeof(*buffers.candidates.counts));
    queue.launch(options.multi_label ? scan_logits<T> : scan_anchors<T>, options.batch * classes.blocks, kScanThreads,
                 classes, cutoff, buffers.candidates);
    queue.launch(select_best, options.batch, kSelectThreads, buffers.candidates, static_cast<uint32_t>(buffers.ranks),
                 buffers.selected, buffers.length);
    sort_descending(queue, buffers.selected, options.batch, buffers.length);
    queue.launch(decode_ranks<T>, options.batch * ceil_div(ranked.n, kDecodeAnchors), dim3(kDecodeAnchors, 4), boxes,
                 options.bins, classes.num_classes, buffers.selected, buffers.length, ranked);
    greedy_nms(queue, ranked, options.iou_threshold);
    queue.launch(write_detections, options.batch * ranked.chunks(), kChunk, buffers.selected, buffers.length,
                 classes.num_classes, ranked, out, options.max_detections);
}

}  // namespace

size_t decode_nms_workspace(const Level* levels, int num_levels, const DecodeNmsOptions& options) {
    return Buffers(nullptr, levels, num_levels, options).bytes;
}

void decode_nms(const Level* levels, int num_levels, ScalarType type, const DecodeNmsOptions& options,
                const DetectionsOut& out, void* workspace, int device, Stream stream) {
    const Queue queue("decode_nms", device, stream);
    if (options.batch == 0) return;
    const Buffers buffers(workspace, levels, num_levels, options);
    switch (type) {
        case ScalarType::Float32:
            return enqueue<float>(queue, levels, num_levels, options, out, buffers);
        case ScalarType::Float16:
            return enqueue<Half>(queue, levels, num_levels, options, out, buffers);
        case ScalarType::BFloat16:
            return enqueue<BFloat16>(queue, levels, num_levels, options, out, buffers);
        case ScalarType::Float64:
            throw std::invalid_argument("decode_nms computes in float32");
    }
}

}  // namespace yolonas::cuda
