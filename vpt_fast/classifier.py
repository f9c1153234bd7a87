"""Base classes of all tuned models, which save and load them."""

from __future__ import annotations

import copy
import json
import math
import operator
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
import safetensors
import safetensors.torch
import torch
from timm.layers import SelectAdaptivePool2d
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from vpt_fast.backbones.architecture import POOLING, differences
from vpt_fast.backbones.resolve import CONVNET, Origin
from vpt_fast.backbones.sources import finding_sources_once, local_folder
from vpt_fast.backbones.timm_convnet import FrozenConvNet
from vpt_fast.backbones.timm_eva import TimmViT, frozen_vit
from vpt_fast.backbones.timm_swin import FrozenSwin
from vpt_fast.backbones.timm_vit import POOLS, FrozenViT, dtype_of
from vpt_fast.backbones.timm_whole import WholeBackbone
from vpt_fast.engine import cost
from vpt_fast.engine.block import FrozenBlock, compute_dtype, without_autocast
from vpt_fast.engine.plan import Read, row_range
from vpt_fast.engine.policy import POLICIES, MemoryPolicy, check_memory, choose_policy
from vpt_fast.files import replacing
from vpt_fast.free_memory import free_bytes
from vpt_fast.hub import CARD_FILE, download_saved, model_card
from vpt_fast.kernels import get_backend

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

# Initial bias of the head: its sigmoid is 1/100 for every class, as in the official code.
_HEAD_BIAS = -math.log(99.0)

_Model = TypeVar("_Model", bound="TunedModel")


def check_arguments(
    num_classes: int,
    pool: str | None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    attention: str = "auto",
) -> None:
    """Checks arguments before a backbone is built or downloaded.

    Raises:
        ValueError: an argument out of range or not supported; the message names it.
    """
    check_count("num_classes", num_classes)
    if pool not in (None, *POOLS):
        raise ValueError(f"pool: got {pool!r}, want None or one of {', '.join(map(repr, POOLS))}")
    if dtype is not None:
        _check_dtype(dtype, " or None")
    get_backend(backend, attention)


def check_count(name: str, value: Any) -> int:
    """The value as a plain int, which JSON can hold (it may be NumPy's). Raises ValueError unless it is a
    whole number of at least 1."""
    try:
        count = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"{name}: got {value!r}, want a whole number from 1")
    return count


def _check_dtype(dtype: Any, otherwise: str = "") -> None:
    """Raises ValueError for a dtype without matrix products here, such as an 8-bit one."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(
            f"dtype: got {dtype!r}, want a floating-point torch.dtype of 16 bits or more{otherwise}"
        )


@dataclass(frozen=True)
class BackboneConfig(Origin):
    """A model's backbone: where it came from, the SHA-256 of its weights, and the settings that they do not
    show (`backbones.architecture`), which files of earlier versions lack."""

    fingerprint: str
    architecture: dict[str, Any] | None = field(default=None, kw_only=True)

    @property
    def call(self) -> str | None:
        """The name and arguments, as text, if JSON cannot hold the keyword arguments for timm (a class of
        layers, say); None if it can."""
        try:
            json.dumps(self.kwargs)
        except (TypeError, ValueError):  # ValueError: a mapping that contains itself
            weights = f", checkpoint={self.checkpoint!r}" if self.checkpoint is not None else ""
            weights = ", pretrained=True" if self.pretrained else weights
            keywords = "".join(f", {name}={value!r}" for name, value in self.kwargs.items())
            return f"{self.name}{weights}{keywords}"
        return None


@dataclass(frozen=True)
class ClassifierConfig:
    """What is needed to rebuild a model, besides its trained tensors and backbone.

    options: the other keyword arguments of the class's constructor, as JSON holds them.
    backbone_call: `BackboneConfig.call`; of a model that was loaded with an instance for a backbone, what its
        file recorded.
    """

    model: str  # the class's name
    backbone: BackboneConfig
    num_classes: int
    pool: str | None
    options: dict[str, Any]
    backbone_call: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold. A backbone whose keyword arguments JSON cannot hold is described
        like an instance, with the `backbone_call` beside it."""
        backbone = self.backbone
        if backbone.call is not None:
            backbone = replace(backbone, name=None, pretrained=False, kwargs={}, checkpoint=None)
        settings = asdict(replace(self, backbone=backbone))
        if self.backbone_call is None:
            del settings["backbone_call"]
        return settings


