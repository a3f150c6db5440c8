from __future__ import annotations

import io
import math
from collections.abc import Sequence
from contextlib import redirect_stdout

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.optimize import linear_sum_assignment

from rewards.deadline import call_within
from rlmed.tasks.metrics.boxes import iou, match, parse_boxes
from rlmed.tasks.metrics.coco import THRESHOLDS, Matches, average_precision, recall_at
from tests.unit.rlmed.tasks.metrics.hostile import LONG, mixed, repeated

FRAME = (100, 50)
ONE = [(0.1, 0.2, 0.3, 0.4)]  # [10, 10, 30, 20] in the frame
THREE = [*ONE, (0.5, 0.5, 1.0, 1.0), (0.0, 0.0, 0.25, 0.5)]

WRITTEN = {
    "[[10, 10, 30, 20]]": ONE,
    "[10,10,30,20]": ONE,
    "[10 10 30 20]": ONE,
    "[[[10, 10, 30, 20]]]": ONE,
    "(10, 10, 30, 20)": ONE,
    "(10,10),(30,20)": ONE,
    "[(10,10),(30,20)]": ONE,
    "[[30, 20, 10, 10]]": ONE,
    "[[30, 10, 10, 20]]": ONE,
    "[[+1e1, 10.0, 30., 20]]": ONE,
    '["10", "10", "30", "20"]': ONE,
    "[[10, 10, 30, 20,],]": ONE,
    "[[10, 10, 30, 20], [5, 5, 5, 9]]": ONE,  # the second has no area
    "[[10, 10, 30, 20], [200, 0, 300, 9]]": ONE,  # nor has this one in the frame
    "<|box_start|>(10,10),(30,20)<|box_end|>": ONE,
    "<|object_ref_start|>the mass<|object_ref_end|><|box_start|>(10, 10),(30, 20)<|box_end|>": ONE,
    '{"bbox_2d": [10, 10, 30, 20], "label": "mass, [1, 2, 3, 4] or {"}': ONE,
    '[{"label": "mass", "color": [255, 0, 0, 1], "bbox": [10, 10, 30, 20]}]': ONE,
    "{'box': [10, 10, 30, 20], 'score': 0.9}": ONE,
    "{'point': (1, 2), 'seen': (1, 2, 3, 4), 'box': (10, 10, 30, 20)}": ONE,
    '{"found": [{"boxes": [[10, 10, 30, 20]], "at": {"x": [1, 2]}}], "points": [[1, 2], ["a"]]}': ONE,
    "［［１０，１０，３０，２０］］": ONE,
    "[[10, 10, 30, 20], [50, 25, 100, 50], [0, 0, 25, 25]]": THREE,
    "[10, 10, 30, 20], [50, 25, 100, 50], [0, 0, 25, 25]": THREE,
    "[10, 10, 30, 20]\n[50, 25, 1000, 5000]\n[-9, -9, 25, 25]": THREE,
    '[{"bbox_2d": [10, 10, 30, 20]}, {"bbox_2d": [50, 25, 100, 50]}, {"bbox_2d": [0, 0, 25, 25]},]': THREE,
    "(10,10),(30,20) (50,25),(100,50) (0,0),(25,25)": THREE,
    "[]": [],
    "[[]]": [],
    "[ ]": [],
    '{"bbox_2d": []}': [],
    "[[0, 0, 0, 0]]": [],
    "[[-20, -20, -1, -1]]": [],
}
AROUND = [
    "{}",
    "\n\t {} \n",
    "```json\n{}\n```",
    "```\n{}```",
    "<answer>{}",
    "<answer><answer>{}</answer>",
    "Here: {}.",
    "病灶位于{}。",
    r"\boxed {}",
]
UNREADABLE = [
    "", " ", "none of it", "no box", "10, 10, 30, 20", "null", "{}", "[{}]", '{"label": "mass"}', '[{"box": null}]',
    '{"box": "none"}', '{"box": {"x": [1, 2, 3, 4]}}', "[10, 10, 30]", "[10, 10, 30, 20, 40]", "[[10, 10], [30, 20]]",
    "[1,234, 2, 3, 4]", "[NaN, 10, 30, 20]", "[[10, nan, 30, 20]]", "[10, 10, Infinity, 20]", "[10, 10, -Infinity, 20]",
    "[10, 10, 1e400, 20]", "[10, 10, -1e400, 20]", f"[10, 10, {'9' * 5000}, 20]", "[10, 10, 3e, 20]", "[x0, y0, x1, y1]",
    "[10px, 10px, 30px, 20px]", "[10%, 10%, 30%, 20%]", "[10-10-30-20]", "[10.10.30.20]", "[10; 10; 30; 20]",
    "['10', '10', '30', '20']", '["a", 10, 30, 20]', "[10, 10, 30, 二十]", "[1½, 2, 3, 4]", "[10², 10, 30, 20]",
    "[10, 10, 30, 20", "[[10, 10, 30, 20]", "[10, 10, 30, 20]]", "[[10, 10, 30, 20], [5, 6", "[10, 10, 30, 20}", "}{",
    "[{]}", "[10, 10, 30, 20], [1]", "[[10, 10, 30, 20], 5]", "[[10, 10, 30, 20], mass]", "[mass] [10, 10, 30, 20]",
    "(10,10)", "(10,10),(30,20),(1,2)", "(10,10),(30,20,40,50)", "[(10,10)],[(30,20)]", "[1, (10,10),(30,20)]",
    "<|box_start|>(10,10)<|box_end|>", "<|box_start|>(nan,10),(30,20)<|box_end|>", "<|box_start|><|box_end|>",
    '"[10, 10, 30, 20]"', r"$\frac{10}{20}$", r"[\frac{1}{2}, 1, 2, 3]", "[true, 10, 30, 20]", "[[null]]", "[0x10, 1, 2, 3]",
    "[" * 5000 + "10, 10, 30, 20" + "]" * 4999, "[" * 10_000, "]" * 10_000, '{"box":' * 5000, "病灶" * 5000, "1" * 10_000,
]  # fmt: skip
assert len(WRITTEN) * len(AROUND) + len(UNREADABLE) > 300


