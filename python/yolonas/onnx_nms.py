"""Decoding and NMS as part of an ONNX graph, with the two output contracts of super-gradients' exporter."""

from __future__ import annotations

from typing import Any

import numpy as np

from yolonas.exported import RAW_OUTPUT_NAMES
from yolonas.extras import require
from yolonas.model.config import REG_MAX, STRIDES


def append_nms(model: Any, output: str, num_classes: int, nms: dict[str, Any], *, for_openvino: bool = False) -> Any:
    """A ModelProto of the raw network with decoding and NMS behind it, for images of any number and size.

    nms: score_threshold, iou_threshold, pre_nms_top_k, max_detections. The rules are those of
    `yolonas.ops.decode_nms`: of all (anchor, class) pairs of an image the best pre_nms_top_k with score >
    score_threshold enter the NMS, a box is dropped when its IoU with a better one of its class is > iou_threshold, and
    the best max_detections are left, sorted by score. (super-gradients takes its top k over anchors by their best
    class, and cuts before it sorts, which loses high scores of late classes.)
    output "flat": [N, 7] float32: image, x1, y1, x2, y2 in canvas px, score, class, the images one after the other.
    output "batch": num_predictions [B, 1] int64, pred_boxes [B, max_detections, 4], pred_scores [B, max_detections],
    pred_classes [B, max_detections] int64, unused places -1.
    OpenVINO's NonMaxSuppression drops a box whose IoU equals the threshold, so `for_openvino` sets the next number.
    It also leaves the order of equal logits open.
    """
    onnx = require("onnx", "onnx", "an export to ONNX")
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if for_openvino:
        nms = nms | {"iou_threshold": float(np.nextafter(np.float32(nms["iou_threshold"]), np.float32(2)))}
    tail = onnx.parser.parse_model(_text(model.ir_version, opset, output, num_classes, nms))
    pairs = [(name, name) for name in RAW_OUTPUT_NAMES]
    return onnx.compose.merge_models(model, tail, io_map=pairs)


def _text(ir_version: int, opset: int, output: str, num_classes: int, nms: dict[str, Any]) -> str:
    """The graph behind the raw maps in ONNX's text format. A = anchors of a level or of all, K = candidates."""
    bins = REG_MAX + 1
    maps = [f"float[B,{num_classes},H{s},W{s}] class_{s}" for s in STRIDES]
    maps += [f"float[B,{4 * bins},H{s},W{s}] box_{s}" for s in STRIDES]
    results = {
        "flat": "float[N,7] flat_predictions",
        "batch": f"int64[B,1] num_predictions, float[B,{nms['max_detections']},4] pred_boxes, "
        f"float[B,{nms['max_detections']}] pred_scores, int64[B,{nms['max_detections']}] pred_classes",
    }[output]
    return f"""<ir_version: {ir_version}, opset_import: ["" : {opset}]>
decode_nms ({", ".join(maps)}) => ({results})
<
  int64 zero = {{0}}, int64 one = {{1}}, int64[1] axis_0 = {{0}}, int64[1] axis_1 = {{1}}, int64[1] axis_2 = {{2}},
  int64[1] all = {{-1}}, float half = {{0.5}}, float minus_one = {{-1}},
  float[1,{bins}] bins = {{{", ".join(str(i) for i in range(bins))}}},
  int64[4] per_side = {{0, 4, {bins}, -1}}, int64[3] per_class = {{0, {num_classes}, -1}}, int64[2] flat = {{0, -1}},
  int64 classes = {{{num_classes}}},
  int64[1] top_k = {{{nms["pre_nms_top_k"]}}}, int64[1] most = {{{nms["max_detections"]}}},
  float score_threshold = {{{float(nms["score_threshold"])!r}}},
  float[1] iou_threshold = {{{float(nms["iou_threshold"])!r}}}, float[1] any_rank = {{0}}
>
{{
{"".join(_LEVEL.replace("@", str(stride)) for stride in STRIDES)}
  boxes_last = Concat <axis = 2> (boxes_8, boxes_16, boxes_32)
  boxes = Transpose <perm = [0, 2, 1]> (boxes_last)                          # [B, A, 4]
  logits_last = Concat <axis = 2> (logits_8, logits_16, logits_32)
  logits = Transpose <perm = [0, 2, 1]> (logits_last)                        # [B, A, C]
{_NMS}
{_FLAT if output == "flat" else _BATCH}
}}"""