class _Built(type):
    """After a model's constructor, records which parameters it trains, and converts them to at least float32:
    layers are created in torch's default dtype, which may have 16 bits.

    The constructor runs outside of the caller's autocast, which would round what is folded for good, and of
    its inference mode, whose parameters silently get no gradient."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        with (
            torch.inference_mode(False),
            without_autocast("cpu"),
            without_autocast("cuda"),
            finding_sources_once(),
        ):
            model = super().__call__(*args, **kwargs)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        model._stored_names = {name for name, p in model.named_parameters() if p.requires_grad}
        return model


class TunedModel(nn.Module, metaclass=_Built):
    """The interface that training, saving and loading use. Subclasses define what is trained and what is
    computed.

    Args:
        backbone_config: identifies the backbone.
    """

    # Whether saved files hold the whole backbone, so that loading needs no published weights.
    stores_backbone = False

    # The hub's name of what it does, for the model card.
    hub_task = "image-classification"

    # Names of the trained tensors without weight decay.
    undecayed: tuple[str, ...] = ()

    # In some classes a FrozenSwin, FrozenConvNet or WholeBackbone; annotated as the usual case.
    backbone: FrozenViT
    num_classes: int

    # What the head reads: None for the backbone's own pooling, or a name in `timm_vit.POOLS`.
    pool: str | None = None

    # The names of the parameters that required a gradient when the model was built, or are in its file.
    _stored_names: set[str]

    # `ClassifierConfig.backbone_call` of the file that the model was loaded from with an instance.
    _recorded_call: str | None = None

    def __init__(self, backbone_config: BackboneConfig) -> None:
        super().__init__()
        self._backbone_config = backbone_config

    @property
    def config(self) -> ClassifierConfig:
        """The settings that rebuild this model."""
        return ClassifierConfig(
            model=type(self).__name__,
            backbone=self._backbone_config,
            num_classes=self.num_classes,
            pool=self.pool,
            options=self._options(),
            backbone_call=self._backbone_config.call or self._recorded_call,
        )

    def _options(self) -> dict[str, Any]:
        """The constructor's keyword arguments that not all classes share, as JSON holds them."""
        return {}

    @classmethod
    def stores_backbone_with(cls, options: dict[str, Any]) -> bool:
        """`stores_backbone` of a model built with these options."""
        del options
        return cls.stores_backbone

    def hold_frozen_weights_in(self, dtype: torch.dtype) -> None:
        """Rounds the weights of the folded blocks to `dtype`, permanently.

        For a model that always runs under autocast to `dtype`: results are bit-identical, the blocks take
        half the memory of float32 ones, and no step casts a weight. Saved files do not change. Blocks that
        are timm's own are left alone.

        Args:
            dtype: autocast's.

        Raises:
            ValueError: the weights do not survive in this dtype.
        """
        _check_dtype(dtype)
        for module in self.backbone.modules():
            if isinstance(module, FrozenBlock):
                module.hold_weights_in(dtype)

    @property
    def memory(self) -> str:
        """What is kept for backward; AttributeError in classes that have no choice."""
        raise AttributeError("memory")

    @memory.setter
    def memory(self, memory: str) -> None:
        # Without this property, an assignment would create an attribute that has no effect.
        raise ValueError(f"memory: got {memory!r} with {type(self).__name__}, which has no memory policies")

    def require_attention(self, device: torch.device) -> None:
        """Checks before the first step that an attention implementation chosen by name supports this device,
        the compute dtype (the model's own, or autocast's) and the head dimension.

        Raises:
            ValueError: it does not.
        """
        for module in self.backbone.modules():
            if isinstance(module, FrozenBlock):
                module.require_attention(device)

    def estimate_training_bytes(self, batch_size: int) -> cost.TrainingBytes:
        """Memory of a training step at the model's own image size: counted, or estimated where blocks are
        timm's own; see `cost.TrainingBytes`.

        Args:
            batch_size: images per step.

        Raises:
            ValueError: batch_size is not a whole number of at least 1.
        """
        return self._training_bytes(check_count("batch_size", batch_size))

    def _training_bytes(self, batch_size: int) -> cost.TrainingBytes:
        """Implements `estimate_training_bytes`."""
        raise NotImplementedError

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the model's input images."""
        return self.backbone.image_size

    @property
    def patch_size(self) -> tuple[int, int]:
        """(height, width) of a patch in pixels."""
        return self.backbone.patch_size

    @property
    def embed_dim(self) -> int:
        """d: the width of the tokens that the head reads."""
        return self.backbone.embed_dim

    @property
    def num_blocks(self) -> int:
        """L: the number of transformer blocks."""
        return len(self.backbone.blocks)

    @property
    def pretrained_cfg(self) -> Any:
        """timm's description of the backbone's weights, under the name that `timm.data.resolve_data_config`
        reads."""
        return getattr(self.backbone.stem, "pretrained_cfg", {})

    @property
    def data_config(self) -> dict[str, Any]:
        """timm's data settings of the backbone: mean, std, interpolation, crop_pct, input_size."""
        return dict(self.backbone.data_config)

    @property
    def num_backbone_parameters(self) -> int:
        """Parameters of the original backbone, without a classifier."""
        return self.backbone.num_parameters

    @property
    def num_trainable_parameters(self) -> int:
        """Parameters that are trained and saved."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @torch.inference_mode(False)  # in inference mode autograd saves nothing that could be counted
    def _counted_training_bytes(self, batch_size: int) -> cost.TrainingBytes:
        """Memory of a training step. What is kept is counted in a forward pass on the meta device, in the
        weights' own dtype; temporaries are estimated as three times the largest tensor that is kept or that
        a layer returns."""
        meta = copy.deepcopy(self).to("meta")
        sizes = [0]

        def look(layer: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                sizes.append(output.nbytes)

        for layer in meta.modules():
            layer.register_forward_hook(look)
        images = torch.empty(batch_size, self.backbone.in_chans, *self.image_size, device="meta")
        with cost.counting_kept(meta) as kept_sizes:
            meta(images)
        kept = kept_sizes()
        return cost.TrainingBytes(
            weights=self._weight_bytes(), kept=sum(kept), workspace=3 * max(sizes + kept)
        )

    def _weight_bytes(self) -> int:
        """Bytes of all parameters, and of gradient and momentum of the trained ones."""
        return sum(p.numel() * p.element_size() * (3 if p.requires_grad else 1) for p in self.parameters())

    def _check_images(self, images: torch.Tensor, tied: str | None = None) -> None:
        """Raises ValueError for unsuitable images; `tied`: why only the model's own size is accepted."""
        if not isinstance(images, torch.Tensor):
            raise ValueError(f"images: got a {type(images).__name__}, want a torch.Tensor (batch, C, H, W)")
        if not images.is_floating_point():
            raise ValueError(f"images: got {images.dtype}, want normalised images, of a floating-point dtype")
        channels = self.backbone.in_chans
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(
                f"images: got shape {tuple(images.shape)}, want (batch, {channels}, height, width)"
            )
        got, want, patch = tuple(images.shape[2:]), self.image_size, self.patch_size
        if tied is not None or not self.backbone.takes_any_size:
            if got != want:
                why = "" if tied is None else f": {tied}"
                raise ValueError(f"images: got {got[0]}x{got[1]}, want {want[0]}x{want[1]}{why}")
        elif not self.backbone.pads_images and (got[0] % patch[0] or got[1] % patch[1]):
            raise ValueError(f"images: got {got[0]}x{got[1]}, want a multiple of {patch[0]}x{patch[1]}")

    def _stored(self) -> dict[str, torch.Tensor]:
        """Name to tensor of everything that is saved: what requires a gradient, and what the class trains
        even if it has been frozen since (a fixed head, an average of models, a model in use)."""
        names = self._stored_names
        return {name: p for name, p in self.named_parameters() if p.requires_grad or name in names}

    def trainable_state_dict(self) -> dict[str, torch.Tensor]:
        """Name to tensor of everything that is trained; detached, sharing memory with the model."""
        return {name: tensor.detach() for name, tensor in self._stored().items()}

    @torch.no_grad()
    def load_trainable_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy trained tensors into the model.

        Raises:
            ValueError: a name is missing or unknown, or a shape differs; the model is unchanged then.
        """
        own = self._stored()
        missing, unknown = own.keys() - tensors.keys(), tensors.keys() - own.keys()
        for kind, names in (("missing", missing), ("unknown", unknown)):
            if names:
                raise ValueError(f"trained tensors: {kind} {', '.join(sorted(names))}")
        for name, tensor in own.items():
            got, want = tuple(tensors[name].shape), tuple(tensor.shape)
            if got != want:
                raise ValueError(f"trained tensors: {name} has shape {got}, want {want}")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    @property
    def unread_settings(self) -> tuple[str, ...]:
        """Fields of the backbone's `architecture` that do not matter to this model."""
        return () if self.pool is None else POOLING

    def _require_storable_head(self) -> None:
        """Raises ValueError if `from_pretrained` would not build the head again."""

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the trained tensors, and what is needed to rebuild the model, to a folder.

        config.json holds the settings and the backbone's fingerprint, model.safetensors only the trained
        tensors. Existing files are replaced one by one, each completely or not at all. If JSON cannot hold a
        keyword argument for timm (a class of layers, say), the model is saved like one whose backbone was
        given as an instance, which `from_pretrained` asks for, and a UserWarning says so.

        Raises:
            ValueError: a trained tensor is no longer a parameter (after a parametrisation, say), so that the
                file would lack it, or is split over processes (fully_shard), or the head is none that
                `from_pretrained` builds.
        """
        directory = Path(directory)
        self._require_storable_head()
        lacking = self._stored_names - self._stored().keys()
        if lacking:
            raise ValueError(
                f"{', '.join(sorted(lacking))}: no parameter of the model any more, which from_pretrained "
                "would miss; want it back as one (parametrize.remove_parametrizations), or else to save "
                "model.trainable_state_dict() yourself"
            )
        trained = self.trainable_state_dict()
        for name, tensor in trained.items():
            if type(tensor) is not torch.Tensor:
                raise ValueError(
                    f"{name}: got a {type(tensor).__name__}, as fully_shard makes it, which is not saved; "
                    "want the model as it was built, with the tensors that get_model_state_dict gathers "
                    "(StateDictOptions(full_state_dict=True)) loaded into it"
                )
        config = self.config
        settings = {"vpt_fast_version": version("vpt_fast"), **config.to_dict()}
        text = json.dumps(settings, indent=2) + "\n"
        if (call := config.backbone.call) is not None:
            warnings.warn(  # and no error, which would come after the training
                f"{CONFIG_FILE} cannot hold the keyword arguments of the backbone ({call}); to load "
                f"{directory}, build the backbone with them and pass it: from_pretrained(..., backbone=...)",
                stacklevel=2,
            )
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.contiguous() for name, t in trained.items()}
        with replacing(directory / WEIGHTS_FILE) as temporary:
            safetensors.torch.save_file(tensors, temporary)
        with replacing(directory / CONFIG_FILE) as temporary:
            temporary.write_text(text)

    @classmethod
    def from_pretrained(
        cls: type[_Model],
        path: str | os.PathLike[str],
        backbone: str | TimmViT | None = None,
        **overrides: Any,
    ) -> _Model:
        """Rebuild a saved model.

        Args:
            path: a folder that `save_pretrained` wrote, or owner/name of a repository on the Hugging Face
                hub, with @revision (a branch, tag or commit) or without.
            backbone: the backbone to use, if the saved one has no timm name or comes from elsewhere, such as
                a folder (local-dir:) that has moved.
            overrides: `checkpoint`, if the file of the backbone's weights has moved; `dtype`, `backend`,
                `attention`, `residual_dtype`: replace the saved values, in classes that have them.

        Raises:
            FileNotFoundError: it lacks a file, or there is neither such a folder nor such a repository.
            TypeError: an override that the class does not have.
            ValueError: it holds another class, or the backbone's weights or architecture are missing
                or not those that the model was trained on.
        """
        settings, tensors = read_pretrained(path)
        return cls._from_settings(settings, tensors, backbone, str(path), overrides)

    @classmethod
    def _from_settings(
        cls: type[_Model],
        settings: dict[str, Any],
        tensors: dict[str, torch.Tensor],
        backbone: str | TimmViT | None,
        path: str,
        overrides: dict[str, Any],
    ) -> _Model:
        if settings["model"] != cls.__name__:
            raise ValueError(f"{path}: holds a {settings['model']}, want a {cls.__name__}")
        options = dict(settings["options"])
        stores_backbone = cls.stores_backbone_with(options)
        known = [name for name in ("dtype", "backend", "attention", "residual_dtype") if name in options]
        if not stores_backbone:
            known.append("checkpoint")
        unknown = sorted(overrides.keys() - set(known))
        if unknown:
            wanted = " or ".join(known) if known else "none"
            raise TypeError(f"from_pretrained of {cls.__name__}: got {', '.join(unknown)}, want {wanted}")
        saved = BackboneConfig(**settings["backbone"])
        if backbone is None:
            if saved.name is None:
                call = settings.get("backbone_call")
                why = (
                    "has no timm name"
                    if call is None
                    else f"cannot be built from {CONFIG_FILE} alone ({call})"
                )
                raise ValueError(
                    f"backbone: the one that {path} was trained on {why}; pass it as backbone=..."
                )
            backbone = saved.name
            if (folder := local_folder(backbone)) and not folder.is_dir():
                raise ValueError(
                    f"backbone: {folder}, the folder that {path} was trained on, is not there; pass "
                    "where it is as backbone='local-dir:...'"
                )
        for name in ("dtype", "residual_dtype"):
            if isinstance(options.get(name), str):  # an unknown name reaches the constructor, which raises
                options[name] = getattr(torch, options[name], options[name])
        if isinstance(backbone, str):
            options |= {"pretrained": saved.pretrained and not stores_backbone, **saved.kwargs}
            if saved.checkpoint is not None and not stores_backbone:
                options["checkpoint"] = saved.checkpoint
                if "checkpoint" not in overrides and not Path(saved.checkpoint).is_file():
                    raise ValueError(
                        f"checkpoint: {saved.checkpoint}, which the backbone of {path} was loaded from, is "
                        "not there; pass the file as checkpoint=..., or the backbone as backbone=..."
                    )
        options |= overrides
        if settings["pool"] is not None:
            options["pool"] = settings["pool"]
        # The subclass's constructor, which takes a name or an instance.
        constructor: Any = cls
        model = constructor(backbone, settings["num_classes"], **options)
        got = model.backbone.fingerprint
        if stores_backbone:
            model._backbone_config = saved
        elif got != saved.fingerprint:
            raise ValueError(
                f"backbone: its weights are not those that {path} was trained on (fingerprint {got[:12]}..., "
                f"want {saved.fingerprint[:12]}...); pass the right one as backbone=..."
            )
        if model._backbone_config.name is None:
            model._recorded_call = settings.get("backbone_call")
            if saved.architecture:  # else the instance may have other settings than the name stands for
                model._backbone_config = saved
        # Files of earlier versions have no architecture.
        changed = differences(saved.architecture or {}, model.backbone.architecture, model.unread_settings)
        if saved.architecture and changed:
            raise ValueError(
                f"backbone: it has the weights but not the settings that {path} was trained on: "
                f"{'; '.join(changed)}; pass the right one as backbone=..."
            )
        # What a user had unfrozen in addition was saved too, and is unfrozen again.
        for name, parameter in model.named_parameters():
            if name in tensors:
                parameter.requires_grad_(True)
                model._stored_names.add(name)
        model.load_trainable_state_dict(tensors)
        return model

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload what `save_pretrained` writes to a model repository on the Hugging Face hub, which is made,
        with a model card, if it does not exist. A card that is there is left as it is.

        Returns:
            The commit's URL.
        """
        api = huggingface_hub.HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)  # first, as it may raise
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if not api.file_exists(repo_id, CARD_FILE):
                config = self.config
                card = model_card(
                    repo_id,
                    config.model,
                    config.backbone,
                    config.num_classes,
                    task=self.hub_task,
                    stores_backbone=self.stores_backbone,
                )
                (Path(folder) / CARD_FILE).write_text(card, encoding="utf-8")
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=f"{type(self).__name__} from vpt_fast"
            )
        return str(commit)


