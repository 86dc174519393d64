import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

import bench.integrations.timm  # noqa: F401
from bench.errors import InputError


def images(*size, channels=3):
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("attention", ["longformer", "performer", "full", "global", "Partial swin"])
def test_model_classifies_as_the_backbone_does(attention):
    torch.manual_seed(0)
    model = timm.create_model("vil_tiny", attention=attention, num_classes=7, img_size=96).eval()
    # A size that the backbone pads.
    x = images(90, 64)
    scores = model(x)
    assert scores.shape == (2, 7)
    torch.testing.assert_close(scores, model.classify(x))
    features = model.forward_features(x)
    torch.testing.assert_close(scores, model.head(model.forward_head(features, pre_logits=True)))
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, features)
    for name, map_ in zip(model.channels, maps, strict=True):
        torch.testing.assert_close(map_, super(type(model), model).forward(x)[name])


def test_features_of_the_issue():
    model = timm.create_model(
        "vil_small",
        attention="performer",
        num_classes=10,
        img_size=384,
        features_only=True,
        out_indices=(0, 1, 2, 3),
    )
    assert model.feature_info.channels() == [96, 192, 384, 768]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert [tuple(m.shape[1:]) for m in model(images(64, 96))] == [
        (96, 16, 24),
        (192, 8, 12),
        (384, 4, 6),
        (768, 2, 3),
    ]


def test_gradients_do_not_depend_on_checkpointing():
    found = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = timm.create_model("vil_tiny", img_size=64, num_classes=3, drop_path_rate=0.5)
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        model(images(64, 64)).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert all(gradient is not None for gradient in found[0].values())
    torch.testing.assert_close(found[1], found[0])


def test_head_channels_and_pruning():
    model = timm.create_model("vil_tiny", img_size=64, in_chans=1, num_classes=0)
    assert model(images(64, 64, channels=1)).shape == (2, 384)
    model.reset_classifier(5)
    assert model.get_classifier() is model.head
    assert model(images(64, 64, channels=1)).shape == (2, 5)
    model.reset_classifier(0, "")
    assert model(images(64, 64, channels=1)).shape == (2, 384, 2, 2)
    map_ = model.forward_intermediates(images(64, 64, channels=1), intermediates_only=True)[1]
    model.prune_intermediate_layers([1])
    assert not hasattr(model, "layer3")
    torch.testing.assert_close(model(images(64, 64, channels=1)), map_)


@pytest.mark.parametrize("attention", ["longformer", "performer", "full"])
@pytest.mark.parametrize(("indices", "prune_norm"), [([0], False), ([3], False), ([1, 3], True)])
def test_pruning_leaves_nothing_that_is_not_used(attention, indices, prune_norm):
    # As timm's own test: what has no gradient makes distributed training fail.
    model = timm.create_model("vil_tiny", attention=attention, img_size=64)
    taken = model.prune_intermediate_layers(indices, prune_norm=prune_norm)
    maps = model.forward_intermediates(
        images(64, 64), indices=taken, norm=not prune_norm, intermediates_only=True
    )
    sum(each.sum() for each in maps).backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []
    assert model(images(64, 64)).shape[1] == model.num_features


def test_layers_and_decay_reach_the_optimizer():
    model = timm.create_model("vil_tiny", attention="ViL", position="relative", img_size=64)
    spared = model.no_weight_decay()
    assert {"layer1.0.cls_token", "layer1.1.attn.local_relative_position_bias_table"} <= spared
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    scales = {
        id(p): (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    named = {name: scales[id(p)] for name, p in model.named_parameters()}
    assert named["head.weight"] == (1.0, 0.05)
    assert named["layer1.0.cls_token"][1] == 0.0
    assert named["layer1.0.proj.weight"][0] < named["layer4.1.attn.proj.weight"][0] < 1.0


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"attention": "longfromer"}, InputError, "longformer"),
        ({"windw": 7}, TypeError, "window"),
        ({"global_pool": "token"}, ValueError, "no global token"),
        ({"global_pool": "max"}, ValueError, "avg"),
    ],
)
def test_wrong_arguments_are_named(options, error, said):
    with pytest.raises(error, match=said):
        timm.create_model("vil_tiny", img_size=64, **options)