@pytest.mark.parametrize("around", AROUND)
def test_boxes_are_read_in_every_notation(around: str) -> None:
    for text, boxes in WRITTEN.items():
        read = parse_boxes(around.replace("{}", text), FRAME)
        assert read is not None, text
        assert np.shape(read) == np.shape(boxes), text
        np.testing.assert_allclose(read, boxes, rtol=0, atol=1e-15, err_msg=text)  # a division apart


@pytest.mark.parametrize("text", ["none", "None.", " NONE\n", "```\nnone\n```", "ｎｏｎｅ", "**none**"])
def test_none_is_no_box(text: str) -> None:
    assert parse_boxes(text, FRAME) == []


@pytest.mark.parametrize("text", UNREADABLE, ids=range(len(UNREADABLE)))
def test_what_is_no_box_is_not_guessed(text: str) -> None:
    assert parse_boxes(text, FRAME) is None


def test_deep_brackets_hold_a_box() -> None:
    assert parse_boxes("[" * 5000 + "10, 10, 30, 20" + "]" * 5000, FRAME) == parse_boxes("[10, 10, 30, 20]", FRAME)


def test_random_texts_give_boxes_in_the_frame_or_nothing() -> None:
    read = [parse_boxes(text, FRAME) for text in [*mixed(2000, seed=3), *repeated(10_000)]]
    boxes = [box for found in read for box in found or ()]
    assert len(boxes) > 100
    assert all(0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 for x0, y0, x1, y1 in boxes)
    assert None in read
    assert [] in read


def test_reading_takes_linear_time() -> None:
    for text in repeated(LONG):
        call_within(60, lambda text=text: parse_boxes(text, FRAME))  # something quadratic would take minutes


@pytest.mark.parametrize("frame", [(0, 10), (10, -1), (math.nan, 10), (10, math.inf)])
def test_a_frame_without_area_is_refused(frame: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="frame="):
        parse_boxes("[]", frame)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7),
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
        ((0, 0, 2, 2), (2, 0, 3, 2), 0.0),
        ((0, 0, 1, 1), (5, 5, 6, 6), 0.0),
        ((0, 0, 4, 4), (1, 1, 3, 3), 0.25),
        ((1, 1, 1, 1), (1, 1, 1, 1), 0.0),
    ],
)
def test_iou_by_hand(a: Sequence[float], b: Sequence[float], expected: float) -> None:
    assert iou(a, b) == iou(b, a) == expected


