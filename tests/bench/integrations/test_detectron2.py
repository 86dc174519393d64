import pytest

from bench.data.generated import SHAPES, generate
from bench.errors import InputError

pytestmark = pytest.mark.detectron2

# What a user writes.
CONFIG = """
MODEL:
  DEVICE: cpu
  META_ARCHITECTURE: {arch}
  MASK_ON: {masks}
  WEIGHTS: ""
  PIXEL_MEAN: [123.675, 116.28, 103.53]
  PIXEL_STD: [58.395, 57.12, 57.375]
  BACKBONE: {{NAME: {backbone}}}
  VIL: {{BACKBONE: tiny, ATTENTION: performer, IMAGE_SIZE: 160, OPTIONS: ["redraw_interval=4"]}}
  FPN: {{OUT_CHANNELS: 32}}
  ANCHOR_GENERATOR: {{SIZES: [[8], [16], [32], [64], [128]]}}
  RPN: {{IN_FEATURES: [p2, p3, p4, p5, p6]}}
  ROI_HEADS: {{NAME: StandardROIHeads, IN_FEATURES: [p2, p3, p4, p5], NUM_CLASSES: 6}}
  ROI_BOX_HEAD: {{NAME: FastRCNNConvFCHead, NUM_FC: 1, FC_DIM: 32, POOLER_RESOLUTION: 7}}
  ROI_MASK_HEAD: {{NAME: MaskRCNNConvUpsampleHead, NUM_CONV: 1, POOLER_RESOLUTION: 14}}
  RETINANET: {{IN_FEATURES: [p3, p4, p5, p6, p7], NUM_CLASSES: 6}}
INPUT: {{FORMAT: RGB, MIN_SIZE_TRAIN: [128], MAX_SIZE_TRAIN: 160}}
DATASETS: {{TRAIN: [generated_{backbone}], TEST: []}}
DATALOADER: {{NUM_WORKERS: 0}}
SOLVER: {{IMS_PER_BATCH: 2, MAX_ITER: 10, BASE_LR: 0.001, CHECKPOINT_PERIOD: 10}}
SEED: 1
OUTPUT_DIR: {output}
"""


@pytest.mark.parametrize(
    ("arch", "backbone"),
    [
        ("GeneralizedRCNN", "build_vil_fpn_backbone"),
        ("RetinaNet", "build_retinanet_vil_fpn_backbone"),
    ],
)
def test_config_of_a_user_trains_ten_steps(tmp_path, arch, backbone):
    from detectron2.config import get_cfg
    from detectron2.data.datasets import register_coco_instances
    from detectron2.engine import DefaultTrainer

    from bench.integrations.detectron2 import add_vil_config

    data = generate(tmp_path / "data", train_images=8, val_images=1, image_size=(128, 160))
    annotations = data / "annotations" / "instances_train2017.json"
    register_coco_instances(f"generated_{backbone}", {}, str(annotations), str(data / "train2017"))
    file = tmp_path / "config.yaml"
    masks = arch == "GeneralizedRCNN"
    file.write_text(
        CONFIG.format(arch=arch, backbone=backbone, masks=masks, output=tmp_path / "out")
    )
    (tmp_path / "out").mkdir()
    cfg = get_cfg()
    add_vil_config(cfg)
    cfg.merge_from_file(file)
    assert len(SHAPES) == cfg.MODEL.RETINANET.NUM_CLASSES

    class Trainer(DefaultTrainer):
        def build_writers(self):
            # TensorBoard is not installed everywhere.
            return []

    trainer = Trainer(cfg)
    vil = trainer.model.backbone.bottom_up
    before = {name: p.detach().clone() for name, p in vil.named_parameters()}
    matrix = vil.layer1[1].attn.state_dict()
    matrix = {name: value.clone() for name, value in matrix.items() if "projection" in name}
    trainer.train()
    assert int(vil.calls_since_last_redraw) == 10
    moved = {name for name, p in vil.named_parameters() if not p.equal(before[name])}
    assert {"layer1.0.proj.weight", "layer4.1.attn.qkv.weight"} <= moved
    assert not moved & {"head.weight", "norm.weight"}
    now = vil.layer1[1].attn.state_dict()
    assert matrix
    assert not any(now[name].equal(value) for name, value in matrix.items())


def test_lazy_config_and_wrong_values():
    from detectron2.config import LazyCall, get_cfg, instantiate
    from detectron2.layers import ShapeSpec

    from bench.integrations.detectron2 import build_vil_fpn_backbone, vil_fpn

    lazy = LazyCall(vil_fpn)(backbone="tiny", attention="full", image_size=[96, 128])
    lazy.out_channels = 16
    pyramid = instantiate(lazy)
    assert {name: spec.stride for name, spec in pyramid.output_shape().items()} == {
        "p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64,
    }  # fmt: skip
    assert "bottom_up.layer1.0.proj.weight" in pyramid.state_dict()
    with pytest.raises(InputError, match="add_vil_config"):
        build_vil_fpn_backbone(get_cfg(), ShapeSpec(channels=3))
    with pytest.raises(InputError, match=r"res2.*layer1"):
        vil_fpn(backbone="tiny", image_size=64, in_features=["res2"])