class TunedClassifier(TunedModel):
    """A backbone with a linear head. Subclasses define what is trained besides the head, and how the logits
    are computed.

    Args:
        backbone: frozen; a subclass unfreezes what it trains.
        origin: where the backbone came from.
        num_classes: outputs of the head.
        pool: what the head reads: None for the backbone's own pooling, or a name in `timm_vit.POOLS`.
    """

    undecayed = ("head.bias",)

    def __init__(
        self,
        backbone: FrozenViT | FrozenSwin | FrozenConvNet | WholeBackbone,
        origin: Origin,
        num_classes: int,
        *,
        pool: str | None,
    ) -> None:
        super().__init__(
            BackboneConfig(
                **asdict(origin), fingerprint=backbone.fingerprint, architecture=backbone.architecture
            )
        )
        self.backbone = backbone  # type: ignore[assignment]
        self.pool = pool
        self.num_classes = check_count("num_classes", num_classes)
        self.head = nn.Linear(backbone.embed_dim, self.num_classes, device=backbone.device)
        _start_head(self.head)

    @property
    def num_features(self) -> int:
        """d, under timm's name."""
        return self.embed_dim

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by a newly initialised one; prompts and everything else that is trained are kept.
        For features without a head, call `image_features`.

        Args:
            num_classes: outputs of the new head.
            global_pool: None, or the model's own pooling: `pool`, or if that is None timm's name. It cannot
                be changed, since the model was built to compute only the rows that it reads.

        Raises:
            ValueError: num_classes is not a whole number of at least 1, or another pooling.
        """
        num_classes = check_count("num_classes", num_classes)
        pool = self._pool_of_timm if self.pool is None else self.pool
        if global_pool not in (None, pool):
            raise ValueError(
                f"global_pool: got {global_pool!r}, want None or the model's own {pool!r}; another one "
                "is the argument pool, when the model is built"
            )
        dtype = self._feature_dtype
        self.head = nn.Linear(self.embed_dim, num_classes, device=self.backbone.device, dtype=dtype)
        _start_head(self.head)
        self.num_classes = num_classes

    @property
    def _pool_of_timm(self) -> str | None:
        """timm's name of the backbone's own pooling; for a ConvNet, of its pooling layer."""
        layers = [m.pool_type for m in self.backbone.modules() if isinstance(m, SelectAdaptivePool2d)]
        return layers[-1] if layers else self.backbone.stem.global_pool

    @property
    def _feature_dtype(self) -> torch.dtype:
        """dtype of the head's input: that of its weights, or the backbone's, at least float32, if it has
        none."""
        backbone = dtype_of(self.backbone, default=torch.float32)
        return dtype_of(self.head, default=torch.promote_types(backbone, torch.float32))

    def _require_storable_head(self) -> None:
        found = {name: tuple(weight.shape) for name, weight in self.head.named_parameters()}
        wanted = {"weight": (self.num_classes, self.embed_dim), "bias": (self.num_classes,)}
        if found != wanted:
            raise ValueError(
                f"head: got a {type(self.head).__name__} with {found or 'no weights'}, which from_pretrained "
                f"does not build again; want nn.Linear({self.embed_dim}, {self.num_classes}), as "
                "reset_classifier makes it, or else to save model.trainable_state_dict() yourself"
            )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, C, H, W) to logits (B, num_classes).

        Raises:
            ValueError: images of the wrong shape.
        """
        return self.head(self.image_features(images))

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, C, H, W) to the head's input (B, d), in its dtype: one vector per image, for
        image retrieval, say, or another classifier.

        Raises:
            ValueError: images of the wrong shape.
        """
        raise NotImplementedError

    def _features(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows that pooling reads, after the last block (B, R, d), to the head's input (B, d)."""
        return self.backbone.features(rows, self.pool).to(self._feature_dtype)

    def _features_of_tokens(self, tokens: torch.Tensor, reads: Read) -> torch.Tensor:
        """All tokens after the last block (B, N, d) to the head's input (B, d)."""
        rows = row_range(reads, tokens.shape[1], self.backbone.num_prefix_tokens, 0)
        # A copy: the final norm keeps its input, and a view would keep the unread rows alive too.
        return self._features(tokens[:, slice(*rows)].contiguous())

    @property
    def feature_shape(self) -> tuple[int, ...] | None:
        """Shape of one image's `frozen_features` at the model's own image size; None if the model has none,
        because its trained part needs the images."""
        return None

    def frozen_features(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, C, H, W) to the input of the trained part (B, *feature_shape), at least
        float32. It is the same in every epoch, so it may be computed once and cached. It requires a gradient
        if the images do, or if a user has unfrozen parameters before it."""
        raise NotImplementedError(f"{type(self).__name__} has no frozen features")

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """The trained part: `frozen_features` to logits (B, num_classes)."""
        raise NotImplementedError(f"{type(self).__name__} has no frozen features")

    def patch_tokens(self, images: torch.Tensor, blocks: Sequence[int]) -> list[torch.Tensor]:
        """Normalised images (B, C, H, W) to the patch tokens after the given blocks, before the final norm.

        Gradients flow through all of them to whatever is trained besides the head. Prefix tokens and prompts
        are left out, and so is the work for them in the last given block; no later block runs.

        Args:
            images: as for `forward`.
            blocks: indices from 0, in ascending order.

        Returns:
            (B, patches, d) for each block, in the residual stream's dtype; patches in row-major order.

        Raises:
            ValueError: images of the wrong shape, or no such blocks.
            NotImplementedError: the class has no patch tokens.
        """
        raise NotImplementedError(f"{type(self).__name__} gives no patch tokens")

    def _check_blocks(self, blocks: Sequence[int]) -> None:
        wanted = sorted({*blocks} & {*range(self.num_blocks)})
        if not blocks or list(blocks) != wanted or not all(type(index) is int for index in blocks):
            raise ValueError(
                f"blocks: got {list(blocks)}, want rising block indices from 0 to {self.num_blocks - 1}"
            )

    def _patches(self, tokens: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """The patches of a block's output, which starts with all `num_tokens` tokens, or is patches only."""
        if tokens.shape[1] == num_tokens - self.backbone.num_prefix_tokens:
            return tokens
        # A copy: if it is kept for backward, a view would keep the other rows alive too.
        return tokens[:, self.backbone.num_prefix_tokens : num_tokens].contiguous()


