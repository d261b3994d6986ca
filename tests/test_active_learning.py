"""What to label next: bounds, order and ties of the signals and of the choice."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolonas.active_learning import (
    BACKGROUND,
    STRATEGIES,
    ImageSignals,
    box_spread,
    box_uncertainty,
    class_doubt,
    disagreement,
    mirrored,
    rarity,
    select,
    uncertainty,
    values,
)
from yolonas.errors import OptionError
from yolonas.inference.detections import Detections

LOGIT = st.floats(-30, 30)


def logit(score: float) -> float:
    return float(np.log(score / (1 - score)))


def image(
    scores: Sequence[float] = (),
    labels: Sequence[int] | None = None,
    feature: Sequence[float] = (0.0,),
    spreads: float = 0.0,
    disagreement: float | None = None,
    classes: int = 3,
) -> ImageSignals:
    """An image whose boxes have these scores, no other class coming near."""
    labels = [0] * len(scores) if labels is None else labels
    logits = np.full((len(scores), classes), -20.0)
    logits[np.arange(len(scores)), labels] = [logit(score) for score in scores]
    margins, entropies, rivals = class_doubt(logits)
    spread = np.full(len(scores), spreads)
    return ImageSignals(
        np.array(scores, float),
        np.array(labels, int),
        margins,
        entropies,
        rivals,
        spread,
        np.array(feature, float),
        disagreement,
    )


def crowd(seed: int, count: int = 12, empty: int = 3) -> list[ImageSignals]:
    """Images of all kinds, some without boxes."""
    rng = np.random.default_rng(seed)
    images = []
    for index in range(count):
        boxes = 0 if index < empty else int(rng.integers(1, 8))
        scores, labels = rng.uniform(0.05, 0.99, boxes), rng.integers(0, 3, boxes)
        differ = None if index % 4 == 0 else float(rng.random())
        images.append(image(list(scores), list(labels), list(rng.normal(size=5)), float(rng.uniform(0, 0.3)), differ))
    return images


def boxes(*rows: Sequence[float], names: tuple[str, ...] = ("Car", "Van")) -> Detections:
    """Detections of rows x1, y1, x2, y2, score, label on an image 100 px wide."""
    table = np.array(rows, float).reshape(-1, 6)
    return Detections(table[:, :4], table[:, 4], table[:, 5], names, (80, 100))


# -- one box


@given(st.floats(0.001, 0.999))
def test_with_one_class_the_margin_is_that_of_a_coin(score: float) -> None:
    margins, entropies, rivals = class_doubt(np.array([[logit(score)]]))
    assert margins[0] == pytest.approx(abs(2 * score - 1), abs=1e-9)
    coin = -(score * np.log2(score) + (1 - score) * np.log2(1 - score))
    assert entropies[0] == pytest.approx(coin, abs=1e-9)
    assert rivals[0] == BACKGROUND


@given(st.lists(st.lists(LOGIT, min_size=4, max_size=4), max_size=5))
def test_class_doubt_lies_between_0_and_1_and_forgets_the_order_of_the_classes(rows: list[list[float]]) -> None:
    logits = np.array(rows, float).reshape(-1, 4)
    margins, entropies, rivals = class_doubt(logits)
    assert margins.shape == entropies.shape == rivals.shape == (len(rows),)
    for array in (margins, entropies):
        assert ((array >= 0) & (array <= 1)).all()
    assert (rivals != logits.argmax(axis=1)).all()
    assert ((rivals >= BACKGROUND) & (rivals < 4)).all()
    turned = class_doubt(logits[:, ::-1])
    np.testing.assert_allclose(turned[0], margins, atol=1e-12)
    np.testing.assert_allclose(turned[1], entropies, atol=1e-12)


def test_the_extremes_of_class_doubt() -> None:
    margins, entropies, rivals = class_doubt(np.array([[0.0, 0.0, 0.0], [40.0, -40.0, -40.0], [2.0, 1.9, -9.0]]))
    assert margins[0] == 0
    assert entropies[0] == pytest.approx(1)
    assert margins[1] == pytest.approx(1)
    assert entropies[1] == pytest.approx(0, abs=1e-9)
    assert rivals[2] == 1  # Car or Van
    minus_infinity = class_doubt(np.array([[1.0, -np.inf]]))  # a class that is not looked for
    np.testing.assert_allclose(minus_infinity[0], class_doubt(np.array([[1.0]]))[0])
    with pytest.raises(ValueError, match="one class"):
        class_doubt(np.zeros((2, 0)))


def test_a_rival_that_comes_nearer_makes_a_box_more_doubtful() -> None:
    margins, entropies, _ = class_doubt(np.array([[3.0, other] for other in np.linspace(-8, 3, 12)]))
    assert (np.diff(margins) < 0).all()
    assert (np.diff(entropies) > 0).all()


def test_box_spread_grows_with_the_width_of_the_distribution_and_shrinks_with_the_box() -> None:
    def peak(width: float) -> np.ndarray:
        return np.broadcast_to(-(((np.arange(17) - 8.0) / width) ** 2) / 2, (1, 4, 17))

    box = np.array([[0.0, 0.0, 128.0, 128.0]])
    spreads = [float(box_spread(peak(width), [8], box)[0]) for width in (0.01, 0.5, 1.0, 2.0)]
    assert spreads[0] == pytest.approx(0, abs=1e-9)
    assert (np.diff(spreads) > 0).all()
    assert spreads[2] == pytest.approx(1.0 * 8 / 128, rel=1e-3)  # one bin of 8 px on 128 px
    assert box_spread(peak(1.0), [16], box)[0] == pytest.approx(2 * spreads[2])
    assert box_spread(peak(1.0), [8], box / 2)[0] == pytest.approx(2 * spreads[2])
    assert box_spread(np.zeros((1, 4, 17)), [32], np.array([[5.0, 5.0, 5.0, 5.0]]))[0] == 1  # a point
    assert box_spread(np.zeros((0, 4, 17)), [], np.zeros((0, 4))).shape == (0,)


def test_a_side_counts_by_its_own_length() -> None:
    flat_x = np.zeros((1, 4, 17))
    flat_x[0, [1, 3], 8] = 50.0  # top and bottom are certain
    wide, tall = np.array([[0.0, 0.0, 400.0, 40.0]]), np.array([[0.0, 0.0, 40.0, 400.0]])
    assert box_spread(flat_x, [8], wide)[0] < box_spread(flat_x, [8], tall)[0]


def test_a_box_is_doubtful_in_class_or_in_place() -> None:
    assert box_uncertainty(image([0.999999])) == pytest.approx(0, abs=1e-4)
    assert box_uncertainty(image([0.999999], spreads=0.4)) == pytest.approx(0.4, abs=1e-4)
    assert box_uncertainty(image([0.5], spreads=0.4)) > box_uncertainty(image([0.5]))
    assert box_uncertainty(image([0.5], spreads=1.0)) == 1


# -- one image


def test_uncertainty_of_an_image() -> None:
    assert uncertainty(image()) is None
    assert uncertainty(image([0.999999])) == pytest.approx(0, abs=1e-4)
    doubtful = uncertainty(image([0.5]))
    assert doubtful is not None
    assert doubtful > 0.1
    assert uncertainty(image([0.5] + [0.98] * 20)) < uncertainty(image([0.5, 0.5]))  # sure boxes do not add up
    assert uncertainty(image([0.5] + [0.02] * 50)) < uncertainty(image([0.5, 0.5]))  # nor do faint ones
    assert uncertainty(image([0.5] * 300)) < 1


@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=20), st.floats(0.01, 0.99))
def test_another_box_never_makes_an_image_surer(scores: list[float], more: float) -> None:
    less, greater = uncertainty(image(scores)), uncertainty(image([*scores, more]))
    assert less is not None
    assert greater is not None
    assert 0 <= less <= greater < 1


def test_disagreement_of_two_predictions() -> None:
    car, shifted = (10, 10, 50, 50, 0.8, 0), (14, 10, 54, 50, 0.8, 0)
    assert disagreement(boxes(), boxes()) == 0
    assert disagreement(boxes(car), boxes(car)) == pytest.approx(0)
    assert disagreement(boxes(car), boxes()) == 1
    assert disagreement(boxes(car), boxes((60, 10, 90, 50, 0.8, 0))) == 1
    assert disagreement(boxes(car), boxes((10, 10, 50, 50, 0.8, 1))) == 1  # Car or Van
    moved = disagreement(boxes(car), boxes(shifted))
    assert moved == pytest.approx(1 - 36 / 44)
    assert disagreement(boxes(car), boxes((10, 10, 50, 50, 0.4, 0))) == pytest.approx(1 - 2 * 0.4 / 1.2)
    assert moved < disagreement(boxes(car), boxes(shifted, (60, 10, 90, 50, 0.3, 1))) < 1
    other_order = boxes((10, 10, 50, 50, 0.8, 1), names=("Van", "Car"))
    assert disagreement(boxes(car), other_order) == pytest.approx(0)  # classes by name


def test_each_box_is_matched_once() -> None:
    car = (10, 10, 50, 50, 0.8, 0)
    assert disagreement(boxes(car, car), boxes(car)) == pytest.approx(1 - 2 * 0.8 / 2.4)


@given(st.integers(0, 1000))
def test_disagreement_is_symmetric_and_between_0_and_1(seed: int) -> None:
    rng = np.random.default_rng(seed)

    def some() -> Detections:
        n = int(rng.integers(0, 9))
        corner, size = rng.uniform(0, 60, (n, 2)), rng.uniform(1, 40, (n, 2))
        rows = np.hstack([corner, corner + size, rng.random((n, 1)), rng.integers(0, 2, (n, 1))])
        return boxes(*rows)

    a, b = some(), some()
    assert 0 <= disagreement(a, b) <= 1
    assert disagreement(a, b) == pytest.approx(disagreement(b, a))
    assert disagreement(mirrored(a), mirrored(b)) == pytest.approx(disagreement(a, b))
    np.testing.assert_allclose(mirrored(mirrored(a)).boxes, a.boxes, atol=1e-4)


def test_signals_of_detections_without_any_go_by_the_scores() -> None:
    plain = ImageSignals.of(boxes((10, 10, 50, 50, 0.8, 0), (10, 10, 50, 50, 0.5, 1)), disagreement=0.25)
    np.testing.assert_allclose(plain.margins, [0.6, 0.0], atol=1e-6)
    assert plain.disagreement == 0.25
    assert plain.feature.shape == (2,)
    assert uncertainty(plain) == pytest.approx(uncertainty(image([0.8, 0.5], [0, 1], classes=1 + 1)), abs=0.2)
    assert len(ImageSignals.of(boxes())) == 0
    own = dataclasses.replace(boxes((10, 10, 50, 50, 0.8, 0)), signals=image([0.8], feature=[7.0]))
    assert ImageSignals.of(own, 0.5).feature[0] == 7
    assert ImageSignals.of(own, 0.5).disagreement == 0.5


def test_signals_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="equally many"):
        dataclasses.replace(image([0.5, 0.6]), margins=np.zeros(1))
    with pytest.raises(ValueError, match="2, not 1"):
        dataclasses.replace(boxes((0, 0, 1, 1, 0.5, 0), (0, 0, 1, 1, 0.5, 0)), signals=image([0.5]))
    with pytest.raises(ValueError, match="equally long"):
        values([image(feature=[1.0]), image(feature=[1.0, 2.0])], [])


def test_a_part_of_detections_takes_its_signals_along() -> None:
    found = dataclasses.replace(boxes((0, 0, 9, 9, 0.9, 0), (0, 0, 9, 9, 0.5, 1)), signals=image([0.9, 0.5], [0, 1]))
    part = found[found.scores < 0.7]
    assert part.signals is not None
    assert part.signals.margins[0] == pytest.approx(0, abs=1e-6)
    assert found[:0].signals is not None
    assert len(found[:0].signals) == 0


# -- many images


def test_rarity() -> None:
    np.testing.assert_array_equal(rarity([0, 0]), [0, 0])  # nothing is known
    rare = rarity([99, 9, 0])
    assert rare[0] == 0 < rare[1] < rare[2] < 1
    assert rarity([]).shape == (0,)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("labelled", [0, 5])
def test_every_strategy_orders_every_image_once_and_always_the_same(strategy: str, labelled: int) -> None:
    images, known = crowd(1), [s.labelled_as([0, 0, 1]) for s in crowd(2)][:labelled]
    worth = values(images, known, strategy, seed=3)
    assert worth.shape == (len(images),)
    assert ((worth >= 0) & (worth <= 1)).all()
    order = select(images, known, strategy, seed=3)
    assert sorted(order) == list(range(len(images)))
    assert order == select(images, known, strategy, seed=3)
    assert select(images, known, strategy, 4, seed=3) == order[:4]
    assert order[0] == int(worth.argmax())
    assert select([], known, strategy, 5) == []
    assert values([], known, strategy).shape == (0,)
    assert select(images, known, strategy, 0) == []


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "random"])
def test_the_seed_is_of_random_alone_and_ties_go_to_the_lower_index(strategy: str) -> None:
    images = crowd(1)
    assert select(images, [], strategy, seed=1) == select(images, [], strategy, seed=2)
    assert select([image([0.7])] * 5, [image([0.7])], strategy) == [0, 1, 2, 3, 4]


def test_random_is_random() -> None:
    images = crowd(1)
    assert len({tuple(select(images, [], "random", seed=seed)) for seed in range(5)}) == 5


def test_an_unknown_strategy_is_named() -> None:
    with pytest.raises(OptionError, match="'margin' is not known: use mix, uncertainty"):
        select(crowd(1), [], "margin")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("labelled", [0, 3, 12])
def test_others_count_as_if_they_were_asked_about(strategy: str, labelled: int) -> None:
    images, known = crowd(1, empty=4), crowd(2)[:labelled]
    for own in (2, 6, 12):
        wanted = values(images, known, strategy)[:own]
        np.testing.assert_allclose(values(images[:own], known, strategy, others=images[own:]), wanted, atol=1e-12)


@pytest.mark.parametrize("strategy", ["uncertainty", "disagreement", "mix"])
def test_images_without_boxes_stand_in_the_middle(strategy: str) -> None:
    images = [image([0.5, 0.5], disagreement=0.9)] * 6 + [image([0.99], disagreement=0.01)] * 6 + [image()] * 2
    order = select(images, [image([0.9])], strategy)
    assert {order.index(12), order.index(13)} == {6, 7}
    assert select([image(), image()], [], strategy) == [0, 1]


def test_uncertainty_puts_the_more_doubtful_image_first() -> None:
    images = [image([score]) for score in (0.99, 0.8, 0.52, 0.9)]
    assert select(images, [], "uncertainty") == [2, 1, 3, 0]
    unsure_of_the_place = [image([0.9]), image([0.9], spreads=0.5)]
    assert select(unsure_of_the_place, [], "uncertainty") == [1, 0]


def test_disagreement_puts_the_disputed_image_first_and_without_any_goes_by_doubt() -> None:
    images = [image([0.9], disagreement=d) for d in (0.1, 0.8, 0.3)]
    assert select(images, [], "disagreement") == [1, 2, 0]
    doubtful = [image([0.9]), image([0.5])]
    assert select(doubtful, [], "disagreement") == select(doubtful, [], "uncertainty") == [1, 0]


def test_balance_looks_for_rare_classes_and_notes_what_it_takes() -> None:
    images = [image([0.9], [0]), image([0.8], [2]), image([0.7], [1]), image([0.75], [2])]
    known = [image().labelled_as([0] * 50 + [1] * 20 + [2] * 20)]
    assert select(images, known, "balance")[0] == 1
    assert select(images, [image().labelled_as([0] * 3 + [1] * 2 + [2] * 2)], "balance", 2) == [1, 2]  # not 3 again
    assert values(images, known, "balance")[0] == 0
    worth = values(images, known, "balance")
    np.testing.assert_allclose(values(images, [], "balance", counts=[50, 20, 20]), worth)
    np.testing.assert_allclose(values(images, [image([0.9], [0])], "balance", counts=[50, 20, 20, 0]), worth)
    assert values(images, known, "balance", counts=[5]).tolist() == pytest.approx([0, 0.8 * 5 / 6, 0.7 * 5 / 6, 0.625])


@pytest.mark.parametrize("seed", range(5))
def test_diversity_covers_within_twice_the_best_radius(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(9, 2))
    points = (points - points.mean(axis=0)) / points.std(axis=0)  # as select does
    images = [image(feature=point) for point in points]

    def radius(centers: Any) -> float:
        return float(np.linalg.norm(points[:, None] - points[list(centers)][None], axis=2).min(axis=1).max())

    best = min(radius(centers) for centers in combinations(range(9), 3))
    chosen = select(images, [], "diversity", 3)
    assert radius(chosen) <= 2 * best
    assert chosen[0] == int(np.linalg.norm(points, axis=1).argmin())


def test_diversity_goes_where_nothing_is_labelled() -> None:
    places = [(0.0, 0.0), (0.1, 0.0), (5.0, 0.0), (5.1, 0.1), (0.0, 5.0)]
    images = [image([0.9], feature=place) for place in places]
    order = select(images, [image(feature=(0.0, 0.1))], "diversity")
    assert set(order[:2]) == {3, 4}  # one of each place, the twin of what is there last
    assert set(order[3:]) <= {0, 1, 2}


def test_features_that_do_not_vary_decide_nothing() -> None:
    images = [image([score], feature=(1e6, 3.0)) for score in (0.9, 0.5)]
    assert select(images, [image(feature=(1e6, 3.0))], "mix") == [1, 0]


def test_mix_weighs_all_reasons() -> None:
    base: dict[str, Any] = {"scores": [0.9], "feature": (0.0, 0.0), "disagreement": 0.1}
    known = [image(feature=(0.0, 0.0)).labelled_as([0] * 9 + [1] * 9)]
    for better in ({"scores": [0.5]}, {"disagreement": 0.9}, {"feature": (1.0, 1.0)}, {"labels": [2]}):
        images = [image(**base), image(**{**base, **better}), image(**base)]
        assert select(images, known, "mix")[0] == 1, better