def random_boxes(source: np.random.Generator, count: int, width: float = 1.0, height: float = 1.0) -> np.ndarray:
    """Boxes [count, 4] of at least a tenth of each side."""
    corner = source.uniform(0, 0.6, (count, 2))
    return np.concatenate([corner, corner + source.uniform(0.1, 0.4, (count, 2))], axis=1) * ((width, height) * 2)


def near(source: np.random.Generator, boxes: np.ndarray) -> np.ndarray:
    """The boxes shifted and resized a little."""
    moved = boxes + source.normal(0, 0.1, boxes.shape) * np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    return np.stack([*np.minimum(moved[:, :2], moved[:, 2:]).T, *np.maximum(moved[:, :2], moved[:, 2:]).T], axis=1)


def test_matching_equals_scipy() -> None:
    source = np.random.default_rng(0)
    for _ in range(200):
        predicted, truth = (random_boxes(source, int(n)) for n in source.integers(1, 12, 2))
        pairs = np.array([[iou(a, b) for b in truth] for a in predicted])
        expected = pairs[linear_sum_assignment(pairs, maximize=True)].sum() / max(pairs.shape)
        found = match(predicted.tolist(), truth.tolist())
        assert found == pytest.approx(expected, abs=1e-12)  # sums of 12 numbers up to 1
        assert match(truth.tolist(), predicted.tolist()) == pytest.approx(found, abs=1e-12)


def test_the_best_matching_is_not_the_greedy_one() -> None:
    # greedy takes the best pair, the first predicted and the second true box (0.75), and leaves 0
    predicted, truth = [(0, 0, 4, 1), (3, 0, 4, 1)], [(0, 0, 2, 1), (1, 0, 4, 1)]
    assert match(predicted, truth) == pytest.approx((2 / 4 + 1 / 3) / 2, abs=1e-15)


def test_missing_and_superfluous_boxes_count_zero() -> None:
    box, other = (0.0, 0.0, 0.5, 0.5), (0.6, 0.6, 1.0, 1.0)
    assert match([], []) == 1.0
    assert match([box], []) == match([], [box]) == match([box], [other]) == 0.0
    assert match([box], [box, other]) == match([box, other], [box]) == 0.5
    assert match([box] * 4, [box]) == 0.25
    assert match([other, box], [box, other]) == 1.0


def coco_figures(rows: list[tuple[np.ndarray, np.ndarray]], thresholds: Sequence[float], same_scores: bool) -> tuple:
    """pycocotools' average precision and average recall with 100 boxes an image."""

    def annotations(index: int) -> list[dict]:
        entries = [(image, box) for image, row in enumerate(rows, start=1) for box in row[index]]
        sides = [(box[0], box[1], box[2] - box[0], box[3] - box[1]) for _, box in entries]
        return [
            {"id": place + 1, "image_id": image, "category_id": 1, "iscrowd": 0, "bbox": list(map(float, side)),
             "area": float(side[2] * side[3]), "score": 1.0 if same_scores else 1 - place / (len(entries) + 1)}
            for place, ((image, _), side) in enumerate(zip(entries, sides, strict=True))
        ]  # fmt: skip

    images = [{"id": image} for image in range(1, len(rows) + 1)]
    with redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"images": images, "categories": [{"id": 1}], "annotations": annotations(1)}
        truth.createIndex()
        found = COCO()
        found.dataset = {"images": images, "categories": [{"id": 1}], "annotations": annotations(0)}
        found.createIndex()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.iouThrs = np.array(thresholds)
        evaluation.evaluate()
        evaluation.accumulate()
    # [thresholds, levels, categories, areas, numbers of boxes]; areas: all, numbers: 100
    return evaluation.eval["precision"][:, :, 0, 0, 2].mean(), evaluation.eval["recall"][:, 0, 0, 2].mean()


