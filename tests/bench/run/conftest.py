import pytest

from bench.data.coco import CocoDataset
from bench.data.generated import generate


@pytest.fixture(scope="package")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    root = generate(tmp_path_factory.mktemp("data") / "set", train_images=9, val_images=1)
    return CocoDataset(root, "train2017")
