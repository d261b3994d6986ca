// Distribution focal loss: cross entropy of each row's softmax with the two bins around its target distance.
#include <algorithm>

#include "../dfl.h"
#include "../ops.h"
#include "dfl_tile.h"
#include "parallel.h"

namespace yolonas::cpu {

namespace {

constexpr int64_t kTaskRows = 128 * kLanes;  // some 100 us of work, five times what a thread costs

// Calls body(first, lanes, tile) for every kLanes rows.
template <typename T, typename Body>
void for_all_rows(int64_t rows, int64_t bins, int threads, const Body& body) {
    parallel_for((rows + kTaskRows - 1) / kTaskRows, threads, [&](int64_t task) {
        Tile<Real<T>> tile(bins);
        const int64_t end = std::min(rows, (task + 1) * kTaskRows);
        for (int64_t first = task * kTaskRows; first < end; first += kLanes)
            body(first, static_cast<int>(std::min<int64_t>(kLanes, end - first)), tile);
    });
}

template <typename T>
void loss_of_rows(const Rows& logits, const Real<T>* targets, int64_t first, int lanes, Tile<Real<T>>& tile,
                  Real<T>* loss) {
    int64_t offsets[kLanes];
    Target<Real<T>> target[kLanes];
    Real<T> x_lower[kLanes], x_upper[kLanes];
    for (int l = 0; l < lanes; ++l) offsets[l] = (first + l) * logits.stride_row;
    tile.load(static_cast<const T*>(logits.data), offsets, lanes, logits.stride_bin);
    for (int l = 0; l < lanes; ++l) {
        target[l] = dfl_target(targets[first + l], logits.bins);
        x_lower[l] = tile.value(target[l].lower, l);
        x_upper[l] = tile.value(target[l].lower + 1, l);
    }
    tile.softmax();
    for (int l = 0; l < lanes; ++l)
        loss[first + l] = dfl_cross_entropy(tile.largest[l], tile.total[l], target[l], x_lower[l], x_upper[l]);
}

template <typename T>
void backward_of_rows(const Real<T>* gradient, const Rows& logits, const Real<T>* targets, int64_t first, int lanes,
                      Tile<Real<T>>& tile, const Rows& out) {
    int64_t from_offsets[kLanes], to_offsets[kLanes], rows[kLanes];
    Real<T> scale[kLanes];
    int active = 0;
    for (int l = 0; l < lanes; ++l) {  // a gradient of 0, as of a weight of 0: those logits need not be read
        rows[active] = first + l;
        from_offsets[active] = (first + l) * logits.stride_row;
        to_offsets[active] = (first + l) * out.stride_row;
        active += gradient[first + l] != 0;
    }
    if (active == 0) return;
    tile.load(static_cast<const T*>(logits.data), from_offsets, active, logits.stride_bin);
    tile.softmax();
    for (int l = 0; l < active; ++l) scale[l] = gradient[rows[l]] / tile.total[l];
    tile.transform([&](Real<T> e, int64_t, int l) { return e * scale[l]; });
    for (int l = 0; l < active; ++l) {
        const auto target = dfl_target(targets[rows[l]], logits.bins);
        tile.value(target.lower, l) -= target.near * gradient[rows[l]];
        tile.value(target.lower + 1, l) -= target.far * gradient[rows[l]];
    }
    tile.store(static_cast<T*>(const_cast<void*>(out.data)), to_offsets, active, out.stride_bin);
}

}  // namespace

void dfl_loss(const Rows& logits, ScalarType type, const void* targets, void* loss, int threads) {
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        for_all_rows<T>(logits.rows, logits.bins, threads, [&](int64_t first, int lanes, Tile<Real<T>>& tile) {
            loss_of_rows<T>(logits, static_cast<const Real<T>*>(targets), first, lanes, tile,
                            static_cast<Real<T>*>(loss));
        });
    });
}

void dfl_loss_backward(const void* gradient, const Rows& logits, ScalarType type, const void* targets,
                       const Rows& logit_gradients, int threads) {
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        for_all_rows<T>(logits.rows, logits.bins, threads, [&](int64_t first, int lanes, Tile<Real<T>>& tile) {
            backward_of_rows<T>(static_cast<const Real<T>*>(gradient), logits, static_cast<const Real<T>*>(targets),
                                first, lanes, tile, logit_gradients);
        });
    });
}

}  // namespace yolonas::cpu
