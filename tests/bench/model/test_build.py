"""The models of runs: what they score untrained, and what their weights depend on."""

from pathlib import Path

import pytest
import torch

from bench.config.suites import load_suite
from bench.data.coco import CocoDataset
from bench.data.generated import generate
from bench.data.images import to_float
from bench.model import build as models
from bench.run.evaluate import CocoEvaluator


def test_an_untrained_detector_of_the_quick_suite_scores_next_to_nothing(tmp_path: Path) -> None:
    root = generate(tmp_path / "set", train_images=1, val_images=40)
    config = load_suite("quick", rows=["ViL"]).runs[0]
    split = CocoDataset(root, "val2017")
    detector = models.build_detector(config, split.num_classes).eval()
    evaluator = CocoEvaluator(split)
    with torch.no_grad():
        for index in range(len(split)):
            image, target = split[index]
            evaluator.update(detector([to_float(image)]), [target])
    box = evaluator.compute()["box"]
    assert box is not None
    assert box["AP"] is not None
    assert box["AP"] < 2


def test_the_weights_depend_on_the_seed_alone() -> None:
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(99 + len(weights))
        config = load_suite("quick", rows=["performer"], seed=seed).runs[0]
        detector = models.build_detector(config, 6)
        weights.append(torch.cat([p.flatten() for p in detector.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("row", "settings", "said"),
    [
        # Its features are a buffer.
        ("performer", ["model.compile=true", "model.checkpoint=true"], True),
        ("performer", ["model.checkpoint=true"], False),
        ("full", ["model.compile=true", "model.checkpoint=true"], False),
    ],
)
def test_buffers_of_compiled_blocks_that_are_computed_again_are_said(
    row: str, settings: list[str], said: bool
) -> None:
    (config,) = load_suite("quick", rows=[row], overrides=settings).runs
    notes = models.buffer_notes(config, models.build_backbone(config))
    assert ["twice a step" in note for note in notes] == [True] * said


@pytest.mark.parametrize(("classes", "said"), [(6, True), (5, False)])
def test_heads_of_classes_that_are_taken_over_by_number_are_said(
    tmp_path: Path, classes: int, said: bool
) -> None:
    config = load_suite("quick", rows=["ViL"]).runs[0]
    torch.save(models.build_detector(config, 6).state_dict(), tmp_path / "six.pth")
    note = models.initialise(models.build_detector(config, classes), tmp_path / "six.pth")
    assert ("taken over by the classes' numbers" in note) == said