def _start_head(head: nn.Linear) -> None:
    nn.init.kaiming_normal_(head.weight, a=0, mode="fan_out")
    nn.init.constant_(head.bias, _HEAD_BIAS)


class FrozenClassifier(TunedClassifier):
    """A model whose frozen blocks are folded and run on the engine.

    Args:
        model, origin: from `backbones.resolve.resolve_backbone`.
        num_classes: outputs of the head.
        pool: what the head reads: None for the backbone's own pooling, or a name in `timm_vit.POOLS`.
        dtype: of the frozen weights; None for the backbone's own. Trained parameters are at least float32.
        backend, attention: see `kernels.get_backend`.
        timm_blocks: how many of the last blocks stay timm's own, for methods that train them; 0 for a Swin.
        residual_dtype: see `timm_vit.FrozenViT`; None for a Swin or ConvNet.

    Raises:
        ValueError: an argument out of range, or a part of the backbone that is not supported.
    """

    def __init__(
        self,
        model: nn.Module,
        origin: Origin,
        num_classes: int,
        *,
        pool: str | None,
        dtype: torch.dtype | None,
        backend: str,
        attention: str,
        timm_blocks: int = 0,
        residual_dtype: torch.dtype | None = None,
    ) -> None:
        backbone: FrozenViT | FrozenSwin | FrozenConvNet
        if isinstance(model, SwinTransformer):
            backbone = FrozenSwin(model, dtype, backend, attention)
        elif isinstance(model, CONVNET.model):
            backbone = FrozenConvNet(model, dtype, backend, attention)
        else:
            assert isinstance(model, TimmViT)
            backbone = frozen_vit(model, dtype, backend, attention, timm_blocks, residual_dtype)
        super().__init__(backbone, origin, num_classes, pool=pool)
        self._dtype = None if dtype is None else str(dtype).removeprefix("torch.")
        self._backend, self._attention = backend, attention

    def _options(self) -> dict[str, Any]:
        return {"dtype": self._dtype, "backend": self._backend, "attention": self._attention}


