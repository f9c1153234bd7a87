"""vpt-fast import-prompts and export-prompts: conversion from and to files of the official code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.markup import escape

from vpt_fast.commands.flags import (
    PATH,
    DebugFlag,
    OutputConsole,
    one_line_errors,
    require_folder_place,
    require_place,
)
from vpt_fast.counting import counted
from vpt_fast.training.recipe import Recipe
from vpt_fast.training.setting_values import yaml_value


def import_prompts(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="File saved by the official code: a whole model, or prompt_epN.pth."
        ),
    ],
    backbone: Annotated[str, typer.Option(help="Backbone that the prompts were trained on, as for train.")],
    out: Annotated[Path, typer.Option(help="Folder to write the model to.", **PATH)],
    checkpoint: Annotated[
        Path | None, typer.Option(help="File with the backbone's weights.", show_default="none")
    ] = None,
    pretrained: Annotated[
        bool | None,
        typer.Option(
            "--pretrained/--no-pretrained",
            help="Load the backbone's published weights.",
            show_default="on without --checkpoint",
        ),
    ] = None,
    backbone_arg: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="As for train.", show_default="none")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Official setting below MODEL.PROMPT that the file does not record, such as "
            "VIT_POOL_TYPE=img_pool; may be repeated.",
            show_default="the official defaults",
        ),
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="For prompt_epN.pth, which has no head: classes of the new one.")
    ] = None,
    debug: DebugFlag = False,
) -> None:
    """Convert prompts trained with the official code (KMnP/vpt) to a saved model of this package."""
    with one_line_errors(debug):
        if not file.is_file():
            raise ValueError(f"FILE is {file}, which is no file")
        require_folder_place(out)
        prompt = {}
        for text in setting or []:
            name, equals, value = text.partition("=")
            if not equals:
                raise ValueError(f"setting is {text!r}; it must be NAME=VALUE")
            prompt[name] = yaml_value("setting", text, value)
        # The recipe parses KEY=VALUE and decides whether published weights are loaded.
        recipe = Recipe(
            data="",
            backbone=backbone,
            pretrained=pretrained,
            checkpoint=None if checkpoint is None else str(checkpoint),
            backbone_arg=backbone_arg or [],  # type: ignore[arg-type]
        ).resolved(num_train_images=1, device_type="cpu")
        from vpt_fast import official

        model = official.import_prompts(
            file,
            recipe.backbone,
            prompt=prompt,
            num_classes=num_classes,
            pretrained=bool(recipe.pretrained),
            checkpoint=recipe.checkpoint,
            **recipe.backbone_arg,
        )
        model.save_pretrained(out)
    console = OutputConsole()
    settings = model.prompt_settings
    kind, number = f"{settings.prompt_type} prompt", settings.num_prompts
    prompts = f"added {kind}s" if number is None else counted(number, kind)
    console.print(
        escape(
            f"{out}: {prompts}, {counted(model.num_classes, 'class', 'classes')}, "
            f"pool {model.pool or 'of the backbone'}"
        ),
        highlight=False,
        soft_wrap=True,
    )
    if num_classes is not None:
        console.print("[yellow]The file has no head: a new one was drawn, which has to be trained.[/]")


def export_prompts(
    model: Annotated[
        Path, typer.Argument(metavar="DIR", help="Saved model, such as a run's prompts folder.")
    ],
    out: Annotated[Path, typer.Option(help="File to write.", **PATH)],
    encoder: Annotated[
        str | None,
        typer.Option(help="Official backbone class: sup, mae or mocov3.", show_default="by the backbone"),
    ] = None,
    debug: DebugFlag = False,
) -> None:
    """Convert a saved model's prompts and head to a file for the official code (KMnP/vpt)."""
    with one_line_errors(debug):
        require_place(out)
        from vpt_fast import PromptedViT, load_pretrained, official
        from vpt_fast.swin import PromptedSwin

        saved = load_pretrained(model)
        if not isinstance(saved, PromptedViT | PromptedSwin):
            raise ValueError(
                f"{model}: holds a {type(saved).__name__}, which has no prompts of the official code's"
            )
        prompt = official.export_prompts(saved, out, encoder=encoder)
    typer.echo(yaml.safe_dump({"MODEL": {"PROMPT": prompt}}, sort_keys=False), nl=False)
