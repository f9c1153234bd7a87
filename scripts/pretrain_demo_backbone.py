"""Pre-train the packaged backbone, `vpt_fast_demo`, on the CIFAR-10 training images.

    python scripts/pretrain_demo_backbone.py cifar10-train-jpg.tar.gz --minutes 60

The archive holds one folder per class with 32x32 JPEGs. A ViT with a CLS token is trained with labels; 2,000
images chosen by the seed are held out for the accuracy in the log. The schedules of learning rate and patch
dropout follow the fraction of `--minutes` spent training, so that the run ends in time however busy the
machine is. After an interruption, the same command resumes from the last completed epoch.

Written at the end: vpt_fast/backbones/demo.safetensors (fp16, no classifier) and the log beside this script.
"""

from __future__ import annotations

import io
import json
import math
import os
import tarfile
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models.vision_transformer import VisionTransformer
from timm.optim.muon import get_lr_scale, zeropower_via_newtonschulz
from torch import Tensor, nn
from torch.nn import functional as F

from vpt_fast.files import replacing, write

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "vpt_fast" / "backbones" / "demo.safetensors"
LOG = Path(__file__).with_suffix(".log.jsonl")


@dataclass(frozen=True)
class Architecture:
    """Arguments of timm's VisionTransformer. 1.87 M parameters: fp16 weights stay under 4 MB."""

    img_size: int = 32
    patch_size: int = 4
    embed_dim: int = 160
    depth: int = 6
    num_heads: int = 5


@dataclass(frozen=True)
class Recipe:
    """How the backbone is trained. Fractions of the run are fractions of its wall-clock time."""

    batch_size: int = 256
    held_out: int = 2000
    warmup: float = 0.03
    # (from this fraction of the run on, drop rate): a step's cost is proportional to the tokens it keeps.
    patch_drop: tuple[tuple[float, float], ...] = ((0.0, 0.7), (0.35, 0.5), (0.75, 0.0))
    muon_lr: float = 3e-3  # weight matrices of the blocks; scaled to the size of an AdamW step
    adamw_lr: float = 1.5e-3  # everything else
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    crop_padding: int = 4  # pixels
    brightness: float = 0.3
    contrast: float = 0.3
    # The features should suit more than photographs: scans and handwriting are grey, often light on dark.
    grey: float = 0.15  # probability
    invert: float = 0.1  # probability


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) with Nesterov momentum and decoupled weight decay, in fp32.

    timm's and torch's own implementations orthogonalise in bfloat16, which CPUs without bfloat16 emulate at
    less than a tenth of fp32's speed. Each parameter consists of `parts` matrices stacked by rows (three for
    a fused QKV); all parameters of one shape are orthogonalised in one batch.
    """

    def __init__(self, groups: list[dict], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "parts": 1})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            updates: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                buffer = self.state[p]["momentum"]
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])
                updates.setdefault(p.shape, []).append((p, update))
            for shape, pairs in updates.items():
                rows = shape[0] // group["parts"]
                stacked = torch.stack([u for _, u in pairs]).view(-1, rows, shape[1])
                coefficients = [(3.4445, -4.7750, 2.0315)]
                stacked = zeropower_via_newtonschulz(stacked, 5, coefficients, dtype=torch.float32)
                scale = group["lr"] * get_lr_scale(stacked.shape[1:], "match_rms_adamw")
                for (p, _), update in zip(pairs, stacked.reshape(-1, *shape), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=scale)


def make_optimizers(model: VisionTransformer, recipe: Recipe) -> list[torch.optim.Optimizer]:
    qkv = [block.attn.qkv.weight for block in model.blocks]
    other = [w for b in model.blocks for w in (b.attn.proj.weight, b.mlp.fc1.weight, b.mlp.fc2.weight)]
    matrices = {id(p) for p in qkv + other}
    rest = [p for p in model.parameters() if id(p) not in matrices]
    groups = [{"params": qkv, "parts": 3}, {"params": other, "parts": 1}]
    return [
        Muon(groups, lr=recipe.muon_lr, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(rest, lr=recipe.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def read_archive(archive: Path, cache: Path) -> tuple[Tensor, Tensor, int]:
    """Images (n, 3, 32, 32) uint8, labels (n,) int64 and the number of classes, in the order of the paths.
    They are kept in `cache`, which is written again for another archive.

    Raises:
        typer.BadParameter: no whole tar archive, one without JPEG files, or a picture that is not 32x32.
    """
    metadata = {"archive": f"{archive.name}, {archive.stat().st_size} bytes"}
    if not cache.exists() or safe_open(cache, framework="pt").metadata() != metadata:
        names, files = [], []
        try:
            with tarfile.open(archive) as tar:
                for member in tar:
                    if member.isfile() and member.name.endswith(".jpg"):
                        names.append(member.name)
                        files.append(tar.extractfile(member).read())  # type: ignore[union-attr]
        except (EOFError, tarfile.TarError, zlib.error) as error:  # all but the last of a part of a download
            raise typer.BadParameter(
                f"{archive} is no tar archive, or not whole: {error}; wanted one folder of JPEGs per class"
            ) from None
        if not names:
            raise typer.BadParameter(f"{archive} holds no .jpg file; wanted one folder of JPEGs per class")
        order = sorted(range(len(names)), key=names.__getitem__)
        classes = sorted({Path(name).parent.name for name in names})
        images = torch.empty(len(names), 3, 32, 32, dtype=torch.uint8)
        for row, i in enumerate(order):
            with Image.open(io.BytesIO(files[i])) as image:
                if image.size != (32, 32):
                    raise typer.BadParameter(
                        f"{archive}: {names[i]} is {image.width}x{image.height}, wanted 32x32"
                    )
                raw = bytearray(image.convert("RGB").tobytes())
            images[row] = torch.frombuffer(raw, dtype=torch.uint8).view(32, 32, 3).permute(2, 0, 1)
        labels = torch.tensor([classes.index(Path(names[i]).parent.name) for i in order])
        with replacing(cache) as partial:
            save_file({"images": images, "labels": labels}, partial, metadata)
    tensors = load_file(cache)
    return tensors["images"], tensors["labels"], int(tensors["labels"].max()) + 1


def split_photographs(num_images: int, recipe: Recipe, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the held-out images, and of the training images."""
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))
    return order[: recipe.held_out], order[recipe.held_out :]


