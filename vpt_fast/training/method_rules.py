"""The tuning methods by name: each one's own settings, and its defaults in the standard recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

PROMPT_KNOBS = (
    "num_prompts",
    "prompt_layers",
    "after_prompts",
    "prompt_location",
    "prompt_init",
    "prompt_shared",
    "prompt_project",
    "prompt_dropout",
    "prompt_dropout_per",
)
ENGINE_KNOBS = ("dtype", "backend", "attention")  # for methods whose frozen blocks run on the engine

BASE_LR = {"sgd": 1.0, "adamw": 1e-3}
"""The default by optimizer, a value of the grid in the paper's appendix: SGD's would make AdamW diverge."""


@dataclass(frozen=True)
class MethodRule:
    """A method's own settings (`knobs`) and its defaults in the standard recipe: optimizer, batch size and
    maximum of warm-up epochs as in the paper's appendix.

    stores_backbone: whether what the method stores for a task holds the whole backbone, so that the tasks
        share none; as `TunedModel.stores_backbone` of its class.
    """

    knobs: tuple[str, ...] = ()
    optimizer: Literal["sgd", "adamw"] = "sgd"
    batch_size: int = 128
    warmup_epochs: int = 10
    stores_backbone: bool = False


_ADAMW: dict[str, Any] = dict(optimizer="adamw", warmup_epochs=5)
METHODS: dict[str, MethodRule] = {
    "vpt-deep": MethodRule((*PROMPT_KNOBS, *ENGINE_KNOBS, "residual_dtype", "memory")),
    "vpt-shallow": MethodRule((*PROMPT_KNOBS, *ENGINE_KNOBS, "residual_dtype", "memory")),
    # At the learning rate that prompts need, SGD would make the biases diverge.
    "vpt+bias": MethodRule(("num_prompts", "prompt_dropout", "prompt_dropout_per"), **_ADAMW),
    "cls-token": MethodRule(ENGINE_KNOBS),
    "linear": MethodRule(ENGINE_KNOBS, batch_size=2048),
    "mlp-K": MethodRule(ENGINE_KNOBS),
    "partial-K": MethodRule(ENGINE_KNOBS, batch_size=1280, **_ADAMW),
    "sidetune": MethodRule(ENGINE_KNOBS),
    "bias": MethodRule(**_ADAMW),
    "adapter": MethodRule(("adapter_reduction",), **_ADAMW),
    "lora": MethodRule(("lora_rank",), **_ADAMW),
    "full": MethodRule(stores_backbone=True, **_ADAMW),
}
METHOD_KNOBS = tuple(dict.fromkeys(knob for rule in METHODS.values() for knob in rule.knobs))


@dataclass(frozen=True)
class Method:
    """A method: its name in METHODS, its rule, and K if the name has one (partial-2, mlp-3)."""

    name: str
    rule: MethodRule
    count: int | None


def parse_method(method: str) -> Method:
    """Raises ValueError for an unknown method."""
    if method in METHODS and not method.endswith("-K"):
        return Method(method, METHODS[method], None)
    stem, _, count = method.rpartition("-")
    if f"{stem}-K" in METHODS and count.isascii() and count.isdecimal() and int(count) >= 1:
        return Method(f"{stem}-K", METHODS[f"{stem}-K"], int(count))
    raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}, with a K from 1")
