"""TunedModel: the interface of all models, with saving and loading."""

from __future__ import annotations

import operator
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, TypeVar

import huggingface_hub
import torch
from timm.models import group_parameters
from torch import nn

from vpt_fast.backbones.architecture import POOLING, differences
from vpt_fast.backbones.layers import on_meta
from vpt_fast.backbones.sources import finding_sources_once, local_folder
from vpt_fast.backbones.timm_vit import FrozenViT
from vpt_fast.backbones.vit import TimmViT
from vpt_fast.engine import cost
from vpt_fast.engine.block import FrozenBlock
from vpt_fast.engine.contexts import without_autocast
from vpt_fast.failures import is_out_of_memory
from vpt_fast.hub import CARD_FILE, model_card
from vpt_fast.saved_model import (
    CONFIG_FILE,
    BackboneConfig,
    ClassifierConfig,
    read_pretrained,
    require_harmless,
    write_pretrained,
)

_Model = TypeVar("_Model", bound="TunedModel")


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


def check_dtype(dtype: Any, otherwise: str = "") -> None:
    """Raises ValueError for a dtype without matrix products here, such as an 8-bit one."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(
            f"dtype: got {dtype!r}, want a floating-point torch.dtype of 16 bits or more{otherwise}"
        )


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
            model.train()  # as any new module of PyTorch is; parts of the backbone have been set otherwise
        model._stored_names = {name for name, p in model.named_parameters() if p.requires_grad}
        model._built_names = set(model.state_dict())
        if not model.stores_backbone:
            model._frozen_values = {
                name: _first_values(p)
                for name, p in model.named_parameters()
                if name not in model._stored_names and _is_plain(p)
            }
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

    # What the names of trained parameters that a method adds within timm's modules contain.
    added_to_backbone: re.Pattern[str] | None = None

    # In some classes a FrozenSwin, FrozenConvNet or WholeBackbone; annotated as the usual case.
    backbone: FrozenViT
    num_classes: int

    # What the head reads: None for the backbone's own pooling, or a name in `timm_vit.POOLS`.
    pool: str | None = None

    # The names of the parameters that required a gradient when the model was built, or are in its file.
    _stored_names: set[str]

    # The names of all tensors that the constructor makes.
    _built_names: set[str]

    # Of parameters that are not saved, the first values that they were built with.
    _frozen_values: Mapping[str, torch.Tensor] = MappingProxyType({})

    # `ClassifierConfig.backbone_call` of the file that the model was loaded from with an instance.
    _recorded_call: str | None = None

    def __init__(self, backbone_config: BackboneConfig) -> None:
        super().__init__()
        self._backbone_config = backbone_config
        self._replaced_names: set[str] = set()  # tensors for which `load_state_dict` had other values

    def __prepare_scriptable__(self) -> None:
        """torch.jit.script calls it first."""
        raise NotImplementedError(
            f"torch.jit.script does not compile a {type(self).__name__}; want torch.compile, torch.export "
            "or, under torch.no_grad(), torch.jit.trace"
        )

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
        half the memory of float32 ones, and no step casts their matrices. Saved files do not change. Blocks
        that are timm's own, and a Swin's merges between stages, are left alone.

        Args:
            dtype: autocast's.

        Raises:
            ValueError: the weights do not survive in this dtype; the model is unchanged then.
        """
        check_dtype(dtype)
        blocks = [module for module in self.backbone.modules() if isinstance(module, FrozenBlock)]
        for block in blocks:  # all of them first: a refusal must leave the model as it is
            block.spec.require_dtype(dtype)
        for block in blocks:
            block.hold_weights_in(dtype)

    @property
    def memory(self) -> str:
        """What is kept for backward; AttributeError in classes that have no choice."""
        raise AttributeError("memory")

    @memory.setter
    def memory(self, memory: str) -> None:
        # Without this property, an assignment would create an attribute that has no effect.
        raise ValueError(f"memory: got {memory!r} with {type(self).__name__}, which has no memory policies")

    def require_operations(self, device: torch.device) -> None:
        """Checks before the first step that kernels can be launched, and that an attention implementation
        chosen by name supports this device, the compute dtype (the model's own, or autocast's) and the head
        dimension.

        Raises:
            ValueError: it does not.
        """
        for module in self.backbone.modules():
            if isinstance(module, FrozenBlock):
                module.require_operations(device)

    def runs_kernels(self, device: torch.device) -> bool:
        """Whether steps on this device run Triton's kernels, which are compiled at their first call."""
        return any(m.runs_kernels(device) for m in self.backbone.modules() if isinstance(m, FrozenBlock))

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

    def no_weight_decay(self) -> set[str]:
        """Names of the backbone's parameters that timm's optimizers do not decay, as in timm's own model
        (positions and CLS token, say). They matter to methods that train them."""
        if isinstance(self.backbone, FrozenViT):  # whose stem is not the whole model
            names = self.backbone.undecayed
        else:
            names = getattr(self.backbone.stem, "no_weight_decay", set)()
        return {own for own, _ in self.named_parameters() if self._name_in_timm(own) in names}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """The layers of timm's layer-wise learning rates (`timm.optim.create_optimizer_v2(layer_decay=...)`).

        The backbone's parameters are in the layers that they are in in timm's own model. All that is trained
        beside it is in the head's, at the full rate: prompts too, as those of all blocks are one tensor, and
        adapters and low-rank updates, in whichever module they are.

        Args:
            coarse: whole stages instead of blocks, in networks that have them.

        Returns:
            From the name of a parameter to its layer, from 0.
        """
        own = {self._name_in_timm(name): name for name, _ in self.named_parameters()}
        renamed: Any = SimpleNamespace(named_parameters=lambda: ((name, None) for name in own))
        layers = group_parameters(renamed, self.backbone.stem.group_matcher(coarse), reverse=True)
        return {own[name]: layer for name, layer in layers.items()}.__getitem__

    def _name_in_timm(self, name: str) -> str:
        """The name that a parameter has in timm's model; of one that is not in it, a name in its head."""
        of_backbone, added = _OF_BACKBONE.match(name), self.added_to_backbone
        if of_backbone is None or (added is not None and added.search(name)):
            return f"head.{name}"
        return of_backbone[1]

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
        meta = on_meta(self)
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
        if isinstance(images, torch.fx.Proxy):
            raise ValueError("images: got a Proxy, as torch.fx.symbolic_trace makes it; want torch.export")
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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """`load_state_dict` calls it, of whatever holds the model too, before the modules within load theirs:
        what is not stored will be missing in a file if it is not the backbone's own."""
        for name, own in chain(self.named_parameters(), self.named_buffers()):
            if not _is_close(own, state_dict.get(prefix + name, own)):
                self._replaced_names.add(name)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _require_own_backbone(self) -> None:
        """Raises ValueError if a saved model would be built again with another backbone than it has now."""
        if self.stores_backbone:
            return
        stored = self._stored().keys()
        replaced = sorted(self._replaced_names - stored)
        if replaced:
            how = f"load_state_dict has replaced {_first_of(replaced)}"
        elif self.backbone.fingerprint != self._backbone_config.fingerprint:
            how = "model.backbone is another model's"
        elif changed := sorted(set(self._changed_names()) - stored):
            how = f"other values are in {_first_of(changed)}, as after model.apply(init)"
        else:
            return
        raise ValueError(
            f"backbone: its weights are not those that the model was built with ({how}), and files have "
            "only what is trained; want a model that is built with the right backbone, given these tensors: "
            "right.load_trainable_state_dict(model.trainable_state_dict())"
        )

    def _changed_names(self) -> list[str]:
        """Frozen parameters with other values than they were built with, but for rounding to 16 bits."""
        changed = []
        for name, parameter in self.named_parameters():
            built = self._frozen_values.get(name)
            if built is None or not _is_plain(parameter):
                continue
            now = _first_values(parameter).to(built.dtype)
            if now.shape == built.shape and not torch.allclose(now, built, 0.01, 1e-6, equal_nan=True):
                changed.append(name)
        return changed

    @property
    def unread_settings(self) -> tuple[str, ...]:
        """Fields of the backbone's `architecture` that do not matter to this model."""
        return () if self.pool is None else POOLING

    def _require_storable_head(self) -> None:
        """Raises ValueError if `from_pretrained` would not build the head again."""

    def storable_state_dict(self) -> dict[str, torch.Tensor]:
        """`trainable_state_dict`, if a file of it holds all that the model needs.

        Raises:
            ValueError: a trained tensor is no longer a parameter (after a parametrisation, say), so that the
                file would lack it, or is split over processes (fully_shard), or the head or another module is
                none that `from_pretrained` builds.
        """
        self._require_storable_head()
        lacking = self._stored_names - self._stored().keys()
        if lacking:
            raise ValueError(
                f"{', '.join(sorted(lacking))}: no parameter of the model any more, which the file "
                "would lack; want it back as one (parametrize.remove_parametrizations), or else to save "
                "model.trainable_state_dict() yourself"
            )
        trained = self.trainable_state_dict()
        if added := trained.keys() - self._built_names:
            raise ValueError(
                f"{', '.join(sorted(added))}: of a module that was added to the model, which from_pretrained "
                "would not build; want it in a module around the model, or else to save "
                "model.trainable_state_dict() yourself"
            )
        for name, tensor in trained.items():
            if type(tensor) is not torch.Tensor:
                raise ValueError(
                    f"{name}: got a {type(tensor).__name__}, as fully_shard makes it, which is not saved; "
                    "want the model as it was built, with the tensors that get_model_state_dict gathers "
                    "(StateDictOptions(full_state_dict=True)) loaded into it"
                )
        return trained

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the trained tensors, and what is needed to rebuild the model, to a folder.

        config.json holds the settings and the backbone's fingerprint, model.safetensors only the trained
        tensors. Existing files are replaced one by one, each completely or not at all. If config.json cannot
        hold a keyword argument for timm (a class of layers, or the url of weights), the model is saved like
        one whose backbone was given as an instance, which `from_pretrained` asks for, and a UserWarning says
        so.

        Raises:
            ValueError: as `storable_state_dict`, and if the backbone's weights have been replaced since the
                model was built.
        """
        self._save(directory, self.config, str(directory))

    def _save(self, directory: str | os.PathLike[str], config: ClassifierConfig, called: str) -> None:
        """`save_pretrained` with this config. called: the saved model's name for whoever loads it."""
        self._require_own_backbone()
        trained = self.storable_state_dict()
        if (call := config.backbone.call) is not None:
            warnings.warn(  # and no error, which would come after the training
                f"{CONFIG_FILE} cannot hold the keyword arguments of the backbone ({call}); to load "
                f"{called}, build the backbone with them and pass it: from_pretrained(..., backbone=...)",
                stacklevel=3,
            )
        write_pretrained(directory, config, trained)

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
            ValueError: it holds another class, or says where to download weights from or to, or the
                backbone's weights or architecture are missing or not those that the model was trained on.
        """
        return cls.rebuild(*read_pretrained(path), path, backbone, **overrides)

    @classmethod
    def rebuild(
        cls: type[_Model],
        settings: dict[str, Any],
        tensors: dict[str, torch.Tensor],
        path: str | os.PathLike[str],
        backbone: str | TimmViT | None,
        /,
        **overrides: Any,
    ) -> _Model:
        """As `from_pretrained`, of what `read_pretrained` has read from `path`."""
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
        given = {*overrides} if backbone is None else {*overrides, "backbone"}
        if backbone is None:
            backbone = _name_to_build(saved, settings.get("backbone_call"), path)
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
            require_harmless(options, path)
        options |= overrides
        if settings["pool"] is not None:
            options["pool"] = settings["pool"]
        # The subclass's constructor, which takes a name or an instance.
        constructor: Any = cls
        try:
            model = constructor(backbone, settings["num_classes"], **options)
        except (ValueError, TypeError, AssertionError, RuntimeError, ArithmeticError, LookupError) as error:
            is_callers = isinstance(error, ValueError) and str(error).partition(":")[0] in given
            if is_callers or is_out_of_memory(error):
                raise
            raise ValueError(
                f"{path}: its {CONFIG_FILE} describes a model that cannot be built: {error}"
            ) from error
        _require_backbone(model, saved, path)
        if stores_backbone:
            model._backbone_config = replace(saved, name=model._backbone_config.name)
        if model._backbone_config.name is None:
            model._recorded_call = settings.get("backbone_call")
            model._backbone_config = saved
        # What a user had unfrozen in addition was saved too, and is unfrozen again.
        for name, parameter in model.named_parameters():
            if name in tensors:
                parameter.requires_grad_(True)
                model._stored_names.add(name)
        try:
            model.load_trainable_state_dict(tensors)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return model

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload what `save_pretrained` writes to a model repository on the Hugging Face hub, which is made,
        with a model card, if it does not exist. A card that is there is left as it is. Where a backbone or
        its weights came from a path of this machine, only the last part of it is uploaded.

        Returns:
            The commit's URL.
        """
        api = huggingface_hub.HfApi(token=token)
        config = self.config
        config = replace(config, backbone=config.backbone.without_folders())
        with tempfile.TemporaryDirectory() as folder:
            self._save(folder, config, repo_id)  # first, as it may raise
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if not api.file_exists(repo_id, CARD_FILE):
                card = model_card(
                    repo_id,
                    config.model,
                    config.backbone,
                    config.num_classes,
                    task=self.hub_task,
                    stores_backbone=self.stores_backbone,
                    call=config.backbone_call,
                )
                (Path(folder) / CARD_FILE).write_text(card, encoding="utf-8")
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=f"{type(self).__name__} from vpt_fast"
            )
        return commit.commit_url  # before huggingface_hub 1.0, the text of a commit was another address


