"""Label configs as people write them: videos, thresholds and skips of single labels, and names beyond ASCII."""

from __future__ import annotations

import time
import unicodedata

import numpy as np
import pytest

from yolonas.inference.detections import Detections
from yolonas.labelstudio import boxes_from_annotation, to_regions
from yolonas.labelstudio_config import (
    Control,
    LabelConfigError,
    class_names,
    controls_by_image,
    controls_by_video,
    map_labels,
    parse_label_config,
)

VIDEO = """
<View>
  <Labels name="labels" toName="video" model_score_threshold="0.4">
    <Label value="Car" predicted_values="car,truck"/><Label value="Person" model_score_threshold="0.6"/>
  </Labels>
  <Video name="video" value="$video" frameRate="{rate}"/>
  <VideoRectangle name="box" toName="video" model_path="cars.safetensors"/>
</View>"""


def labels(*tags: str, attributes: str = "") -> Control:
    (control,) = parse_label_config(
        f'<View><Image name="i" value="$i"/><RectangleLabels name="l" toName="i" {attributes}>{"".join(tags)}'
        "</RectangleLabels></View>"
    )
    return control


def test_a_video_rectangle_has_the_labels_of_its_video() -> None:
    (control,) = parse_label_config(VIDEO.format(rate="25"))
    assert control == Control(
        from_name="box",
        to_name="video",
        data_key="video",
        labels=("Car", "Person"),
        predicted_values={"Car": ("car", "truck")},
        score_threshold=0.4,
        label_thresholds={"Person": 0.6},
        model_path="cars.safetensors",
        media="video",
        frame_rate="25",
    )
    assert (controls_by_image([control], {"video": "/a.mp4"}), controls_by_video([control], {"video": "/a.mp4"})) == (
        {},
        {"/a.mp4": [control]},
    )


@pytest.mark.parametrize(
    ("rate", "data", "expected"),
    [
        ("25", {}, 25),
        ("0.04", {}, 25),  # Label Studio reads it as seconds per frame
        ("$fps", {"fps": 30}, 30),
        ("$meta.fps", {"meta": {"fps": "12.5"}}, 12.5),
        ("$fps", {}, 24),
        ("", {}, 24),
        ("-3", {}, 24),
        ("nan", {}, 24),
        ("many", {}, 24),
    ],
)
def test_frames_are_counted_as_label_studio_does(rate: str, data: dict[str, object], expected: float) -> None:
    (control,) = parse_label_config(VIDEO.format(rate=rate))
    assert control.frames_per_second(data) == pytest.approx(expected)


def test_a_video_without_rectangles_or_labels() -> None:
    assert parse_label_config(VIDEO.format(rate="").replace("VideoRectangle", "TimelineLabels")) == []
    (control,) = parse_label_config(
        VIDEO.format(rate="").replace('toName="video" model_score', 'toName="x" model_score')
    )
    assert control.labels == ()


def test_a_label_may_have_a_threshold_of_its_own() -> None:
    tags = '<Label value="Car" model_score_threshold="0.6"/><Label value="Dog" score_threshold="0.1"/>'
    control = labels(tags, '<Label value="Cat"/>', attributes='model_score_threshold="0.3"')
    scores = [0.59, 0.61, 0.2, 0.05, 0.29, 0.31]
    found = Detections(np.tile([0, 0, 9, 9], (6, 1)), scores, [0, 0, 1, 1, 2, 2], ("car", "dog", "cat"), (9, 9))
    regions = to_regions(found, control, map_labels(control, ["car", "dog", "cat"]), score_threshold=0.9)
    assert [(region["value"]["rectanglelabels"], round(region["score"], 2)) for region in regions] == [
        (["Car"], 0.61),
        (["Cat"], 0.31),
        (["Dog"], 0.2),
    ]
    assert control.lowest_threshold(0.9) == 0.1
    assert labels('<Label value="Car"/>').lowest_threshold(0.9) == 0.9


def test_a_bad_threshold_of_a_label_names_it() -> None:
    with pytest.raises(LabelConfigError, match='model_score_threshold="60%" of <Label value="Car"> is not a number'):
        labels('<Label value="Car" model_score_threshold="60%"/>')


