"""One run: what an untrained detector scores, and mistakes that a run finds."""

from pathlib import Path

import pytest
import torch

from bench import runner
from bench.config import RunConfig, build_config, load_suite
from bench.data.coco import CocoDataset
from bench.data.generated import generate
from bench.errors import InputError
from bench.evaluate import CocoEvaluator
from bench.train import to_float


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("data") / "set", train_images=2, val_images=40)


def test_an_untrained_detector_of_the_quick_suite_scores_next_to_nothing(root: Path) -> None:
    config = load_suite("quick", rows=["ViL"]).runs[0]
    split = CocoDataset(root, "val2017")
    detector = runner.build_detector(config, split.num_classes).eval()
    evaluator = CocoEvaluator(split)
    with torch.no_grad():
        for index in range(len(split)):
            image, target = split[index]
            evaluator.update(detector([to_float(image)]), [target])
    box = evaluator.compute()["box"]
    assert box is not None
    assert box["AP"] is not None
    assert box["AP"] < 2


def test_the_weights_depend_on_the_seed_alone(root: Path) -> None:
    del root
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(99 + len(weights))
        config = load_suite("quick", rows=["performer"], seed=seed).runs[0]
        detector = runner.build_detector(config, 6)
        weights.append(torch.cat([p.flatten() for p in detector.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_profile_images_have_the_size_asked_for_and_their_boxes_fit(root: Path) -> None:
    images, targets = runner.profile_batch(CocoDataset(root, "val2017"), (96, 192), 3)
    for image, target in zip(images, targets, strict=True):
        assert image.shape == (3, 96, 192)
        assert target["masks"].shape[1:] == (96, 192)
        assert len(target["boxes"]) > 0
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            rows, columns = mask.nonzero(as_tuple=True)
            found = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (found - box).abs().max() < 3


def _changed(**sections: object) -> RunConfig:
    values = load_suite("quick", rows=["ViL"]).runs[0].as_dict()
    for section, changes in sections.items():
        if isinstance(changes, dict):
            values[section] |= changes
        else:
            values[section] = changes
    return build_config(values)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (_changed(device="cuda:99"), "cuda:99"),
        (_changed(device="cpu", train={"precision": "16-mixed"}), "16-mixed needs a GPU"),
        (_changed(data={"train_split": "train1999"}), "train1999"),
    ],
)
def test_a_mistake_found_before_any_row_is_an_input_error(
    config: RunConfig, said: str, tmp_path: Path
) -> None:
    small = build_config(
        config.as_dict()
        | {
            "data": config.as_dict()["data"]
            | {
                "generated": {
                    "seed": 0,
                    "train_images": 2,
                    "val_images": 1,
                    "image_size": [128, 160],
                }
            }
        }
    )
    with pytest.raises(InputError, match=said):
        runner.check_data([small], tmp_path)
