// The Python module `yolonas._core`: the ops on plain addresses, sizes and strides. It links neither torch nor NumPy,
// so one binary serves any torch, with or without CUDA, and people who have none. Arguments are checked by the Python
// callers (yolonas.ops), which own every buffer.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "../core/ops.h"

namespace py = pybind11;
using namespace yolonas;

namespace {

// address, height, width, strides of batch, channel, height, width
using MapArgument = std::array<int64_t, 7>;

Map to_map(const MapArgument& a) {
    return {reinterpret_cast<const void*>(static_cast<uintptr_t>(a[0])), a[1], a[2], a[3], a[4], a[5], a[6]};
}

// address, rows, bins, strides of row, bin
using RowsArgument = std::array<int64_t, 5>;

Rows to_rows(const RowsArgument& a) {
    return {reinterpret_cast<const void*>(static_cast<uintptr_t>(a[0])), a[1], a[2], a[3], a[4]};
}

template <typename T>
T* pointer(int64_t address) {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

std::vector<Level> to_levels(const std::vector<MapArgument>& class_logits, const std::vector<MapArgument>& box_logits,
                             const std::vector<float>& strides) {
    std::vector<Level> levels;
    for (size_t l = 0; l < strides.size(); ++l)
        levels.push_back({to_map(class_logits.at(l)), to_map(box_logits.at(l)), strides[l]});
    return levels;
}

std::vector<Map> to_maps(const std::vector<MapArgument>& arguments) {
    std::vector<Map> maps;
    for (const auto& argument : arguments) maps.push_back(to_map(argument));
    return maps;
}

// boxes, scores, labels, anchors, counts
DetectionsOut to_out(const std::array<int64_t, 5>& a) {
    return {pointer<float>(a[0]), pointer<float>(a[1]), pointer<int64_t>(a[2]), pointer<int64_t>(a[3]),
            pointer<int64_t>(a[4])};
}

void decode_nms_cpu(const std::vector<MapArgument>& class_logits, const std::vector<MapArgument>& box_logits,
                    const std::vector<float>& strides, int type, const DecodeNmsOptions& options,
                    const std::array<int64_t, 5>& out, int threads) {
    const auto levels = to_levels(class_logits, box_logits, strides);
    cpu::decode_nms(levels.data(), static_cast<int>(levels.size()), static_cast<ScalarType>(type), options, to_out(out),
                    threads);
}

// -> seconds of scan, select, decode, nms, on one thread
std::tuple<double, double, double, double> decode_nms_cpu_stages(const std::vector<MapArgument>& class_logits,
                                                                 const std::vector<MapArgument>& box_logits,
                                                                 const std::vector<float>& strides, int type,
                                                                 const DecodeNmsOptions& options,
                                                                 const std::array<int64_t, 5>& out) {
    const auto levels = to_levels(class_logits, box_logits, strides);
    cpu::StageTimes times{};
    cpu::decode_nms(levels.data(), static_cast<int>(levels.size()), static_cast<ScalarType>(type), options, to_out(out),
                    1, &times);
    return {times.scan, times.select, times.decode, times.nms};
}

void dfl_decode_cpu(const std::vector<MapArgument>& box_logits, const std::vector<float>& strides, int type,
                    int64_t batch, int64_t bins, int64_t boxes, int threads) {
    const auto maps = to_maps(box_logits);
    cpu::dfl_decode(maps.data(), strides.data(), static_cast<int>(maps.size()), static_cast<ScalarType>(type), batch,
                    bins, pointer<void>(boxes), threads);
}

void dfl_decode_backward_cpu(int64_t gradient, const std::vector<MapArgument>& box_logits,
                             const std::vector<float>& strides, int type, int64_t batch, int64_t bins,
                             const std::vector<MapArgument>& logit_gradients, int threads) {
    const auto maps = to_maps(box_logits), gradients = to_maps(logit_gradients);
    cpu::dfl_decode_backward(pointer<const void>(gradient), maps.data(), strides.data(), static_cast<int>(maps.size()),
                             static_cast<ScalarType>(type), batch, bins, gradients.data(), threads);
}

void dfl_loss_cpu(const RowsArgument& logits, int type, int64_t targets, int64_t loss, int threads) {
    cpu::dfl_loss(to_rows(logits), static_cast<ScalarType>(type), pointer<const void>(targets), pointer<void>(loss),
                  threads);
}

void dfl_loss_backward_cpu(int64_t gradient, const RowsArgument& logits, int type, int64_t targets,
                           const RowsArgument& logit_gradients, int threads) {
    cpu::dfl_loss_backward(pointer<const void>(gradient), to_rows(logits), static_cast<ScalarType>(type),
                           pointer<const void>(targets), to_rows(logit_gradients), threads);
}

template <typename T>
int64_t batched_nms_cpu(int64_t boxes, int64_t scores, int64_t labels, int64_t n, double iou_threshold, int64_t keep) {
    return cpu::batched_nms(pointer<const T>(boxes), pointer<const T>(scores), pointer<const int64_t>(labels), n,
                            static_cast<T>(iou_threshold), pointer<int64_t>(keep));
}

#ifdef YOLONAS_WITH_CUDA

size_t decode_nms_workspace(const std::vector<MapArgument>& class_logits, const std::vector<MapArgument>& box_logits,
                            const std::vector<float>& strides, const DecodeNmsOptions& options) {
    const auto levels = to_levels(class_logits, box_logits, strides);
    return cuda::decode_nms_workspace(levels.data(), static_cast<int>(levels.size()), options);
}

void decode_nms_cuda(const std::vector<MapArgument>& class_logits, const std::vector<MapArgument>& box_logits,
                     const std::vector<float>& strides, int type, const DecodeNmsOptions& options,
                     const std::array<int64_t, 5>& out, int64_t workspace, int device, int64_t stream) {
    const auto levels = to_levels(class_logits, box_logits, strides);
    cuda::decode_nms(levels.data(), static_cast<int>(levels.size()), static_cast<ScalarType>(type), options,
                     to_out(out), pointer<void>(workspace), device, pointer<void>(stream));
}

void dfl_decode_cuda(const std::vector<MapArgument>& box_logits, const std::vector<float>& strides, int type,
                     int64_t batch, int64_t bins, int64_t boxes, int device, int64_t stream) {
    const auto maps = to_maps(box_logits);
    cuda::dfl_decode(maps.data(), strides.data(), static_cast<int>(maps.size()), static_cast<ScalarType>(type), batch,
                     bins, pointer<void>(boxes), device, pointer<void>(stream));
}

void dfl_decode_backward_cuda(int64_t gradient, const std::vector<MapArgument>& box_logits,
                              const std::vector<float>& strides, int type, int64_t batch, int64_t bins,
                              const std::vector<MapArgument>& logit_gradients, int device, int64_t stream) {
    const auto maps = to_maps(box_logits), gradients = to_maps(logit_gradients);
    cuda::dfl_decode_backward(pointer<const void>(gradient), maps.data(), strides.data(), static_cast<int>(maps.size()),
                              static_cast<ScalarType>(type), batch, bins, gradients.data(), device,
                              pointer<void>(stream));
}

void dfl_loss_cuda(const RowsArgument& logits, int type, int64_t targets, int64_t loss, int device, int64_t stream) {
    cuda::dfl_loss(to_rows(logits), static_cast<ScalarType>(type), pointer<const void>(targets), pointer<void>(loss),
                   device, pointer<void>(stream));
}

void dfl_loss_backward_cuda(int64_t gradient, const RowsArgument& logits, int type, int64_t targets,
                            const RowsArgument& logit_gradients, int device, int64_t stream) {
    cuda::dfl_loss_backward(pointer<const void>(gradient), to_rows(logits), static_cast<ScalarType>(type),
                            pointer<const void>(targets), to_rows(logit_gradients), device, pointer<void>(stream));
}

template <typename T>
void batched_nms_cuda(int64_t boxes, int64_t scores, int64_t labels, int64_t n, double iou_threshold, int64_t keep,
                      int64_t kept, int64_t workspace, int device, int64_t stream) {
    cuda::batched_nms(pointer<const T>(boxes), pointer<const T>(scores), pointer<const int64_t>(labels), n,
                      static_cast<T>(iou_threshold), pointer<int64_t>(keep), pointer<int64_t>(kept),
                      pointer<void>(workspace), device, pointer<void>(stream));
}

#endif

}  // namespace

PYBIND11_MODULE(_core, m) {
    m.attr("MAX_LEVELS") = kMaxLevels;

    py::class_<DecodeNmsOptions>(m, "DecodeNmsOptions")
        .def(py::init([](int64_t batch, int64_t num_classes, int64_t bins, float score_threshold, float iou_threshold,
                         int64_t pre_nms_top_k, int64_t max_detections, bool multi_label, bool class_agnostic) {
            return DecodeNmsOptions{batch,         num_classes,    bins,        score_threshold, iou_threshold,
                                    pre_nms_top_k, max_detections, multi_label, class_agnostic};
        }));

    const auto unlocked = py::call_guard<py::gil_scoped_release>();
    m.def("decode_nms_cpu", &decode_nms_cpu, unlocked);
    m.def("decode_nms_cpu_stages", &decode_nms_cpu_stages, unlocked);
    m.def("dfl_decode_cpu", &dfl_decode_cpu, unlocked);
    m.def("dfl_decode_backward_cpu", &dfl_decode_backward_cpu, unlocked);
    m.def("dfl_loss_cpu", &dfl_loss_cpu, unlocked);
    m.def("dfl_loss_backward_cpu", &dfl_loss_backward_cpu, unlocked);
    m.def("batched_nms_cpu_float32", &batched_nms_cpu<float>, unlocked);
    m.def("batched_nms_cpu_float64", &batched_nms_cpu<double>, unlocked);

#ifdef YOLONAS_WITH_CUDA
    m.attr("WITH_CUDA") = true;
    m.def("decode_nms_workspace", &decode_nms_workspace);
    m.def("decode_nms_cuda", &decode_nms_cuda, unlocked);
    m.def("dfl_decode_cuda", &dfl_decode_cuda, unlocked);
    m.def("dfl_decode_backward_cuda", &dfl_decode_backward_cuda, unlocked);
    m.def("dfl_loss_cuda", &dfl_loss_cuda, unlocked);
    m.def("dfl_loss_backward_cuda", &dfl_loss_backward_cuda, unlocked);
    m.def("batched_nms_workspace_float32", &cuda::batched_nms_workspace<float>);
    m.def("batched_nms_workspace_float64", &cuda::batched_nms_workspace<double>);
    m.def("batched_nms_cuda_float32", &batched_nms_cuda<float>, unlocked);
    m.def("batched_nms_cuda_float64", &batched_nms_cuda<double>, unlocked);
#else
    m.attr("WITH_CUDA") = false;
#endif
}