def test_a_skipped_label_is_neither_predicted_nor_learned() -> None:
    control = labels('<Label value="Car"/><Label value="Blur" model_skip="true" predicted_values="car"/>')
    assert class_names([control]) == ("Car",)
    assert map_labels(control, ["blur", "car"]).to_label == {1: "Car"}
    region = {"from_name": "l", "to_name": "i", "type": "rectanglelabels"}
    value = {"x": 1, "y": 1, "width": 50, "height": 50, "rectanglelabels": ["Blur"]}
    dropped: list[str] = []
    boxes, _ = boxes_from_annotation([{**region, "value": value}], control, 100, 100, dropped=dropped)
    assert len(boxes) == 0
    assert not dropped  # as was asked for


def test_nesting_duplicates_and_what_is_for_the_eye() -> None:
    control = labels(
        '<View style="x"><Label value="Car" hotkey="c" background="#f00"/><Header value="Car"/></View>',
        '<Choice value="Dog"/><Label value="Car" predicted_values="dog"/><Label value=""/><Label value="Cat"/>',
    )
    assert control.labels == ("Car", "Cat")
    assert map_labels(control, ["dog", "car"]).to_label == {1: "Car"}


@pytest.mark.parametrize(
    ("label", "model"),
    [
        ("Café", unicodedata.normalize("NFD", "CAFÉ")),
        ("Straße", "STRASSE"),
        ("\uff43\uff41\uff52", "Car"),  # full width
        ("自動車", "自動車"),
        ("ﬁre hydrant", "fire-hydrant"),  # a ligature
        ("سيارة\u200f", "سيارة"),  # a mark of writing direction
        ("❤️ heart", "❤heart"),  # with and without the selector that makes it an emoji
        ("traffic\u2011light", "traffic light"),  # a hyphen that does not break
        ('5" pipe', '5"_Pipe'),
        ("-", "-"),
    ],
)
def test_names_beyond_ascii_match(label: str, model: str) -> None:
    control = labels(f"<Label value='{label}'/>")
    assert map_labels(control, ["other", model]).to_label == {1: label}
    aliased = labels(f"<Label value='{label}' alias='a'/>")
    assert map_labels(aliased, [model]).to_label == {0: "a"}
    claimed = labels(f"<Label value='Z' predicted_values='x, {label}'/>")
    assert map_labels(claimed, [model]).to_label == {0: "Z"}


def test_names_that_differ_stay_apart() -> None:
    control = labels('<Label value="-"/><Label value="_"/><Label value="👩"/><Label value="👨"/><Label value="ñ"/>')
    mapped = map_labels(control, ["_", "👨", "n", "👩"])
    assert mapped.to_label == {0: "_", 1: "👨", 3: "👩"}
    assert mapped.unmatched == ("-", "ñ")


def test_a_trained_class_keeps_its_label_however_it_is_composed() -> None:
    composed, decomposed = "Käfer", unicodedata.normalize("NFD", "Käfer")
    control = labels(f'<Label value="{composed}"/><Label value="käfer"/>')
    assert map_labels(control, [decomposed, "käfer", "Kafer"], own=True).to_label == {0: composed, 1: "käfer"}
    region = {"from_name": "l", "to_name": "i", "type": "rectanglelabels"}
    value = {"x": 1, "y": 1, "width": 50, "height": 50, "rectanglelabels": [decomposed]}
    assert boxes_from_annotation([{**region, "value": value}], control, 100, 100)[1] == [composed]


def test_twenty_thousand_labels_are_read_in_the_time_of_their_number() -> None:
    tags = (f"<Label value='{i}' model_skip='{i % 2}'/>" for i in range(20_000))
    began = time.process_time()
    control = labels(*tags, '<Label value="7"/><Label value="8"/>')
    assert time.process_time() - began < 2.0  # 0.2 s; 9 s where each label is compared with all before it
    assert control.labels == tuple(str(i) for i in range(0, 20_000, 2))
    assert control.skipped_labels == tuple(str(i) for i in range(1, 20_000, 2))


def test_many_videos_each_have_the_labels_that_name_them() -> None:
    parts = [
        f'<Labels name="l{i}" toName="v{i},v{i},all"><Label value="of {i}"/></Labels><Video name="v{i}" value="$v{i}"/>'
        f'<VideoRectangle name="b{i}" toName="v{i}"/>'
        for i in range(2_000)
    ]
    began = time.process_time()
    controls = parse_label_config(f"<View>{''.join(parts)}</View>")
    assert time.process_time() - began < 2.0
    assert [(control.to_name, control.labels) for control in controls] == [
        (f"v{i}", (f"of {i}",)) for i in range(2_000)
    ]
