"""Label configs, label mapping, regions, rotated boxes and the choice of the annotation that counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolonas.inference.detections import Detections
from yolonas.labelstudio import (
    EMPTY_SCORE,
    Control,
    LabelConfigError,
    boxes_from_annotation,
    choose_annotation,
    map_labels,
    parse_label_config,
    task_score,
    to_regions,
)

CONFIG = """
<View>
  <Image name="image" value="$image"/>
  <Choices name="quality" toName="image"><Choice value="good"/></Choices>
  <RectangleLabels name="label" toName="image" model_score_threshold="0.25">
    <Label value="Car" background="red" predicted_values="car, truck"/>
    <Label value="Person"/>
  </RectangleLabels>
</View>"""
CONTROL = Control("label", "image", "image", ("Car", "Person", "Traffic Light"), {"Car": ("car", "truck")})


def detections(boxes, scores, labels, names=("Car", "Person"), size=(240, 320)) -> Detections:
    return Detections(np.array(boxes, np.float32).reshape(-1, 4), scores, labels, names, size)


# -- label config


def test_a_label_config_as_label_studio_sends_it() -> None:
    (control,) = parse_label_config(CONFIG)
    assert control == Control(
        from_name="label",
        to_name="image",
        data_key="image",
        labels=("Car", "Person"),
        predicted_values={"Car": ("car", "truck")},
        score_threshold=0.25,
    )


def test_several_controls_on_several_images() -> None:
    controls = parse_label_config(
        """<View><Image name="a" value="$left.url"/><Image name="b" value="$right"/>
        <RectangleLabels name="x" toName="a" score_threshold="0.5" model_skip="True"><Label value="Car"/>
        </RectangleLabels>
        <RectangleLabels name="y" toName="b" model_score_threshold="0.1" score_threshold="0.5"><Label value="Cat"/>
        </RectangleLabels></View>"""
    )
    assert [(c.from_name, c.to_name, c.data_key, c.skip, c.score_threshold) for c in controls] == [
        ("x", "a", "left.url", True, 0.5),
        ("y", "b", "right", False, 0.1),
    ]
    assert controls[0].task_value({"left": {"url": "/a.jpg"}}) == "/a.jpg"
    assert controls[0].task_value({"left.url": "/b.jpg"}) == "/b.jpg"
    assert controls[0].task_value({"left": "/c.jpg"}) is None
    assert controls[1].task_value({"right": 7}) is None


def test_an_alias_is_what_results_hold() -> None:
    (control,) = parse_label_config(
        '<View><Image name="i" value="$i"/><RectangleLabels name="l" toName="i">'
        '<Label value="Traffic light" alias="T"/><Label value="Car"/></RectangleLabels></View>'
    )
    assert control.labels == ("T", "Car")
    assert map_labels(control, ["traffic_light", "car"]).to_label == {0: "T", 1: "Car"}


@pytest.mark.parametrize(
    "xml",
    [
        "<View/>",
        '<View><Text name="t" value="$t"/><Labels name="l" toName="t"><Label value="A"/></Labels></View>',
        '<View><Video name="v" value="$v"/><RectangleLabels name="l" toName="v"/></View>',
        '<View><Image name="i" valueList="$is"/><RectangleLabels name="l" toName="i"/></View>',
        '<View><Image name="i" value="https://x.org/1.jpg"/><RectangleLabels name="l" toName="i"/></View>',
    ],
)
def test_configs_without_rectangles_on_an_image(xml: str) -> None:
    assert parse_label_config(xml) == []


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        ("<View>", "not well-formed"),
        ("", "not well-formed"),
        ('<!DOCTYPE v [<!ENTITY a "b">]><View/>', "DOCTYPE"),
        (CONFIG.replace("0.25", "high"), 'model_score_threshold="high"'),
        (CONFIG.replace("0.25", "nan"), "not a number from 0 to 1"),
        (CONFIG.replace("0.25", "25"), "not a number from 0 to 1"),
    ],
)
def test_bad_configs_are_one_sentence(xml: str, message: str) -> None:
    with pytest.raises(LabelConfigError, match=message) as raised:
        parse_label_config(xml)
    assert "\n" not in str(raised.value)


# -- mapping


def test_labels_map_by_predicted_values_then_by_name() -> None:
    mapping = map_labels(CONTROL, ["person", "car", "truck", "traffic_light", "dog"])
    assert mapping.to_label == {0: "Person", 1: "Car", 2: "Car", 3: "Traffic Light"}
    assert mapping.unmatched == ()
    assert map_labels(CONTROL, ["dog"]).unmatched == ("Car", "Person", "Traffic Light")


def test_predicted_values_come_before_names() -> None:
    control = Control("l", "i", "i", ("car", "vehicle"), {"vehicle": ("car",)})
    mapping = map_labels(control, ["car"])
    assert mapping.to_label == {0: "vehicle"}
    assert mapping.unmatched == ("car",)


def test_a_version_trained_in_the_project_maps_its_labels_to_themselves() -> None:
    mapping = map_labels(CONTROL, ["Person", "truck", "person", "Car"], own=True)
    assert mapping.to_label == {0: "Person", 3: "Car"}
    assert mapping.unmatched == ("Traffic Light",)


# -- regions


def test_a_region_as_label_studio_stores_it() -> None:
    found = detections([[32, 48, 128, 144]], [0.75], [0])
    (region,) = to_regions(found, CONTROL, map_labels(CONTROL, found.names))
    assert len(region.pop("id")) == 10
    assert region == {
        "from_name": "label",
        "to_name": "image",
        "type": "rectanglelabels",
        "original_width": 320,
        "original_height": 240,
        "image_rotation": 0,
        "score": 0.75,
        "value": {"x": 10.0, "y": 20.0, "width": 30.0, "height": 40.0, "rotation": 0, "rectanglelabels": ["Car"]},
    }


def test_regions_are_thresholded_mapped_and_sorted() -> None:
    found = detections([[0, 0, 9, 9]] * 4, [0.3, 0.9, 0.5, 0.8], [0, 0, 0, 2], names=("car", "person", "dog"))
    regions = to_regions(found, CONTROL, map_labels(CONTROL, found.names), score_threshold=0.3)
    assert [round(region["score"], 6) for region in regions] == [0.9, 0.5]  # 0.3 is not above 0.3, a dog has no label
    assert len({region["id"] for region in regions}) == 2


def test_what_is_not_finite_or_has_no_area_is_left_out() -> None:
    boxes = [[0, 0, math.nan, 9], [5, 5, 5, 9], [400, 5, 500, 9], [1, 1, 9, 9], [1, 1, 9, 9]]
    found = detections(boxes, [0.9, 0.9, 0.9, math.nan, 0.9], [0] * 5)
    (region,) = to_regions(found, CONTROL, map_labels(CONTROL, found.names))
    assert region["score"] == pytest.approx(0.9)


edge = st.floats(-50, 700, width=32)


@given(st.lists(st.tuples(edge, edge, edge, edge), max_size=8), st.integers(1, 5000), st.integers(1, 5000))
def test_regions_stay_within_the_image(boxes: list[tuple[float, ...]], width: int, height: int) -> None:
    found = detections(boxes, [0.5] * len(boxes), [0] * len(boxes), size=(height, width))
    for region in to_regions(found, CONTROL, map_labels(CONTROL, found.names)):
        value = region["value"]
        assert 0 <= value["x"] <= value["x"] + value["width"] <= 100
        assert 0 <= value["y"] <= value["y"] + value["height"] <= 100
        assert value["width"] > 0
        assert value["height"] > 0


@given(st.tuples(*[st.integers(0, 100)] * 4), st.integers(100, 4000), st.integers(100, 4000))
def test_regions_read_back_as_the_same_boxes(corners: tuple[int, ...], width: int, height: int) -> None:
    x1, x2 = sorted(corners[:2])
    y1, y2 = sorted(corners[2:])
    found = detections([[x1, y1, x2 + 2, y2 + 2]], [0.5], [1], size=(height, width))
    expected = np.minimum(found.boxes, [[width, height, width, height]])
    boxes, labels = boxes_from_annotation(
        to_regions(found, CONTROL, map_labels(CONTROL, found.names)), CONTROL, width, height
    )
    if min(expected[0, 2:] - expected[0, :2]) >= 1:
        np.testing.assert_allclose(boxes, expected, atol=1e-3)
        assert labels == ["Person"]


# -- task score


def test_doubtful_images_come_first_then_empty_ones() -> None:
    doubtful, clear = task_score([0.45, 0.6]), task_score([0.95, 0.9])
    assert doubtful < task_score([]) == EMPTY_SCORE < clear
    assert task_score([0.5]) == 0
    assert task_score([1.0]) == 1
    assert task_score([0.5] + [0.01] * 10) < EMPTY_SCORE  # not drowned by faint boxes


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=50))
def test_task_scores_are_numbers_from_0_to_1(scores: list[float]) -> None:
    assert 0 <= task_score(scores) <= 1 + 1e-9


# -- annotations


def annotation(number: int, updated: str, **values: object) -> dict[str, object]:
    return {"id": number, "result": [], "updated_at": updated, "was_cancelled": False, "ground_truth": False, **values}


def test_the_newest_annotation_that_is_not_skipped_counts() -> None:
    old = annotation(1, "2026-11-21T19:39:34.632555Z")
    new = annotation(2, "2026-11-21T20:39:34.632555Z")
    skipped = annotation(3, "2026-11-22T00:00:00Z", was_cancelled=True)
    assert choose_annotation([new, skipped, old]) is new
    assert choose_annotation([skipped]) is None
    assert choose_annotation([]) is None
    assert choose_annotation(None) is None


def test_an_old_annotation_that_was_updated_is_newer() -> None:
    updated = annotation(1, "2026-11-21T20:00:00+01:00", created_at="2026-11-01T00:00:00Z")
    other = annotation(2, "2026-11-21T18:59:59Z")
    assert choose_annotation([other, updated]) is updated
    assert choose_annotation([annotation(1, "2026-11-21T20:00:00Z"), annotation(2, "2026-11-21T20:00:00Z")])["id"] == 2


def test_ground_truth_comes_first_unless_skipped() -> None:
    truth = annotation(1, "2026-11-21T19:00:00Z", ground_truth=True)
    new = annotation(2, "2026-11-21T20:00:00Z")
    assert choose_annotation([truth, new]) is truth
    assert choose_annotation([truth | {"was_cancelled": True}, new]) is new


# -- boxes


def rectangle(x: float, y: float, width: float, height: float, rotation: float = 0, label: str = "Car") -> dict:
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": rotation, "rectanglelabels": [label]}
    return {"from_name": "label", "to_name": "image", "type": "rectanglelabels", "value": value}


def test_a_quarter_turn_about_the_top_left_corner() -> None:
    # on a 200 x 100 image the corner is at (100, 20), 40 wide and 10 high; turned clockwise by 90 degrees the width
    # points down and the height to the left
    boxes, labels = boxes_from_annotation([rectangle(50, 20, 20, 10, 90)], CONTROL, 200, 100)
    np.testing.assert_allclose(boxes, [[90, 20, 100, 60]], atol=1e-4)
    assert labels == ["Car"]
    assert boxes.dtype == np.float32


def test_a_rotation_is_one_of_pixels_not_of_percent() -> None:
    boxes, _ = boxes_from_annotation([rectangle(50, 50, 10, 20, 45)], CONTROL, 400, 200)  # a square of 40 px
    diagonal = 40 * math.sqrt(2)
    np.testing.assert_allclose(boxes, [[200 - diagonal / 2, 100, 200 + diagonal / 2, 100 + diagonal]], atol=1e-3)


@given(st.tuples(st.floats(0, 100), st.floats(0, 100), st.floats(1, 100), st.floats(1, 100)), st.floats(-720, 720))
def test_the_enclosing_box_is_that_of_the_turned_corners(box: tuple[float, ...], rotation: float) -> None:
    width, height = 640, 480
    x, y, w, h = box[0] * 6.4, box[1] * 4.8, box[2] * 6.4, box[3] * 4.8
    turn = np.exp(1j * math.radians(rotation))  # y points down, so a positive angle is clockwise
    corners = complex(x, y) + turn * np.array([0, w, 1j * h, w + 1j * h])
    expected = [corners.real.min(), corners.imag.min(), corners.real.max(), corners.imag.max()]
    expected = np.clip(expected, 0, [width, height, width, height])
    boxes, _ = boxes_from_annotation([rectangle(*box, rotation)], CONTROL, width, height)
    if len(boxes):
        np.testing.assert_allclose(boxes[0], expected, atol=1e-2)
    else:
        assert min(expected[2] - expected[0], expected[3] - expected[1]) < 1.01


def test_other_regions_are_left_out() -> None:
    good = rectangle(0, 0, 50, 50)
    result = [
        good,
        rectangle(0, 0, 50, 50, label="Zebra"),  # not in the config (any more)
        good | {"from_name": "other"},
        good | {"to_name": "second"},
        good | {"type": "choices", "value": {"choices": ["x"]}},
        {"type": "relation", "from_id": "a", "to_id": "b"},
        rectangle(10, 10, 0, 20),
        rectangle(120, 10, 20, 20),
        rectangle(math.nan, 10, 20, 20),
        good | {"value": {"rectanglelabels": ["Car"]}},
    ]
    boxes, labels = boxes_from_annotation(result, CONTROL, 100, 100)
    np.testing.assert_array_equal(boxes, [[0, 0, 50, 50]])
    assert labels == ["Car"]


def test_an_annotation_without_regions_is_no_boxes() -> None:
    boxes, labels = boxes_from_annotation([], CONTROL, 100, 100)
    assert boxes.shape == (0, 4)
    assert labels == []


def test_a_region_with_two_labels_is_two_boxes_and_values_become_aliases() -> None:
    control = Control("label", "image", "image", ("C", "Person"), values={"C": "Car"})
    region = rectangle(0, 0, 50, 50)
    region["value"]["rectanglelabels"] = ["Car", "Person"]
    boxes, labels = boxes_from_annotation([region], control, 100, 100)
    assert labels == ["C", "Person"]
    assert boxes.shape == (2, 4)