class PromptedClassifier(FrozenClassifier):
    """A FrozenClassifier with a memory policy, which selects what blocks keep for backward.

    Args:
        memory: a name in `engine.policy.MEMORY`.
        args, kwargs: see `FrozenClassifier`.
    """

    def __init__(self, *args: Any, memory: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.memory = memory
        # Kept per image outside the blocks, which "auto" leaves room for; None: by pooling and the head.
        self.bytes_beside: int | None = None
        # What "auto" has chosen. By device too: a model may be asked before it is moved.
        self._chosen: dict[tuple[int, int, torch.dtype, torch.device], str] = {}

    @property
    def memory(self) -> str:
        """What is kept for backward, a name in `engine.policy.MEMORY`; may be changed at any time."""
        return self._memory

    @memory.setter
    def memory(self, memory: str) -> None:
        check_memory(memory)
        self._memory = memory

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's name for ``memory = "recompute"``, or ``"exact"`` if not `enable`."""
        self.memory = "recompute" if enable else "exact"

    def memory_policy(self, batch_size: int, num_tokens: int | None = None) -> str:
        """Name of the policy that a training step uses: `memory`, or what ``"auto"`` chooses.

        ``"auto"`` checks the free memory once for each batch size, N, compute dtype and device, and keeps its
        choice.

        Args:
            batch_size: images per step.
            num_tokens: N; None for the model's own image size.

        Raises:
            ValueError: one of them is not a whole number of at least 1.
        """
        batch_size = check_count("batch_size", batch_size)
        if num_tokens is not None:
            num_tokens = check_count("num_tokens", num_tokens)
        return self._policy_name(batch_size, num_tokens or self.backbone.num_tokens)

    def _policy(self, batch_size: int, num_tokens: int) -> MemoryPolicy:
        """The policy of a forward pass."""
        if not torch.is_grad_enabled() or torch.compiler.is_exporting():
            return POLICIES["exact"]  # nothing is kept, so the free memory need not be checked
        return POLICIES[self._policy_name(batch_size, num_tokens)]

    def _policy_name(self, batch_size: int, num_tokens: int) -> str:
        """`memory_policy` without its checks: for empty batches and a compiler's symbolic sizes too."""
        if self.memory != "auto":
            return self.memory
        # A compiler specialises symbolic sizes here: the choice is for these.
        sizes = operator.index(batch_size), operator.index(num_tokens)
        key = (*sizes, self._compute_dtype, self.backbone.device)
        if key not in self._chosen:
            self._chosen[key] = self._choose_policy(*key)
        return self._chosen[key]

    @torch.compiler.assume_constant_result  # Dynamo calls it when it traces the first step of these sizes
    def _choose_policy(
        self, batch_size: int, num_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> str:
        beside = self._bytes_beside_blocks(batch_size, num_tokens)

        def step_bytes(memory: str) -> int:
            return beside + sum(self._step_bytes(batch_size, num_tokens, dtype, POLICIES[memory]))

        return choose_policy(step_bytes, dtype, free_bytes(device))

    @property
    def _compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.backbone.device.type, self.backbone.blocks[0].qkv_weight.dtype)

    def _training_bytes(self, batch_size: int) -> cost.TrainingBytes:
        """In the compute dtype (the model's own, or autocast's; behind the blocks always the model's own) and
        under the model's memory policy."""
        num_tokens = self.backbone.num_tokens
        policy = POLICIES[self._policy_name(batch_size, num_tokens)]
        kept, workspace = self._step_bytes(batch_size, num_tokens, self._compute_dtype, policy)
        kept += self._bytes_beside_blocks(batch_size, num_tokens)
        return cost.TrainingBytes(weights=self._weight_bytes(), kept=kept, workspace=workspace)

    def _step_bytes(
        self, batch_size: int, num_tokens: int, dtype: torch.dtype, policy: MemoryPolicy
    ) -> tuple[int, int]:
        """Bytes that blocks keep for backward, and bytes that temporaries add at the peak."""
        raise NotImplementedError

    def _num_rows_read(self, num_tokens: int) -> int:
        """R, the rows of the last block's output that the head reads, of N tokens and the prompts."""
        raise NotImplementedError

    @torch.inference_mode(False)  # in inference mode autograd saves nothing that could be counted
    def _bytes_beside_blocks(self, batch_size: int, num_tokens: int) -> int:
        """Bytes kept for backward outside the blocks: unless `bytes_beside` says them, by pooling (under
        autocast it is less) and of the head its input."""
        if self.bytes_beside is not None:
            return batch_size * self.bytes_beside
        pooling = self.backbone.features_bytes(self._num_rows_read(num_tokens), self.pool)
        return batch_size * (pooling + self.embed_dim * self._feature_dtype.itemsize)


class TrainedPart(nn.Module):
    """A model's trained part as a module: `frozen_features` to logits, with the same parameters."""

    def __init__(self, model: TunedClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.model.classify(features)


def read_pretrained(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The settings and the trained tensors of a saved model, from a folder or a hub repository.

    Raises:
        FileNotFoundError: it lacks a file, or there is neither such a folder nor such a repository.
        ValueError: the settings are not what `save_pretrained` writes.
    """
    folder = Path(path)
    if not folder.exists() and len(folder.parts) == 2 and not folder.is_absolute():
        folder = download_saved(str(path), [CONFIG_FILE, WEIGHTS_FILE])
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: has no {name}, want a folder that save_pretrained wrote")
    try:
        settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{folder / CONFIG_FILE}: holds {settings!r}, want a mapping")
    _check_settings(settings, folder / CONFIG_FILE)
    try:
        return settings, safetensors.torch.load_file(folder / WEIGHTS_FILE)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS_FILE}: cannot be read: {error}") from None


# Types of the values in config.json, and their names in error messages.
_KINDS: dict[Any, str] = {
    str: "text", dict: "a mapping", bool: "true or false", str | None: "text or null",
    dict | None: "a mapping or null",
}  # fmt: skip
_SETTINGS: dict[str, Any] = {"model": str, "backbone": dict, "options": dict, "backbone_call": str}
_BACKBONE: dict[str, Any] = {
    "name": str | None, "pretrained": bool, "kwargs": dict, "checkpoint": str | None, "fingerprint": str,
    "architecture": dict | None,
}  # fmt: skip


def _check_settings(settings: dict[str, Any], file: Path) -> None:
    """Raises ValueError if config.json does not have the form that `save_pretrained` writes, because another
    version wrote it, say, or someone edited it."""
    for config, where, kinds in ((ClassifierConfig, "", _SETTINGS), (BackboneConfig, "backbone.", _BACKBONE)):
        found = settings[where.rstrip(".")] if where else settings
        missing = {field.name for field in fields(config) if field.default is MISSING} - found.keys()
        if missing:
            raise ValueError(f"{file}: lacks {', '.join(where + name for name in sorted(missing))}")
        for name, kind in kinds.items():
            if name in found and not isinstance(found[name], kind):
                raise ValueError(f"{file}: {where}{name} is {found[name]!r}, want {_KINDS[kind]}")
    unknown = settings["backbone"].keys() - _BACKBONE.keys()
    if unknown:
        raise ValueError(f"{file}: backbone has {', '.join(sorted(unknown))}, want {', '.join(_BACKBONE)}")