# Relative to a tensor's norm: more than folding differs by between machines, less than any training changes.
_SAME_WITHIN = 1e-4


def _is_close(own: torch.Tensor, given: Any) -> bool:
    """Whether two tensors have the same values but for rounding to one of their dtypes; True where they
    cannot be compared: another shape, which `load_state_dict` refuses, or subclasses (DTensor)."""
    if not isinstance(given, torch.Tensor) or own is given or own.shape != given.shape:
        return True
    if not {type(own), type(given)} <= {torch.Tensor, nn.Parameter} or not own.is_floating_point():
        return True
    if own.is_meta or given.is_meta:
        return given.is_meta
    rounding = max(torch.finfo(own.dtype).eps, torch.finfo(given.dtype).eps)
    wide = torch.promote_types(own.dtype, torch.float32)
    own, given = own.detach().to(wide), given.detach().to(own.device, wide)
    return torch.equal(own, given) or bool((own - given).norm() <= max(rounding, _SAME_WITHIN) * own.norm())


def _is_plain(parameter: nn.Parameter) -> bool:
    """Whether the values of a parameter can be read: not on the meta device, nor of a subclass (DTensor)."""
    return type(parameter) is nn.Parameter and not parameter.is_meta


def _first_values(parameter: nn.Parameter) -> torch.Tensor:
    """A copy of a few values, by which it is seen that they were initialised anew."""
    first = parameter.detach()[(slice(1),) * (parameter.ndim - 1)]
    return first.reshape(-1)[:8].to("cpu", copy=True)


