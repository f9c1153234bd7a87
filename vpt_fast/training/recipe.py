"""The standard recipe of Visual Prompt Tuning as one dataclass; its fields are the YAML keys and the flags.

Defaults follow the public code of Jia et al., "Visual Prompt Tuning", ECCV 2022 (KMnP/vpt): SGD with
momentum, 100 epochs with 10 of warm-up and cosine decay after it, the learning rate set once per epoch.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from vpt_fast.data.tasks import PREPROCESSING, find_task
from vpt_fast.training.method_rules import BASE_LR, METHOD_KNOBS, METHODS, parse_method
from vpt_fast.training.setting_values import read_yaml, typed

REFERENCE_BATCH = 256  # lr = base_lr * batch / 256
# Default for a user's own data with fewer images than the method's batch: one step per epoch, at a rate for
# 2048 images, would be no sensible recipe.
SMALL_SET_BATCH = 64
NUM_PROMPTS = 10  # the length that the paper chose most often on VTAB-1k for VPT-Deep
SEGMENTATION = "segmentation"  # the only task that is not a benchmark
POLY_POWER = 0.9
LARGEST_RATE = 1e38  # for base_lr and weight_decay: about float32's largest number
SEGMENTATION_KNOBS = ("ignore_zero", "head_channels", "aux_weight")
CLASSIFICATION_KNOBS = (  # settings that segmentation does not have
    "data_root",
    "train_on",
    "test",
    "train_fraction",
    "shots",
    "val_fraction",
    "augment",
    "resize",
    "resident",
    "pool",
    "class_weights",
)


def _knob(
    default: Any,
    help: str,
    panel: str,
    *,
    shown: str | None = None,
    metavar: str | None = None,
    result: bool = True,
) -> Any:
    """A field and its description on the command line.

    ``shown`` describes a default that depends on other settings; ``result=False`` marks a setting that no
    result depends on, so that it may change when a run is resumed.
    """
    metadata = {"help": help, "panel": panel, "shown": shown, "metavar": metavar, "result": result}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


REQUIRED = dataclasses.MISSING
DATA, MODEL, PROMPTS, OPTIMISATION, RUN = "Data", "Model", "Prompts", "Optimisation", "Run"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of a training run. None means "by the recipe's rule"; :meth:`resolved` fills these in.

    Raises ValueError, which names the field, for a value out of range.
    """

    data: str = _knob(
        REQUIRED,
        "Folder with one folder of images per class, or with train/, val/ and optionally test/ that "
        "hold these or WebDataset shards; or a timm data set name (torch/, hfds/, wds/, tfds/...). With "
        "--task, the folder of the task, or the one above it.",
        DATA,
        result=False,
    )
    task: str | None = _knob(
        None,
        "Benchmark task, such as vtab/cifar or fgvc/cub, which sets the defaults of the flags below; or "
        "segmentation, for --data in ADE20k's layout.",
        DATA,
        shown="none",
    )
    data_root: str | None = _knob(
        None, "Folder that holds timm data sets.", DATA, shown="the library's own", result=False
    )
    train_on: Literal["train", "train+val"] = _knob(
        "train", "Splits to train on. With train+val there is no validation.", DATA
    )
    test: bool = _knob(False, "Evaluate on the test images after the last epoch.", DATA, result=False)
    train_fraction: float = _knob(
        1.0, "Fraction of each class's training images to use, drawn with --seed.", DATA
    )
    shots: int | None = _knob(
        None,
        "Training images of each class to use, drawn with --seed; of a class that has fewer, all.",
        DATA,
        shown="all",
    )
    val_fraction: float = _knob(
        0.2, "Fraction of each class held out for validation if there is no val/.", DATA
    )
    ignore_zero: bool | None = _knob(
        None,
        "Segmentation: label 0 is no class, and label 1 the first.",
        DATA,
        shown="on with 150 classes, as in ADE20k",
    )
    normalization: Literal["backbone", "imagenet", "inception", "none"] | None = _knob(
        None,
        "Mean and standard deviation to normalise images with.",
        DATA,
        shown="imagenet with a benchmark --task, else backbone",
    )
    augment: Literal["none", "flip", "crop_flip"] | None = _knob(
        None, "Augmentation of the training images.", DATA, shown="crop_flip for fgvc tasks, else none"
    )
    resize: Literal["squash", "shortest"] | None = _knob(
        None,
        "squash: resize to the model's input size. shortest: keep the aspect ratio, and crop.",
        DATA,
        shown="squash; shortest for fgvc tasks and with --augment crop_flip",
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] | None = _knob(
        None, "Interpolation when resizing.", DATA, shown="the backbone's own"
    )
    resident: Literal["auto", "device", "host", "off"] = _knob(
        "auto",
        "Memory in which decoded images are kept; auto is by how much is free.",
        DATA,
        result=False,
    )
    workers: int | None = _knob(
        None, "Threads or processes for decoding images.", DATA, shown="all cores", result=False
    )

    backbone: str = _knob(
        REQUIRED,
        "timm name of a Vision Transformer, Swin or ConvNet, or local-dir:FOLDER or hf-hub:OWNER/NAME, which "
        "hold one; a name from the paper's code (see vpt-fast backbones); or vpt_fast_demo.",
        MODEL,
    )
    method: str = _knob(
        "vpt-deep",
        f"Tuning method: {', '.join(METHODS)}. K is the number of layers (mlp) or blocks (partial).",
        MODEL,
    )
    pretrained: bool | None = _knob(
        None, "Load the backbone's published weights.", MODEL, shown="on without --checkpoint"
    )
    checkpoint: str | None = _knob(
        None, "File with the backbone's weights.", MODEL, shown="none", result=False
    )
    backbone_arg: dict[str, Any] = _knob(
        {},
        "Keyword argument for timm.create_model, such as img_size=384; may be repeated.",
        MODEL,
        shown="none",
        metavar="KEY=VALUE",
    )
    pool: Literal["cls", "image", "prompts", "image_and_prompts"] | None = _knob(
        None,
        "What the head reads: the CLS token, or the mean of these output tokens.",
        MODEL,
        shown="the backbone's own; image_and_prompts for prompts on mae_* and on a Swin",
    )
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = _knob(
        None, "Data type of the frozen weights.", MODEL, shown="the backbone's own"
    )
    residual_dtype: Literal["bfloat16"] | None = _knob(
        None,
        "Data type of the residual stream (vpt-deep and vpt-shallow on a Vision Transformer).",
        MODEL,
        shown="float32",
    )
    backend: Literal["auto", "torch", "triton", "triton_fused_mlp"] = _knob(
        "auto", "Implementation of the frozen blocks; auto uses Triton kernels on supported GPUs.", MODEL
    )
    attention: Literal[
        "auto", "flash_attn", "flash_attn_3", "flash_attn_4", "sdpa_flash", "sdpa_cudnn", "sdpa_cpu"
    ] = _knob("auto", "Attention implementation; auto is the backend's own.", MODEL)
    memory: Literal["auto", "exact", "compact", "recompute_mlp", "recompute"] = _knob(
        "auto",
        "Activations kept for the backward pass; auto is the fastest choice that fits in free memory.",
        MODEL,
    )

    head_channels: int = _knob(256, "Segmentation: channels of the head.", MODEL)
    aux_weight: float = _knob(0.4, "Segmentation: weight of each auxiliary loss.", MODEL)
    adapter_reduction: int = _knob(8, "adapter: ratio of the backbone's width to the bottleneck's.", MODEL)
    lora_rank: int = _knob(8, "lora: rank of the updates.", MODEL)

    num_prompts: int | None = _knob(
        None,
        "Prompts per prompted block; for --prompt-location pad the border in pixels, for concat-channel the "
        "extra channels.",
        PROMPTS,
        shown=f"{NUM_PROMPTS}; derived for add and add-1",
    )
    prompt_layers: int | list[int] | None = _knob(
        None,
        "vpt-deep: blocks that get prompts; K for the first K, -K for the last K, I,J,... by index from 0.",
        PROMPTS,
        shown="all",
        metavar="K|-K|I,J,...",
    )
    after_prompts: Literal["flow", "drop"] = _knob(
        "flow",
        "Whether the prompts' outputs stay in the sequence (flow) or are dropped in later blocks without "
        "prompts of their own.",
        PROMPTS,
    )
    prompt_location: Literal[
        "prepend", "key-value", "add", "add-1", "prepend-pixel", "pad", "concat-channel"
    ] = _knob(
        "prepend",
        "Where prompts are inserted (the paper's Fig. 5); key-value is prefix tuning.",
        PROMPTS,
    )
    prompt_init: Literal["uniform", "tokens"] = _knob(
        "uniform",
        "Prompts before training: uniform random numbers, or tokens of training images where they enter the "
        "prompt's block (SPT).",
        PROMPTS,
    )
    prompt_shared: bool = _knob(False, "Share one set of prompts between all prompted blocks.", PROMPTS)
    prompt_project: int | None = _knob(
        None,
        "Dimension of the prompts before a trained linear layer projects them to the model's width.",
        PROMPTS,
        shown="off",
    )
    prompt_dropout: float | None = _knob(
        None, "Dropout probability of the prompts.", PROMPTS, shown="0.1 for deep prompts, else 0"
    )
    prompt_dropout_per: Literal["image", "batch"] = _knob(
        "image", "Draw a dropout mask per image, or one per batch.", PROMPTS
    )

    epochs: int = _knob(100, "Passes over the training images.", OPTIMISATION)
    warmup_epochs: int | None = _knob(
        None,
        "Epochs of linear warm-up; the first has a learning rate of 0.",
        OPTIMISATION,
        shown="a tenth of the epochs, at most 10 (5 for methods that use AdamW); 0 for segmentation",
    )
    schedule: Literal["cosine", "poly"] | None = _knob(
        None,
        "Learning rate decay after warm-up; poly is a polynomial of power 0.9.",
        OPTIMISATION,
        shown="cosine; poly for segmentation",
    )
    base_lr: float | None = _knob(
        None,
        "Base learning rate; the peak rate is base_lr * batch_size / 256.",
        OPTIMISATION,
        shown="1 with sgd, 0.001 with adamw",
    )
    batch_size: int | None = _knob(
        None,
        "Images per optimizer step, over all processes. A smaller training set makes one step per epoch, at "
        "the same learning rate.",
        OPTIMISATION,
        shown="128, or 64 with 100 or more prompts; 2048 for linear, 1280 for partial; 16 for segmentation; "
        "64 if it would exceed the number of training images and there is no --task",
    )
    accumulate: int = _knob(
        1,
        "Split each batch into this many parts to save memory; the gradient is the same, except where "
        "BatchNorm is trained (full and partial on a ConvNet): it normalises each part by itself.",
        OPTIMISATION,
    )
    optimizer: Literal["sgd", "adamw"] | None = _knob(
        None,
        "Optimizer.",
        OPTIMISATION,
        shown="sgd; adamw for full, partial, bias, vpt+bias, adapter and lora",
    )
    momentum: float = _knob(0.9, "SGD momentum.", OPTIMISATION)
    weight_decay: float = _knob(1e-4, "Weight decay; not applied to the head's bias.", OPTIMISATION)
    label_smoothing: float = _knob(0.0, "Label smoothing of the cross-entropy loss.", OPTIMISATION)
    class_weights: Literal["none", "balanced"] = _knob(
        "none",
        "Class weights in the training loss; balanced is images / (classes * images of the class).",
        OPTIMISATION,
    )
    clip_grad_norm: float | None = _knob(None, "Clip the gradient to this norm.", OPTIMISATION, shown="off")
    precision: Literal["fp32", "bf16", "fp16"] | None = _knob(
        None,
        "Mixed precision (autocast); fp16 uses loss scaling.",
        OPTIMISATION,
        shown="bf16 on CUDA (fp16 on GPUs without bf16), fp32 on a CPU",
    )
    seed: int = _knob(
        42, "Random seed: splits, initialisation, image order, augmentation, dropout.", OPTIMISATION
    )

    eval_every: int = _knob(
        1,
        "Evaluate the val images after every so many epochs, and after the last; 0: after the last alone.",
        RUN,
        shown="1; 0 in sweeps without a pruner",
        result=False,
    )
    cuda_graph: bool | None = _knob(
        None,
        "Capture the training step in a CUDA graph.",
        RUN,
        shown="on if possible: classification on CUDA, accumulate 1, not fp16; off for full on several GPUs",
        result=False,
    )
    device: str | None = _knob(
        None, "Device, such as cpu or cuda:0.", RUN, shown="cuda if available, else cpu", result=False
    )
    tensorboard: bool | None = _knob(
        None,
        "Write TensorBoard logs.",
        RUN,
        shown="on if tensorboard is installed; off in sweeps",
        result=False,
    )

    def __post_init__(self) -> None:
        hints = _hints()
        for field in dataclasses.fields(self):
            value = typed(field.name, getattr(self, field.name), hints[field.name])
            object.__setattr__(self, field.name, value)
        for name, low in (
            ("num_prompts", 1),
            ("prompt_project", 1),
            ("adapter_reduction", 1),
            ("lora_rank", 1),
            ("head_channels", 1),
            ("shots", 1),
            ("epochs", 1),
            ("warmup_epochs", 0),
            ("batch_size", 1),
            ("accumulate", 1),
            ("workers", 0),
            ("eval_every", 0),
        ):
            self._require(name, lambda v, low=low: v >= low, f"at least {low}")
        self._require("seed", lambda v: 0 <= v < 2**64, "at least 0 and below 2**64")
        for name in ("prompt_dropout", "momentum", "label_smoothing"):
            self._require(name, lambda v: 0 <= v < 1, "in [0, 1)")
        for name in ("clip_grad_norm", "aux_weight"):
            self._require(name, lambda v: 0 < v < math.inf, "positive and finite")
        self._require("base_lr", lambda v: 0 < v <= LARGEST_RATE, f"positive and at most {LARGEST_RATE:g}")
        self._require("weight_decay", lambda v: 0 <= v <= LARGEST_RATE, f"in [0, {LARGEST_RATE:g}]")
        self._require("val_fraction", lambda v: 0 < v < 1, "in (0, 1)")
        self._require("train_fraction", lambda v: 0 < v <= 1, "in (0, 1]")
        if self.task is not None and self.task != SEGMENTATION:
            object.__setattr__(self, "task", find_task(self.task).name)
        self._reject_knobs_of_other_tasks()
        if self.warmup_epochs is not None and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs is {self.warmup_epochs}; it must be less than epochs ({self.epochs})"
            )
        self._reject_knobs_of_other_methods()
        if self.chosen_optimizer == "adamw" and self.momentum != Recipe.momentum:
            raise ValueError(
                f"momentum is {self.momentum}, and adamw has no such setting; leave it out or choose "
                "optimizer sgd"
            )
        if self.task is not None and self.val_fraction != Recipe.val_fraction:
            raise ValueError(
                f"val_fraction is {self.val_fraction}, and {self.task} has a val split of its own; leave it "
                "out"
            )
        if self.train_on == "train+val" and self.val_fraction != Recipe.val_fraction:
            raise ValueError(
                f"val_fraction is {self.val_fraction} beside train_on train+val, which holds nothing out; "
                "leave one of them out"
            )
        if self.shots is not None and self.train_fraction != Recipe.train_fraction:
            raise ValueError(
                f"train_fraction is {self.train_fraction} beside shots {self.shots}; leave one of them out"
            )
        if self.pretrained and self.checkpoint is not None:
            raise ValueError(
                f"pretrained is on beside checkpoint {self.checkpoint}, which has the weights; leave one out"
            )
        if self.prompt_init == "tokens":
            for name in self._given(("prompt_location", "prompt_project")):
                raise ValueError(
                    f"prompt_init is tokens beside {name} {getattr(self, name)}, with which prompts are no "
                    "tokens of the backbone's width; leave one of them out"
                )
        if self.method == "vpt-shallow" and self.prompt_layers is not None:
            raise ValueError(
                "prompt_layers only applies to method vpt-deep; vpt-shallow has prompts in one place"
            )

    def _require(self, name: str, holds: Any, wanted: str) -> None:
        value = getattr(self, name)
        if value is not None and not holds(value):
            raise ValueError(f"{name} is {value}; it must be {wanted}")

    def _given(self, names: Iterable[str]) -> list[str]:
        """Those of the settings that do not have their default value."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return [name for name in names if getattr(self, name) != defaults[name]]

    def _reject_knobs_of_other_tasks(self) -> None:
        is_segmentation = self.task == SEGMENTATION
        if given := self._given(CLASSIFICATION_KNOBS if is_segmentation else SEGMENTATION_KNOBS):
            task = (
                "task segmentation has no such setting"
                if is_segmentation
                else "only goes with task segmentation"
            )
            raise ValueError(f"{', '.join(given)}: {task}; leave it out")

    def _reject_knobs_of_other_methods(self) -> None:
        own = parse_method(self.method).rule.knobs
        if given := self._given(name for name in METHOD_KNOBS if name not in own):
            takers = [name for name, rule in METHODS.items() if set(given) <= set(rule.knobs)]
            hint = f" or choose {' or '.join(takers)}" if takers else ""
            raise ValueError(
                f"{', '.join(given)}: method {self.method} has no such setting; leave it out{hint}"
            )

    def resolved(self, *, num_train_images: int, device_type: str, world_size: int = 1) -> Recipe:
        """This recipe with all defaults that depend on method, data and device filled in.

        Raises ValueError if ``world_size`` processes cannot share a batch evenly.
        """
        is_segmentation = self.task == SEGMENTATION
        changes: dict[str, Any] = self._preprocessing_defaults()
        if self.pretrained is None:
            changes["pretrained"] = self.checkpoint is None
        method = parse_method(self.method)
        num_prompts = self.num_prompts
        if "num_prompts" in method.rule.knobs:
            if num_prompts is None and self.prompt_location not in ("add", "add-1"):
                num_prompts = changes["num_prompts"] = NUM_PROMPTS
            if self.prompt_dropout is None:
                is_dropped = method.name != "vpt-shallow" and not self._prompts_are_pixels()
                changes["prompt_dropout"] = 0.1 if is_dropped else 0.0
        if self.warmup_epochs is None:
            warmup = 0 if is_segmentation else min(method.rule.warmup_epochs, self.epochs // 10)
            changes["warmup_epochs"] = warmup
        if self.schedule is None:
            changes["schedule"] = "poly" if is_segmentation else "cosine"
        changes["optimizer"] = self.chosen_optimizer
        if self.base_lr is None:
            changes["base_lr"] = BASE_LR[self.chosen_optimizer]
        batch_size = self.batch_size
        if batch_size is None:
            batch_size = 64 if (num_prompts or 0) >= 100 else method.rule.batch_size
            if is_segmentation:
                batch_size = 16
            elif self.task is None and batch_size > num_train_images:
                batch_size = SMALL_SET_BATCH
        if batch_size < num_train_images and batch_size % world_size:
            raise ValueError(f"batch_size is {batch_size}; {world_size} processes cannot share it evenly")
        changes["batch_size"] = batch_size
        if self.precision is None:
            from vpt_fast.training.precision import default_precision

            changes["precision"] = default_precision(device_type)
        resolved = dataclasses.replace(self, **changes)
        resolved._require_one_16_bit_type(device_type)
        return resolved

    def _require_one_16_bit_type(self, device_type: str) -> None:
        """Autocast concatenates no tensors of one 16-bit type with those of the other."""
        autocast = {"bf16": "bfloat16", "fp16": "float16"}.get(self.precision or "")
        if autocast is not None and self.dtype in {"bfloat16", "float16"} - {autocast}:
            raise ValueError(
                f"dtype is {self.dtype} and precision {self.precision} on {device_type}, which do not go "
                f"together; it must be dtype {autocast}, or precision "
                f"{'fp16' if self.dtype == 'float16' else 'bf16'} or fp32"
            )

    @property
    def chosen_optimizer(self) -> str:
        """`optimizer`, or the method's."""
        return self.optimizer or parse_method(self.method).rule.optimizer

    @property
    def trains_on_part(self) -> bool:
        """Whether only some of the training images are used, which the seed decides about."""
        return self.train_fraction < 1 or self.shots is not None

    @property
    def weights_file(self) -> str | None:
        """The file with the backbone's weights, if it is the user's own."""
        from vpt_fast.backbones.sources import WEIGHTS_FILE, local_folder

        if self.checkpoint is not None or self.pretrained is False:
            return self.checkpoint
        folder = local_folder(self.backbone)
        return None if folder is None else str(folder / WEIGHTS_FILE)

    def _prompts_are_pixels(self) -> bool:
        """Whether the backbone has no tokens to prepend prompts to."""
        from vpt_fast.backbones.resolve import CONVNET, kind_of

        return kind_of(self.backbone) is CONVNET

    def _preprocessing_defaults(self) -> dict[str, Any]:
        """Values for the preprocessing settings that were not given, from the task if there is one."""
        defaults: dict[str, Any] = {"normalization": "backbone", "augment": "none"}
        if self.task == SEGMENTATION:
            del defaults["augment"]  # segmentation has its own augmentation
        elif self.task is not None:
            defaults = dict(PREPROCESSING[find_task(self.task).suite])
            if self.resize == "squash" and defaults["augment"] == "crop_flip":
                defaults["augment"] = "flip"  # there is nothing to crop
            if self.augment == "crop_flip":
                defaults["resize"] = "shortest"
        return {name: value for name, value in defaults.items() if getattr(self, name) is None}

    def step_images(self, num_train_images: int, num_processes: int = 1) -> int:
        """Images in a full step of a resolved recipe, in each of the processes that share it."""
        assert self.batch_size is not None, "resolve the recipe first"
        return math.ceil(min(self.batch_size, num_train_images) / num_processes)

    def evaluates_after(self, epoch: int) -> bool:
        """Whether val, if there is one, is evaluated after ``epoch`` (counted from 0)."""
        is_due = self.eval_every > 0 and (epoch + 1) % self.eval_every == 0
        return is_due or epoch + 1 == self.epochs

    @property
    def peak_lr(self) -> float:
        """Learning rate of a resolved recipe at the end of warm-up.

        It follows the requested batch size, as in KMnP/vpt, even if there are fewer images: a linear probe
        with batch size 2048 has the same rate on 800 and on 1,000 images.
        """
        assert self.batch_size is not None and self.base_lr is not None, "resolve the recipe first"
        return self.base_lr * self.batch_size / REFERENCE_BATCH

    def learning_rate(self, epoch: int) -> float:
        """Learning rate of a resolved recipe in ``epoch`` (counted from 0)."""
        warmup, schedule = self.warmup_epochs, self.schedule
        assert warmup is not None and schedule is not None, "resolve the recipe first"
        return self.peak_lr * lr_factor(epoch, warmup_epochs=warmup, epochs=self.epochs, schedule=schedule)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Raises ValueError for a key that is unknown, missing or of the wrong type."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                near = difflib.get_close_matches(str(key), fields, n=3)
                hint = f"; close names: {', '.join(near)}" if near else ""
                raise ValueError(f"unknown setting {key!r}{hint}")
        for name, field in fields.items():
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and values.get(name) is None:
                raise ValueError(
                    f"{name} is not given; it is a flag (--{name}) and a key of the configuration file"
                )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_yaml(cls, path: Path) -> Recipe:
        """The recipe in a YAML file; raises ValueError, which names the file, if it cannot be used."""
        values = read_yaml(path)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"configuration file {path}: {error}") from None

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def differences(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """Settings that affect results and differ: name to (this value, the other's)."""
        return {
            field.name: (getattr(self, field.name), getattr(other, field.name))
            for field in dataclasses.fields(self)
            if field.metadata["result"] and getattr(self, field.name) != getattr(other, field.name)
        }


@functools.cache
def _hints() -> dict[str, Any]:
    """The fields' types. A sweep makes thousands of recipes, and this takes most of making one."""
    return get_type_hints(Recipe)


def lr_factor(epoch: int, *, warmup_epochs: int, epochs: int, schedule: str = "cosine") -> float:
    """Fraction of the peak learning rate in ``epoch``: epoch / warmup_epochs in warm-up, then cosine decay
    towards 0, or with ``"poly"`` (1 - progress) to the power 0.9."""
    if epoch < warmup_epochs:
        return epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    if schedule == "poly":
        return (1.0 - progress) ** POLY_POWER
    return 0.5 * (1.0 + math.cos(math.pi * progress))
