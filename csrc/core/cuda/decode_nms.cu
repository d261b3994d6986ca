// decode_nms on CUDA, in five kernels for up to 2048 candidates that enter the NMS. A scan collects the candidates'
// keys, a list for each of its blocks; a selection keeps the best of an image; only their boxes are decoded, each to
// the place of its rank; the greedy pass is two kernels, the last of which writes the output. Nothing is read back by
// the host and nothing must be zero before. The order within a list varies from run to run; the keys are unique, so
// ranks do not.
#include "../geometry.h"
#include "../ops.h"
#include "greedy.cuh"
#include "launch.cuh"
#include "sort.cuh"

namespace yolonas::cuda {

namespace {

constexpr int kScanThreads = 512;
constexpr int kScanItems = 16;  // logits for each thread
constexpr int kScanBlock = kScanThreads * kScanItems;
constexpr int kAnchorThreads = 128;
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
    uint32_t num_classes, blocks;  // blocks: for each image, over all levels
};

struct BoxLevels {  // by value into the kernels
    Map maps[kMaxLevels];
    float strides[kMaxLevels];
    int count;
};

struct Candidates {
    int64_t lists;     // of each image, one for each block of the scan
    uint32_t room;     // of a list: no more than its best ones can be among the image's best
    uint64_t* keys;    // [B, lists, room]
    uint32_t* counts;  // [B, lists]
};

// The level of one of an image's blocks, which becomes the number within its level.
__device__ const ClassLevel& level_of(const ClassLevels& levels, uint32_t& block) {
    int l = 0;
    while (block >= levels.level[l].blocks) block -= levels.level[l++].blocks;
    return levels.level[l];
}

// The first of `count` slots for this thread, and in `total` how many all threads took. All threads of the block call
// it.
__device__ uint32_t reserve(uint32_t count, uint32_t& total) {
    __shared__ uint32_t taken;
    __syncthreads();  // the call before is over
    if (threadIdx.x == 0) taken = 0;
    __syncthreads();
    const uint32_t place = count > 0 ? atomicAdd(&taken, count) : 0;
    __syncthreads();
    total = taken;
    return place;
}

// The key of the given rank (from 1) in descending order, to all threads of the block: a radix selection, 8 bits at a
// time from the top. Each thread gives its keys by key_at(0..rounds-1), which returns false where it has none.
template <int kThreads, typename KeyAt>
__device__ uint64_t key_of_rank(uint32_t rounds, const KeyAt& key_at, uint32_t rank) {
    constexpr int kDigits = 256, kShare = kDigits / kWarp;
    __shared__ uint32_t histogram[kDigits], found_digit, found_rank;
    __shared__ bool whole;  // the digit's keys are wanted to the last
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    uint64_t prefix = 0;
    for (int shift = 56;; shift -= 8) {
        for (int d = static_cast<int>(threadIdx.x); d < kDigits; d += kThreads) histogram[d] = 0;
        __syncthreads();
        for (uint32_t i = 0; i < rounds; ++i) {
            uint64_t key = 0;
            const bool member = key_at(i, key) && (shift == 56 || (key ^ prefix) >> (shift + 8) == 0);
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
    uint32_t block = blockIdx.x % levels.blocks;
    const ClassLevel& level = level_of(levels, block);
    const T* logits = static_cast<const T*>(level.map.data) + image * level.map.stride_batch;
    const uint32_t begin = block * kScanBlock, left = level.items - begin;
    const bool packed = level.dense && left % kPack == 0 && reinterpret_cast<uintptr_t>(logits) % sizeof(Pack<T>) == 0;
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
        const uint32_t packs_left = left / kPack;  // of this block and those after it
        const auto inside = [&](int p) { return p * kScanThreads + threadIdx.x < packs_left; };
        Pack<T> loaded[kPacks];
#pragma unroll
        for (int p = 0; p < kPacks; ++p)
            if (inside(p)) loaded[p] = packs[p * kScanThreads];
#pragma unroll
        for (int i = 0; i < kScanItems; ++i)
            if (inside(i / kPack) && to_float(loaded[i / kPack].values[i % kPack]) >= cutoff) hits |= 1u << i;
    } else {
#pragma unroll 4
        for (int i = 0; i < kScanItems; ++i)
            if (offset(i) < left && logit(begin + offset(i)) >= cutoff) hits |= 1u << i;
    }

    const auto key_of = [&](int i) {
        const uint32_t item = begin + offset(i);
        const Position position = position_of(levels, level, item);
        const uint32_t anchor = level.first_anchor + position.cell;
        return candidate_key(logit(item), anchor * levels.num_classes + position.label);
    };
    uint32_t found;
    uint32_t place = reserve(__popc(hits), found);
    if (found > candidates.room) {
        const auto key_at = [&](uint32_t i, uint64_t& key) {
            if (!(hits >> i & 1)) return false;
            key = key_of(static_cast<int>(i));
            return true;
        };
        const uint64_t least = key_of_rank<kScanThreads>(kScanItems, key_at, candidates.room);
        for (int i = 0; i < kScanItems; ++i)
            if ((hits >> i & 1) && key_of(i) < least) hits &= ~(1u << i);
        place = reserve(__popc(hits), found);
    }
    uint64_t* keys = candidates.keys + static_cast<int64_t>(blockIdx.x) * candidates.room;
    for (; hits; hits &= hits - 1) keys[place++] = key_of(__ffs(static_cast<int>(hits)) - 1);
    if (threadIdx.x == 0) candidates.counts[blockIdx.x] = found;
}

// Each anchor's best class, the lowest on a tie, where it is at or above the cutoff. Blocks [B, levels.blocks], an
// anchor for each thread.
template <typename T>
__global__ void __launch_bounds__(kAnchorThreads)
    scan_anchors(const __grid_constant__ ClassLevels levels, float cutoff, Candidates candidates) {
    const int64_t image = blockIdx.x / levels.blocks;
    uint32_t block = blockIdx.x % levels.blocks;
    const ClassLevel& level = level_of(levels, block);
    const uint32_t cell = block * kAnchorThreads + threadIdx.x;
    float best = bit_cast<float>(0xff800000u);  // -inf
    uint32_t label = 0;
    if (cell < level.items) {
        const T* image_logits = static_cast<const T*>(level.map.data) + image * level.map.stride_batch;
        const T* logits = cell_logits(level, image_logits, cell);
#pragma unroll 16  // so many loads in flight
        for (uint32_t c = 0; c < levels.num_classes; ++c) {
            const float logit = to_float(logits[c * level.map.stride_channel]);
            if (logit > best) {
                best = logit;
                label = c;
            }
        }
    }
    const uint64_t key = candidate_key(best, (level.first_anchor + cell) * levels.num_classes + label);
    bool hit = cell < level.items && best >= cutoff;
    uint32_t found;
    uint32_t place = reserve(hit ? 1 : 0, found);
    if (found > candidates.room) {
        const auto key_at = [&](uint32_t, uint64_t& own) {
            own = key;
            return hit;
        };
        const uint64_t least = key_of_rank<kAnchorThreads>(1, key_at, candidates.room);
        hit = hit && key >= least;
        place = reserve(hit ? 1 : 0, found);
    }
    if (hit) candidates.keys[static_cast<int64_t>(blockIdx.x) * candidates.room + place] = key;
    if (threadIdx.x == 0) candidates.counts[blockIdx.x] = found;
}

// The exclusive sum of the values of the threads before this one, and in `total` the sum of all. All kSelectThreads
// threads of the block call it.
__device__ uint32_t sum_before(uint32_t value, uint32_t& total) {
    __shared__ uint32_t ends[kWarp];  // of each warp
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    const auto up_to = [&](uint32_t own) {
        for (int distance = 1; distance < kWarp; distance *= 2) {
            const uint32_t before = __shfl_up_sync(kFullWarp, own, distance);
            if (lane >= distance) own += before;
        }
        return own;
    };
    const uint32_t in_warp = up_to(value);
    if (lane == kWarp - 1) ends[warp] = in_warp;
    __syncthreads();
    if (warp == 0) ends[lane] = up_to(ends[lane]);
    __syncthreads();
    total = ends[kWarp - 1];
    return (warp > 0 ? ends[warp - 1] : 0) + in_warp - value;
}

// Blocks [B]: the best `most` keys of each image in any order, then zeros, below all keys. -> selected [B, length],
// selected_counts [B]
__global__ void __launch_bounds__(kSelectThreads)
    select_best(Candidates candidates, uint32_t most, uint64_t* selected, int64_t length, uint32_t* selected_counts) {
    constexpr uint32_t kStaged = 4096;  // keys that are read once
    __shared__ uint64_t staged[kStaged];
    __shared__ uint32_t starts[kSelectThreads];  // of the lists of each thread among all keys of the image
    const int64_t image = blockIdx.x, lists_each = ceil_div(candidates.lists, kSelectThreads);
    const uint64_t* keys = candidates.keys + image * candidates.lists * candidates.room;
    const uint32_t* counts = candidates.counts + image * candidates.lists;
    selected += image * length;
    uint32_t own = 0, n;
    for (int64_t list = threadIdx.x * lists_each; list < (threadIdx.x + 1) * lists_each; ++list)
        if (list < candidates.lists) own += counts[list];
    starts[threadIdx.x] = sum_before(own, n);
    __syncthreads();
    const auto read = [&](uint32_t i) {
        uint32_t group = 0;  // becomes the last one that starts at or before i: it holds i
#pragma unroll
        for (uint32_t step = kSelectThreads / 2; step > 0; step /= 2)
            if (starts[group + step] <= i) group += step;
        int64_t list = group * lists_each;
        for (i -= starts[group]; i >= counts[list]; ++list) i -= counts[list];
        return keys[list * candidates.room + i];
    };
    for (uint32_t i = threadIdx.x; i < n && i < kStaged; i += kSelectThreads) staged[i] = read(i);  // for itself alone
    const auto key_at = [&](uint32_t i, uint64_t& key) {
        i = i * kSelectThreads + threadIdx.x;
        if (i < n) key = i < kStaged ? staged[i] : read(i);
        return i < n;
    };
    const uint32_t rounds = static_cast<uint32_t>(ceil_div(n, kSelectThreads));
    const uint64_t least = n > most ? key_of_rank<kSelectThreads>(rounds, key_at, most) : 0;
    uint64_t key = 0;
    uint32_t wanted = 0, total;
    for (uint32_t i = 0; i < rounds; ++i) wanted += key_at(i, key) && key >= least ? 1 : 0;
    uint32_t place = reserve(wanted, total);
    for (uint32_t i = 0; i < rounds; ++i)
        if (key_at(i, key) && key >= least) selected[place++] = key;
    for (int64_t i = total + threadIdx.x; i < length; i += kSelectThreads) selected[i] = 0;
    if (threadIdx.x == 0) selected_counts[image] = total;
}

// What is known of the candidate at each rank.
struct RankedKeys {
    uint32_t* indices;  // [B, ranks] anchor * num_classes + class
    float* scores;      // [B, ranks]
};

// The box of the candidate of threadIdx.x, for a block of threads (kCountKeys, kCountParts): all of them load, so that
// every logit of a candidate is on its way at once. `anchor` is negative where there is no candidate.
template <typename T>
__device__ Box<float> decode_candidate(const BoxLevels& levels, int64_t bins, int64_t image, int64_t anchor) {
    constexpr int kLoads = 8, kMostChannels = kLoads * kCountParts;
    __shared__ float staged[kMostChannels][kCountKeys];
    __shared__ float distances[4][kCountKeys];
    const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
    const bool present = anchor >= 0;
    int l = 0;
    while (anchor >= levels.maps[l].height * levels.maps[l].width) {
        anchor -= levels.maps[l].height * levels.maps[l].width;
        ++l;
    }
    const Map& map = levels.maps[l];
    const uint32_t cell = present ? static_cast<uint32_t>(anchor) : 0, width = static_cast<uint32_t>(map.width);
    const int64_t row = cell / width, column = cell % width;
    const T* logits = static_cast<const T*>(map.data) + image * map.stride_batch + row * map.stride_height +
                      column * map.stride_width;
    if (4 * bins <= kMostChannels) {
        T loaded[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i)
            if (present && y + i * kCountParts < 4 * bins)
                loaded[i] = logits[(y + i * kCountParts) * map.stride_channel];
#pragma unroll
        for (int i = 0; i < kLoads; ++i)
            if (present && y + i * kCountParts < 4 * bins) staged[y + i * kCountParts][x] = to_float(loaded[i]);
        __syncthreads();
        if (present && y < 4) distances[y][x] = dfl_expectation(&staged[y * bins][x], kCountKeys, bins);
    } else if (present && y < 4) {
        distances[y][x] = dfl_expectation(logits + y * bins * map.stride_channel, map.stride_channel, bins);
    }
    __syncthreads();
    if (!present) return {};
    return distances_to_box(distances[0][x], distances[1][x], distances[2][x], distances[3][x], column, row,
                            levels.strides[l]);
}

// Threads (kCountKeys, kCountParts), blocks [B, length / kCountKeys]: a candidate for each threadIdx.x. keys [B,
// length], of them counts [B], in descending order or, where not `sorted`, in any; of the best ranked.n ->
// ranked.boxes, groups, removed; ranked_keys
template <typename T>
__global__ void __launch_bounds__(kCountKeys* kCountParts, 4)
    decode_candidates(const __grid_constant__ BoxLevels levels, int64_t bins, uint32_t num_classes,
                      const uint64_t* keys, int64_t length, const uint32_t* counts, bool sorted, Ranked<float> ranked,
                      RankedKeys ranked_keys) {
    const uint32_t blocks = static_cast<uint32_t>(ceil_div(length, kCountKeys)), image = blockIdx.x / blocks;
    const int64_t first = int64_t{blockIdx.x % blocks} * kCountKeys, place = first + threadIdx.x;
    const int64_t count = counts[image];
    if (first >= count) return;
    keys += int64_t{image} * length;
    const uint64_t key = place < count ? keys[place] : 0;
    const int64_t rank = sorted ? place : count_above(key, count, [&](int64_t i) { return keys[i]; });
    const bool present = place < count && rank < ranked.n;
    const uint32_t index = candidate_index(key);
    const Box<float> box = decode_candidate<T>(levels, bins, image, present ? int64_t{index / num_classes} : -1);
    if (!present) return;
    const int64_t slot = int64_t{image} * ranked.n + rank;
    if (threadIdx.y == 0) {
        ranked.boxes[slot] = box;
        ranked.removed[slot] = !is_finite(box);  // keeps its place among the best, but neither appears nor suppresses
        if (ranked.groups) ranked.groups[slot] = index % num_classes;
        ranked_keys.indices[slot] = index;
    } else if (threadIdx.y == kCountParts - 1) {  // of another warp, which has nothing else to do
        ranked_keys.scores[slot] = sigmoid(candidate_logit(key));
    }
}

struct WriteDetections {
    const Box<float>* boxes;  // [B, ranks]
    RankedKeys keys;
    int64_t ranks, most;
    uint32_t num_classes;
    DetectionsOut out;

    __device__ void operator()(int64_t image, int64_t rank, int64_t slot) const {
        const int64_t from = image * ranks + rank, to = image * most + slot;
        const Box<float> box = boxes[from];
        float* target = out.boxes + 4 * to;
        target[0] = box.x1;
        target[1] = box.y1;
        target[2] = box.x2;
        target[3] = box.y2;
        out.scores[to] = keys.scores[from];
        out.labels[to] = keys.indices[from] % num_classes;
        out.anchors[to] = keys.indices[from] / num_classes;
    }
    __device__ void finish(int64_t image, int64_t count) const {  // the padding
        if (threadIdx.x == 0) out.counts[image] = count;
        for (int64_t i = image * most + count + threadIdx.x; i < (image + 1) * most; i += blockDim.x) {
            for (int side = 0; side < 4; ++side) out.boxes[4 * i + side] = 0.0f;
            out.scores[i] = 0.0f;
            out.labels[i] = -1;
            out.anchors[i] = -1;
        }
    }
};

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
        level.blocks = static_cast<uint32_t>(ceil_div(level.items, options.multi_label ? kScanBlock : kAnchorThreads));
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
    ClassLevels classes;
    Candidates candidates;
    int64_t ranks;  // candidates that enter the NMS, at most
    bool sorts;     // else ranks are counted
    int64_t length;
    uint64_t* selected;         // [B, length]
    uint32_t* selected_counts;  // [B]
    RankedKeys ranked_keys;
    Ranked<float> ranked;
    size_t bytes;

    Buffers(void* workspace, const Level* levels, int num_levels, const DecodeNmsOptions& options) {
        int64_t anchors = 0;
        for (int l = 0; l < num_levels; ++l) anchors += levels[l].class_logits.height * levels[l].class_logits.width;
        if (anchors * options.num_classes > std::numeric_limits<uint32_t>::max())
            throw std::invalid_argument("decode_nms: more than 2^32 - 1 candidates in an image");
        classes = class_levels(levels, num_levels, options);
        const int64_t most = options.multi_label ? anchors * options.num_classes : anchors;
        ranks = options.pre_nms_top_k < most ? options.pre_nms_top_k : most;
        if (ranks < 1) ranks = 1;  // one empty chunk writes the counts and the padding
        sorts = !counting_pays(options.batch, ranks);
        // More than can enter the NMS where that spares the selection.
        const int64_t cheap = cheap_to_count(options.batch);
        length = sorts ? sort_length(ranks) : ranks > cheap ? ranks : cheap < most ? cheap : most > 0 ? most : 1;
        const int64_t block = options.multi_label ? kScanBlock : kAnchorThreads;
        candidates.lists = classes.blocks;
        candidates.room = static_cast<uint32_t>(ranks < block ? ranks : block);
        Slices slices(workspace);
        candidates.keys = slices.take<uint64_t>(options.batch * candidates.lists * candidates.room);
        candidates.counts = slices.take<uint32_t>(options.batch * candidates.lists);
        selected = slices.take<uint64_t>(options.batch * length);
        selected_counts = slices.take<uint32_t>(options.batch);
        ranked_keys.indices = slices.take<uint32_t>(options.batch * ranks);
        ranked_keys.scores = slices.take<float>(options.batch * ranks);
        ranked = take_ranked<float>(slices, options.batch, ranks, options.max_detections, selected_counts,
                                    !options.class_agnostic);
        bytes = slices.bytes();
    }
};

template <typename T>
void enqueue(const Queue& queue, const Level* levels, int num_levels, const DecodeNmsOptions& options,
             const DetectionsOut& out, const Buffers& buffers) {
    const BoxLevels boxes = box_levels(levels, num_levels);
    const Ranked<float>& ranked = buffers.ranked;
    const ClassLevels& classes = buffers.classes;
    queue.launch(options.multi_label ? scan_logits<T> : scan_anchors<T>, options.batch * classes.blocks,
                 options.multi_label ? kScanThreads : kAnchorThreads, classes, cutoff_logit(options.score_threshold),
                 buffers.candidates);
    queue.launch(select_best, options.batch, kSelectThreads, buffers.candidates,
                 static_cast<uint32_t>(buffers.sorts ? buffers.ranks : buffers.length), buffers.selected,
                 buffers.length, buffers.selected_counts);
    if (buffers.sorts) sort_descending(queue, buffers.selected, options.batch, buffers.length);
    queue.launch(decode_candidates<T>, options.batch * ceil_div(buffers.length, kCountKeys),
                 dim3(kCountKeys, kCountParts), boxes, options.bins, classes.num_classes, buffers.selected,
                 buffers.length, buffers.selected_counts, buffers.sorts, ranked, buffers.ranked_keys);
    greedy_nms(
        queue, ranked, options.iou_threshold,
        WriteDetections{ranked.boxes, buffers.ranked_keys, ranked.n, options.max_detections, classes.num_classes, out});
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