def normalise(images: Tensor) -> Tensor:
    """uint8 or [0, 255] float (b, 3, h, w) to the backbone's input range."""
    mean = torch.tensor(IMAGENET_INCEPTION_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_INCEPTION_STD).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """uint8 (b, 3, h, w) to normalised float of the same shape; every image has its own random numbers."""
    b, _, h, w = images.shape

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(b, 1, 1, 1).uniform_(low, high, generator=generator)

    pad = recipe.crop_padding
    padded = F.pad(images.float(), (pad,) * 4, mode="reflect")
    top, left = torch.randint(2 * pad + 1, (2, b, 1), generator=generator)
    rows = top + torch.arange(h)  # (b, h)
    columns = left + torch.arange(w)  # (b, w)
    columns = torch.where(uniform(0, 1).view(b, 1) < 0.5, columns.flip(1), columns)
    # Index tensors on both sides of the channel slice put the channels last.
    x = padded[torch.arange(b)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    x = normalise(x)
    x = torch.where(uniform(0, 1) < recipe.grey, x.mean(1, keepdim=True), x)
    centre = x.mean((1, 2, 3), keepdim=True)
    x = (x - centre) * uniform(1 - recipe.contrast, 1 + recipe.contrast) + centre
    x = x + uniform(-recipe.brightness, recipe.brightness)
    # The input range is symmetric about zero, so negation inverts an image.
    x = torch.where(uniform(0, 1) < recipe.invert, -x, x)
    return x.clamp(-1, 1)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent."""
    model.eval()
    correct = sum(
        int((model(normalise(x)).argmax(1) == y).sum())
        for x, y in zip(images.split(250), labels.split(250), strict=True)
    )
    model.train()
    return 100 * correct / len(labels)


def schedule(progress: float, recipe: Recipe) -> tuple[float, float]:
    """The learning rate factor and the patch drop rate after this fraction of the run."""
    if progress < recipe.warmup:
        factor = (progress + 1e-3) / (recipe.warmup + 1e-3)
    else:
        factor = 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - recipe.warmup) / (1 - recipe.warmup))))
    drop = [rate for start, rate in recipe.patch_drop if start <= progress][-1]
    return factor, drop


def export(model: VisionTransformer, architecture: Architecture, result: dict) -> None:
    weights = {k: v.half().contiguous() for k, v in model.state_dict().items() if not k.startswith("head.")}
    metadata = {
        **{k: str(v) for k, v in asdict(architecture).items()},
        "num_parameters": str(sum(v.numel() for v in weights.values())),
        "pretrained_on": "CIFAR-10 training images but for the held-out ones, with labels",
        "accuracy": str(result["accuracy"]),
        "held_out_images": str(result["held_out_images"]),
        "epochs": str(result["epoch"]),
    }
    write(WEIGHTS, save(weights, metadata=metadata))


def main(
    archive: Annotated[Path, typer.Argument(help="Tar of class folders.", exists=True, dir_okay=False)],
    minutes: Annotated[float, typer.Option(help="Wall-clock minutes of training.", min=0.1)] = 60.0,
    work: Annotated[Path, typer.Option(help="Folder for the checkpoint.")] = ROOT / "build" / "demo",
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = os.cpu_count() or 1,
    bf16: Annotated[bool, typer.Option(help="Products in bfloat16: for CPUs that have it.")] = False,
    seed: int = 0,
) -> None:
    """Pre-train vpt_fast_demo and write its weights and log into the source tree."""
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    architecture, recipe = Architecture(), Recipe()
    images, labels, num_classes = read_archive(archive, work / "images.safetensors")

    held_out, train = split_photographs(len(images), recipe, seed)
    if len(train) == 0:
        wanted = f"want more than the {recipe.held_out} that are held out"
        raise typer.BadParameter(f"archive: got {archive} with {len(images)}, {wanted}")
    held_images, held_labels = images[held_out], labels[held_out]

    torch.manual_seed(seed)
    model = VisionTransformer(**asdict(architecture), num_classes=num_classes, patch_drop_rate=0.5)
    optimizers = make_optimizers(model, recipe)
    base_lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    checkpoint, log = work / "checkpoint.pt", work / "log.jsonl"
    epoch, spent, lines = 0, 0.0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        epoch, spent, lines = state["epoch"], state["seconds"], state["log"]
        print(f"going on after epoch {epoch}, {spent / 60:.1f} of {minutes:g} minutes spent", flush=True)

    percentage = TextColumn("{task.percentage:.0f}%")
    with Progress(TextColumn("{task.description}"), BarColumn(), percentage, TimeElapsedColumn()) as bar:
        task = bar.add_task("starting", total=minutes * 60)
        while spent < minutes * 60:
            generator = torch.Generator().manual_seed(seed * 10_000 + epoch + 1)
            torch.manual_seed(seed * 10_000 + epoch + 1)  # timm's patch dropout uses the global generator
            shuffled = train[torch.randperm(len(train), generator=generator)]
            began, total_loss, seen, drop, lr = time.monotonic(), 0.0, 0, 0.0, 0.0
            for rows in shuffled.split(recipe.batch_size):
                progress = (spent + time.monotonic() - began) / (minutes * 60)
                if progress >= 1:
                    break
                factor, drop = schedule(progress, recipe)
                model.patch_drop.prob = drop
                for optimizer, bases in zip(optimizers, base_lrs, strict=True):
                    for group, base in zip(optimizer.param_groups, bases, strict=True):
                        group["lr"] = base * factor
                lr = recipe.muon_lr * factor
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    logits = model(augment(images[rows], recipe, generator))
                loss = F.cross_entropy(logits.float(), labels[rows], label_smoothing=recipe.label_smoothing)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                total_loss += loss.item() * len(rows)
                seen += len(rows)
                if not math.isfinite(total_loss):
                    raise RuntimeError(f"loss is {loss.item()} in epoch {epoch + 1} after {seen} images")
                text = f"epoch {epoch + 1}  loss {total_loss / seen:.3f}"
                bar.update(task, completed=progress * minutes * 60, description=text)
            seconds = time.monotonic() - began
            spent += seconds
            epoch += 1
            line = {
                "epoch": epoch,
                "loss": round(total_loss / max(seen, 1), 4),
                "accuracy": round(accuracy(model, held_images, held_labels), 2),
                "held_out_images": len(held_out),
                "images": seen,
                "images_per_second": round(seen / seconds, 1),
                "precision": "bfloat16" if bf16 else "float32",
                "patch_drop": drop,
                "lr": round(lr, 7),
                "minutes": round(spent / 60, 2),
            }
            lines.append(line)
            bar.console.print(json.dumps(line), soft_wrap=True, highlight=False)
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "epoch": epoch,
                "seconds": spent,
                "log": lines,
            }
            with replacing(checkpoint) as partial:
                torch.save(state, partial)
            write(log, "".join(json.dumps(line) + "\n" for line in lines).encode())

    export(model, architecture, lines[-1])
    write(LOG, "".join(json.dumps(line) + "\n" for line in lines).encode())
    print(f"{WEIGHTS}: {WEIGHTS.stat().st_size:,} bytes, held-out accuracy {lines[-1]['accuracy']} %")


if __name__ == "__main__":
    try:
        typer.run(main)
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on after the last whole epoch") from None
