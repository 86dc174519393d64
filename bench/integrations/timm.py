"""ViL in timm's registry: importing this module registers `vil_tiny` to `vil_base`.

    import timm
    import bench.integrations.timm
    model = timm.create_model("vil_small", attention="performer", num_classes=10, img_size=384)

timm: https://github.com/huggingface/pytorch-image-models. Parameters have the published names, so
that published classifiers and those of `python -m bench pretrain` load as they are. TorchScript
cannot compile the mechanisms; torch.compile can.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, nn

from bench.config.suites import profile_configs
from bench.errors import choose
from bench.model.backbone import INIT_STD, AttentionBlock, MlpBlock, PatchEmbed, ViL
from bench.model.optimizer import kinds_of

_POOLS = ("", "avg", "token")
_NO_DECAY = ("tokens", "positions")

# torch.fx takes them as they are: what they do follows from shapes.
for _module in (PatchEmbed, AttentionBlock, MlpBlock):
    register_notrace_module(_module)


class TimmViL(ViL):
    """ViL with the methods and arguments of timm's models.

    Args:
        backbone: a name in `configs/backbones.yaml`.
        attention: a mechanism, a row of `configs/rows.yaml` such as "Partial ViL", or a mechanism
            of the user as `package.module:Class` or `file.py:Class`.
        position: "absolute" or "relative" in all stages; None for that of the row.
        img_size: largest side, or largest (height, width), of the images to come, in pixels.
        num_classes: outputs of the head; 0 for none.
        in_chans: channels of the images.
        global_pool: "token" for the first global token of the last stage, "avg" for the mean of
            its grid, "" for neither; None for what `ViL.classify` takes: the token where the stage
            has one.
        drop_rate: dropout before the head.
        drop_path_rate: probability of the last block's residuals to be dropped.
        device, dtype: of the parameters.
        attention_options: options of the mechanism.

    Attributes:
        output_fmt: of `forward_features`: "NCHW" where the last stage has no global tokens, or
            "NLC", global tokens first.

    Raises:
        ValueError: for an unknown name, or a value that is not allowed.
        TypeError: for an option that no stage's mechanism knows.
    """

    def __init__(
        self,
        backbone: str = "small",
        *,
        attention: str = "longformer",
        position: str | None = None,
        img_size: int | Sequence[int] = 224,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **attention_options: Any,
    ) -> None:
        (config,) = profile_configs([attention], backbone=backbone, position=position)
        size = img_size if isinstance(img_size, int) else (img_size[0], img_size[-1])
        with nullcontext() if device is None else torch.device(device):
            super().__init__(
                config.model.arch,
                attention=config.model.attention,
                dense=config.model.dense,
                image_size=size,
                drop_path=drop_path_rate,
                num_classes=num_classes,
                **(config.model.options | attention_options),
            )
            if in_chans != 3:
                embed, patch = self.get_submodule("layer1.0"), self.stages[0].patch
                embed.proj = nn.Conv2d(in_chans, self.stages[0].dim, patch, stride=patch)
        self.to(dtype=dtype)
        self.in_chans = in_chans
        self.feature_info = [
            {"num_chs": self.channels[name], "reduction": self.strides[name], "module": name}
            for name in self.channels
        ]
        self.num_features = self.head_hidden_size = self.stages[-1].dim
        self.num_global = self.stages[-1].num_global
        self._depth = len(self.stages)
        self.output_fmt = "NLC" if self.num_global else "NCHW"
        self.head_drop = nn.Dropout(drop_rate)
        if global_pool is None:
            global_pool = "token" if self.num_global else "avg"
        self._set_pool(global_pool)
        self.num_classes = num_classes
        if not num_classes:
            self.head = nn.Identity()

    def _check_options(self, options: Mapping[str, Any]) -> None:
        try:
            super()._check_options(options)
        except ValueError as error:
            # As timm's models do for any unknown argument.
            raise TypeError(str(error)) from error

    def _set_pool(self, global_pool: str) -> None:
        self.global_pool = choose(global_pool, _POOLS, "global_pool")
        if global_pool == "token" and not self.num_global:
            raise ValueError("global_pool 'token': the last stage has no global token")

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of global tokens and tables of positions."""
        return {name for name, kind in kinds_of(self).items() if kind in _NO_DECAY}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that sort parameters into layers, for layer decay."""
        layers = r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"
        return {"stem": r"^layer1\.0\.", "blocks": [(layers, None), (r"^norm", (99999,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the inside of each block again in the backward pass, or keep it."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new head of `num_classes`, 0 for none; None keeps how tokens are pooled."""
        if global_pool is not None:
            self._set_pool(global_pool)
        self.num_classes = num_classes
        if not num_classes:
            self.head = nn.Identity()
            return
        like = next(self.parameters())
        head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
        nn.init.trunc_normal_(head.weight, std=INIT_STD)
        nn.init.zeros_(head.bias)
        self.head = head.train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return what `forward_features` does, and the maps of stages.

        Args:
            x: (B, in_chans, height, width).
            indices: the last n stages, or those of these numbers from 0; None for all.
            norm: apply the norm to the last stage's map, which is the only one that it follows.
            stop_early: leave out the stages that follow the last of `indices`.
            output_fmt: "NCHW".
            intermediates_only: return the maps alone.
        """
        choose(output_fmt, ("NCHW",), "output_fmt")
        taken, last = feature_take_indices(len(self.stages), indices)
        count = last + 1 if stop_early else len(self.stages)
        features, tokens = self._tokens(x, count)
        names = [f"layer{index + 1}" for index in taken]
        if norm and last + 1 == self._depth:
            features[names[-1]] = self.norm(features[names[-1]].movedim(1, -1)).movedim(-1, 1)
        maps = [features[name] for name in names]
        return maps if intermediates_only else (self._final(x, tokens, count), maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages that follow the last of `indices`, and norm and head where asked."""
        taken, last = feature_take_indices(len(self.stages), indices)
        pruned = last + 1 < len(self.stages)
        for stage in self.stages[last + 1 :]:
            delattr(self, f"layer{stage.number}")
        self.stages = self.stages[: last + 1]
        if pruned:
            self.num_features = self.head_hidden_size = self.stages[-1].dim
            self.output_fmt, self.num_global = "NCHW", 0
        if pruned or prune_norm:
            self.norm = nn.Identity()
        if pruned or prune_head:
            self.reset_classifier(0, "")
        return taken

    def _final(self, images: Tensor, tokens: Tensor, count: int) -> Tensor:
        """Make what `forward_features` returns of the tokens of the last of `count` stages."""
        if count == self._depth:
            tokens = self.norm(tokens)
        if self.output_fmt == "NLC":
            return tokens
        stage = self.stages[count - 1]
        cells = self.stride // self.strides[f"layer{stage.number}"]
        rows = (images.shape[-2] + self.stride - 1) // self.stride * cells
        return tokens[:, stage.num_global :].transpose(1, 2).unflatten(2, (rows, -1))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, height, width) -> normed tokens of the last stage.

        Shapes: (B, dim, ⌈height / stride⌉, ⌈width / stride⌉), or, where the last stage has global
        tokens, (B, N, dim).
        """
        count = len(self.stages)
        return self._final(x, self._tokens(x, count)[1], count)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool what `forward_features` returns, and classify unless `pre_logits`."""
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, self.num_global :].mean(dim=1) if self.num_global else x.mean(dim=(2, 3))
        x = self.head_drop(x)
        if pre_logits:
            return x
        scores: Tensor = self.head(x)
        return scores

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Images (B, in_chans, height, width) -> class scores (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


class Features(FeatureGetterNet):
    """What `features_only=True` makes: images to the maps of stages."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the inside of each block again in the backward pass, or keep it."""
        self.model.set_grad_checkpointing(enable)  # type: ignore[operator]


def _default_cfg() -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "layer1.0.proj",
        "classifier": "head",
        "fixed_input_size": False,
        "license": "mit",
    }