def _first_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} others"


# A segmenter has its backbone in the encoder. Blocks are beside the rest of timm's model.
_OF_BACKBONE = re.compile(r"(?:encoder\.)?backbone\.(?:stem\.)?(.+)")


def _name_to_build(saved: BackboneConfig, call: str | None, path: str | os.PathLike[str]) -> str:
    """The name of a saved model's backbone; `call`: `ClassifierConfig.backbone_call`.

    Raises ValueError if it has none, or is a folder that is not there.
    """
    if saved.name is None:
        why = "has no timm name" if call is None else f"cannot be built from {CONFIG_FILE} alone ({call})"
        raise ValueError(f"backbone: the one that {path} was trained on {why}; pass it as backbone=...")
    if (folder := local_folder(saved.name)) and not folder.is_dir():
        raise ValueError(
            f"backbone: {saved.name.partition(':')[2]}, the folder that {path} was trained on, is not there; "
            "pass where it is as backbone='local-dir:...'"
        )
    return saved.name


def _require_backbone(model: TunedModel, saved: BackboneConfig, path: str | os.PathLike[str]) -> None:
    """Raises ValueError unless a model's backbone has the settings and, unless its file holds them, the
    weights of the saved one."""
    got = model.backbone.fingerprint
    if not model.stores_backbone and got != saved.fingerprint:
        raise ValueError(
            f"backbone: its weights are not those that {path} was trained on (fingerprint {got[:12]}..., "
            f"want {saved.fingerprint[:12]}...); pass the right one as backbone=..."
        )
    changed = differences(saved.architecture, model.backbone.architecture, model.unread_settings)
    if changed:
        raise ValueError(
            f"backbone: it has the weights but not the settings that {path} was trained on: "
            f"{'; '.join(changed)}; pass the right one as backbone=..."
        )