# Each side's expectation of its distribution, in grid units, from the centre of the anchor's cell.
_LEVEL = """
  stride_@ = Constant <value = float {@}> ()
  distribution_@ = Reshape (box_@, per_side)                                 # [B, 4, bins, A]
  probability_@ = Softmax <axis = 2> (distribution_@)
  expectation_@ = MatMul (bins, probability_@)
  sides_@ = Squeeze (expectation_@, axis_2)                                  # [B, 4, A]
  height_1_@ = Shape <start = 2, end = 3> (class_@)
  width_1_@ = Shape <start = 3, end = 4> (class_@)
  height_@ = Squeeze (height_1_@)
  width_@ = Squeeze (width_1_@)
  size_@ = Concat <axis = 0> (height_1_@, width_1_@)
  columns_@ = Range (zero, width_@, one)
  rows_@ = Range (zero, height_@, one)
  rows_2d_@ = Unsqueeze (rows_@, axis_1)
  x_grid_@ = Expand (columns_@, size_@)
  y_grid_@ = Expand (rows_2d_@, size_@)
  x_@ = Reshape (x_grid_@, all)
  y_@ = Reshape (y_grid_@, all)
  x_row_@ = Unsqueeze (x_@, axis_0)
  y_row_@ = Unsqueeze (y_@, axis_0)
  corners_@ = Concat <axis = 0> (x_row_@, y_row_@)
  corners_float_@ = Cast <to = 1> (corners_@)
  centres_@ = Add (corners_float_@, half)                                    # [2, A]
  left_top_@, right_bottom_@ = Split <axis = 1, num_outputs = 2> (sides_@)
  start_@ = Sub (centres_@, left_top_@)
  end_@ = Add (centres_@, right_bottom_@)
  grid_boxes_@ = Concat <axis = 1> (start_@, end_@)
  boxes_@ = Mul (grid_boxes_@, stride_@)                                     # [B, 4, A] xyxy canvas px
  logits_@ = Reshape (class_@, per_class)                                    # [B, C, A]
"""

# NonMaxSuppression gets each candidate's rank instead of its score: ranks have no ties, so the order is that of the
# logits, as in our ops, and "kept" over the candidates is sorted without another sort.
_NMS = """
  pair_logits = Reshape (logits, flat)                                       # [B, A * C]
  pairs = Shape <start = 1, end = 2> (pair_logits)
  wanted = Min (pairs, top_k)
  best_logits, best_pairs = TopK <axis = 1> (pair_logits, wanted)            # [B, K]
  anchors = Div (best_pairs, classes)
  anchor_times_classes = Mul (anchors, classes)
  labels = Sub (best_pairs, anchor_times_classes)
  scores = Sigmoid (best_logits)
  anchor_index = Unsqueeze (anchors, axis_2)
  candidates = GatherND <batch_dims = 1> (boxes, anchor_index)               # [B, K, 4]

  count_1 = Shape <start = 1, end = 2> (best_logits)
  count = Squeeze (count_1)
  place = Range (zero, count, one)
  rank_last_first = Sub (count, place)
  rank_of_place = Cast <to = 1> (rank_last_first)                            # K, K - 1, ..., 1
  eligible = Greater (scores, score_threshold)
  rank = Where (eligible, rank_of_place, minus_one)                          # [B, K]
  class_index = Range (zero, classes, one)
  class_column = Unsqueeze (class_index, axis_1)
  label_row = Unsqueeze (labels, axis_1)
  rank_row = Unsqueeze (rank, axis_1)
  of_class = Equal (label_row, class_column)                                 # [B, C, K]
  rank_in_class = Where (of_class, rank_row, minus_one)
  selected = NonMaxSuppression (candidates, rank_in_class, most, iou_threshold, any_rank)   # image, class, candidate
  image_index, class_of_selected, candidate_index = Split <axis = 1, num_outputs = 3> (selected)
  kept_index = Concat <axis = 1> (image_index, candidate_index)
  selected_shape = Shape <start = 0, end = 1> (selected)
  ones = Expand (one, selected_shape)
  mask_shape = Shape (best_logits)
  none_kept = ConstantOfShape <value = int64[1] {0}> (mask_shape)
  kept = ScatterND (none_kept, kept_index, ones)                             # [B, K] 1 where the NMS keeps
  number = CumSum (kept, one)
  number_within = LessOrEqual (number, most)
  is_kept = Equal (kept, one)
  is_output = And (is_kept, number_within)
  output_last = NonZero (is_output)
  output_index = Transpose <perm = [1, 0]> (output_last)                     # [N, 2] image, candidate; best first
  out_boxes = GatherND (candidates, output_index)                            # [N, 4]
  out_scores = GatherND (scores, output_index)
  out_labels = GatherND (labels, output_index)
  out_images, out_candidates = Split <axis = 1, num_outputs = 2> (output_index)
"""

_FLAT = """
  out_images_float = Cast <to = 1> (out_images)
  out_scores_2d = Unsqueeze (out_scores, axis_1)
  out_labels_float = Cast <to = 1> (out_labels)
  out_labels_2d = Unsqueeze (out_labels_float, axis_1)
  flat_predictions = Concat <axis = 1> (out_images_float, out_boxes, out_scores_2d, out_labels_2d)
"""

_BATCH = """
  output_number = Cast <to = 7> (is_output)
  num_predictions = ReduceSum <keepdims = 1> (output_number, axis_1)         # [B, 1]
  out_number = GatherND (number, output_index)
  out_number_2d = Unsqueeze (out_number, axis_1)
  out_row = Sub (out_number_2d, one)
  slot = Concat <axis = 1> (out_images, out_row)                             # [N, 2] image, row of the table
  batch_1 = Shape <start = 0, end = 1> (best_logits)
  table_shape = Concat <axis = 0> (batch_1, most)
  four = Constant <value = int64[1] {4}> ()
  box_table_shape = Concat <axis = 0> (table_shape, four)
  no_boxes = ConstantOfShape <value = float[1] {-1}> (box_table_shape)
  no_scores = ConstantOfShape <value = float[1] {-1}> (table_shape)
  no_labels = ConstantOfShape <value = int64[1] {-1}> (table_shape)
  pred_boxes = ScatterND (no_boxes, slot, out_boxes)
  pred_scores = ScatterND (no_scores, slot, out_scores)
  pred_classes = ScatterND (no_labels, slot, out_labels)
"""