default_cfgs = generate_default_cfgs(
    {f"vil_{size}": _default_cfg() for size in ("tiny", "small", "medium", "base")}
)


def _create(variant: str, pretrained: bool, **options: Any) -> nn.Module:
    model: nn.Module = build_model_with_cfg(
        TimmViL,
        variant,
        pretrained,
        backbone=variant.removeprefix("vil_"),
        # Stages take several arguments, which timm's wrappers that rebuild models cannot follow.
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": Features},
        **options,
    )
    return model


@register_model
def vil_tiny(pretrained: bool = False, **options: Any) -> nn.Module:
    """ViL-Tiny; see `TimmViL` for the options."""
    return _create("vil_tiny", pretrained, **options)


@register_model
def vil_small(pretrained: bool = False, **options: Any) -> nn.Module:
    """ViL-Small; see `TimmViL` for the options."""
    return _create("vil_small", pretrained, **options)


@register_model
def vil_medium(pretrained: bool = False, **options: Any) -> nn.Module:
    """ViL-Medium; see `TimmViL` for the options."""
    return _create("vil_medium", pretrained, **options)


@register_model
def vil_base(pretrained: bool = False, **options: Any) -> nn.Module:
    """ViL-Base; see `TimmViL` for the options."""
    return _create("vil_base", pretrained, **options)