def random_rows(seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    source = np.random.default_rng(seed)
    rows = []
    for _ in range(60):
        truth = random_boxes(source, int(source.integers(0, 6)), 640, 480)
        found = near(source, truth)[source.random(len(truth)) < 0.8]
        more = random_boxes(source, int(source.integers(0, 3)), 640, 480)
        predicted = np.concatenate([found, near(source, found[:1]), more])
        rows.append((source.permutation(predicted), truth))
    return rows


@pytest.mark.parametrize("same_scores", [True, False], ids=["scores of 1.0", "scores fall in the order written"])
@pytest.mark.parametrize("thresholds", [THRESHOLDS, (0.5,), (0.75,), (0.1, 0.3)], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_precision_and_recall_equal_pycocotools(seed: int, thresholds: Sequence[float], same_scores: bool) -> None:
    rows = random_rows(seed)
    precision, recall = coco_figures(rows, thresholds, same_scores)
    assert 0.05 < precision < 0.95
    assert 0.05 < recall < 1
    given = [(predicted.tolist(), truth.tolist()) for predicted, truth in rows]
    assert average_precision(given, thresholds) == pytest.approx(precision, abs=1e-12)  # a mean of 1010 numbers
    assert recall_at(given, thresholds) == pytest.approx(recall, abs=1e-12)


def test_resamples_of_rows_matched_once_equal_pycocotools() -> None:
    rows = random_rows(5)
    matches = Matches.of([(predicted.tolist(), truth.tolist()) for predicted, truth in rows])
    source = np.random.default_rng(0)
    for _ in range(5):
        drawn = np.sort(source.integers(len(rows), size=len(rows)))
        assert len({*drawn.tolist()}) < len(rows)
        precision, recall = coco_figures([rows[i] for i in drawn], THRESHOLDS, True)
        found = matches.drawn(drawn)
        assert found.precision().mean() == pytest.approx(precision, abs=1e-12)
        assert found.recall().mean() == pytest.approx(recall, abs=1e-12)


def test_fractions_and_pixels_are_the_same() -> None:
    rows = random_rows(9)
    scale = np.array((640, 480, 640, 480))
    pixels = [(predicted.tolist(), truth.tolist()) for predicted, truth in rows]
    fractions = [((predicted / scale).tolist(), (truth / scale).tolist()) for predicted, truth in rows]
    assert average_precision(fractions) == pytest.approx(average_precision(pixels), abs=1e-12)


def test_only_a_hundred_boxes_of_an_image_count() -> None:
    source = np.random.default_rng(5)
    truth = random_boxes(source, 3, 640, 480)
    rows = [(np.concatenate([random_boxes(source, 99, 640, 480), truth]), truth)] * 2
    precision, recall = coco_figures(rows, THRESHOLDS, True)
    given = [(predicted.tolist(), right.tolist()) for predicted, right in rows]
    assert recall < 0.7
    assert recall_at(given) == pytest.approx(recall, abs=1e-12)
    assert average_precision(given) == pytest.approx(precision, abs=1e-12)


def test_a_threshold_that_is_just_reached_and_ties_are_as_in_pycocotools() -> None:
    truth = np.array([[0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 40, 40]])
    predicted = np.array([[0, 0, 10, 5], [20, 20, 40, 40], [0, 0, 10, 10], [0, 0, 10, 10]])  # IoU 0.5, 1, 1, 1
    for thresholds in ((0.5,), (1.0,), THRESHOLDS):
        precision, recall = coco_figures([(predicted, truth)], thresholds, True)
        given = [(predicted.tolist(), truth.tolist())]
        assert average_precision(given, thresholds) == pytest.approx(precision, abs=1e-12)
        assert recall_at(given, thresholds) == pytest.approx(recall, abs=1e-12)


def test_without_true_boxes_or_thresholds_there_is_no_figure() -> None:
    for figure in (average_precision, recall_at):
        with pytest.raises(ValueError, match="no true box"):
            figure([([(0, 0, 1, 1)], []), ([], [])])
        with pytest.raises(ValueError, match="thresholds="):
            figure([([], [(0, 0, 1, 1)])], ())
        assert figure([([], [(0, 0, 1, 1)])]) == 0.0
