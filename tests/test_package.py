"""The package as a whole: its version, its public names, its layers, and what importing it does."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.resources
import json
import subprocess
import sys
from pathlib import Path

import pytest

import vpt_fast
from vpt_fast.__main__ import main

ROOT = Path(__file__).parent.parent

# A part is a module or package directly under vpt_fast; "" is vpt_fast/__init__.py itself.
LAYERS = {
    "files": ["files", "control_groups", "free_memory", "failures", "data_names", "counting"],
    "kernels": ["kernels"],
    "engine": ["engine"],
    "backbones": ["backbones"],
    "models": [
        "prompts",
        "hub",
        "saved_model",
        "tuned_model",
        "classifier",
        "model",
        "swin",
        "convnet",
        "tuning",
        "segmenter",
        "pretrained",
        "graphed",
        "official",
        "",
    ],
    "data": ["data"],
    "training": ["training"],
    "sweeps": ["sweeps"],
    "commands": ["commands", "__main__"],
}
BELOW = {
    "files": [],
    "kernels": [],
    "engine": ["kernels"],
    "backbones": ["files", "kernels", "engine"],
    "models": ["files", "kernels", "engine", "backbones"],
    "data": ["files"],
    "training": ["files", "data", "engine", "backbones", "models"],
    "sweeps": ["files", "data", "backbones", "models", "training"],
    "commands": ["files", "data", "backbones", "models", "training", "sweeps"],
}
LAYER_OF = {part: layer for layer, parts in LAYERS.items() for part in parts}


def source_files() -> list[tuple[str, Path]]:
    """Every module as (its dotted name under vpt_fast, its file)."""
    folders = {"": ROOT / "vpt_fast", "kernels": ROOT / "kernels"}
    found = []
    for prefix, folder in folders.items():
        for file in sorted(folder.rglob("*.py")):
            parts = [prefix, *file.relative_to(folder).with_suffix("").parts]
            found.append((".".join(p for p in parts if p and p != "__init__"), file))
    return found


def imports(name: str, file: Path) -> set[str]:
    """Dotted names of all that a file imports, inside functions too; relative ones made absolute."""
    package = ("vpt_fast." + name).rstrip(".").split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from vpt_fast import model` imports a part, `from vpt_fast.model import x` names it already.
            found.update(f"{module}.{alias.name}" if module == "vpt_fast" else module for alias in node.names)
    return found


FILES = source_files()
KERNEL_FILES = [entry for entry in FILES if entry[0].startswith("kernels")]


@pytest.mark.parametrize(("name", "file"), FILES, ids=[name or "vpt_fast" for name, _ in FILES])
def test_imports_point_down_the_layers(name, file):
    part = name.split(".")[0]
    assert part in LAYER_OF, f"vpt_fast/{part} is new: say in LAYERS where it stands"
    imported = {module.split(".")[1] for module in imports(name, file) if module.startswith("vpt_fast.")}
    layer = LAYER_OF[part]
    assert {LAYER_OF[other] for other in imported if other in LAYER_OF} <= {layer, *BELOW[layer]}


@pytest.mark.parametrize(("name", "file"), KERNEL_FILES, ids=[name for name, _ in KERNEL_FILES])
def test_kernels_import_nothing_but_torch_and_triton(name, file):
    others = {module.split(".")[0] for module in imports(name, file)} - set(sys.stdlib_module_names)
    assert others <= {"torch", "triton", "vpt_fast"}


def test_version_is_that_of_the_metadata():
    assert vpt_fast.__version__ == importlib.metadata.version("vpt_fast")


def test_public_names():
    names = [
        "GraphedStep",
        "LinearProbe",
        "PromptedConvNet",
        "PromptedSegmenter",
        "PromptedSwin",
        "PromptedViT",
        "__version__",
        "load_pretrained",
    ]
    assert sorted(vpt_fast.__all__) == names


def test_public_names_are_there_when_asked_for():
    assert all(getattr(vpt_fast, name) for name in vpt_fast.__all__)
    assert set(vpt_fast.__all__) <= set(dir(vpt_fast))
    with pytest.raises(AttributeError, match="module 'vpt_fast' has no attribute 'PromptedVit'"):
        vpt_fast.PromptedVit  # noqa: B018


REFUSED = """
import sys
from typer.testing import CliRunner
from vpt_fast.commands.cli import app
out = sys.argv[1]
for words in (
    "train --data=nowhere --backbone=x", "sweep --data=nowhere --backbone=x", "ablate length --data=nowhere",
    "eval nowhere --data=.", "eval . --data=nowhere", "predict nowhere x.jpg", "plot tsne nowhere --data=.",
    f"plot tsne . --data=. --out={out}", f"table . --out={out}", "data check nowhere",
    f"import-prompts nowhere --backbone=x --out=x", f"export-prompts . --out={out}",
    "sweep --backbone=x --seeds=x", "sweep --data=. --backbone=x --over=momentum=2",
    "sweep --data=. --backbone=x --sampler=tpe", "ablate length --seeds=x", "table nowhere",
    "train --data=. --backbone=x --task=vtab/cifr", "data prepare --task=cifr --from=. --out=x",
):
    ended = CliRunner().invoke(app, words.split())
    assert ended.exit_code == 2 and ended.stderr.startswith("error: "), (words, ended.output)
    assert not {"torch", "timm", "matplotlib"} & {*sys.modules}, words
"""


def test_commands_refuse_what_is_not_there_before_they_import_torch(tmp_path):
    ended = subprocess.run([sys.executable, "-c", REFUSED, tmp_path], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


ANSWERED = """
import sys
from typer.testing import CliRunner
from vpt_fast.commands.cli import app
data, run = sys.argv[1:]
for words, code in (
    ("backbones", 0), (f"data check {data}", 0), (f"table {run}", 0), (f"predict {run} missing.jpg", 1),
):
    ended = CliRunner().invoke(app, words.split())
    assert ended.exit_code == code, (words, ended.output)
    assert not {"torch", "timm", "matplotlib"} & {*sys.modules}, words
"""


def test_commands_that_compute_nothing_answer_without_torch(tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    for folder in (run, data / "a", data / "b"):
        folder.mkdir(parents=True)
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"):
        (data / name).touch()  # listed, not opened
    (run / "config.yaml").write_text("{data: x, backbone: y}")
    images = '{"classes": ["a", "b"], "train": {"per_class": [1, 1]}, "val": null}'
    (run / "run.json").write_text(f'{{"parameters": {{"trained": 1, "backbone": 9}}, "data": {images}}}')
    (run / "results.json").write_text('{"val_accuracy": 0.5, "test_accuracy": null}')
    ended = subprocess.run([sys.executable, "-c", ANSWERED, data, run], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_commands_say_where_to_run_them_on_windows(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit):
        main()
    assert "the commands do not run on Windows itself; run them in WSL" in capsys.readouterr().err


def test_entry_of_the_command_imports_no_library():
    code = "import sys; before = {*sys.modules}; import vpt_fast.__main__; print(*{*sys.modules} - before)"
    ended = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=ROOT)
    roots = {name.partition(".")[0] for name in ended.stdout.split()}
    assert roots - sys.stdlib_module_names == {"vpt_fast"}, ended.stderr


@pytest.mark.parametrize(
    ("package", "file"),
    [("vpt_fast.backbones", "demo.safetensors"), ("vpt_fast", "py.typed"), ("vpt_fast.kernels", "py.typed")],
)
def test_files_that_are_not_code_are_package_data(package, file):
    assert (importlib.resources.files(package) / file).is_file()
    assert f'"{package}" = ["{file}"]' in (ROOT / "pyproject.toml").read_text()


IMPORTING = """
import json, os, random, sys, traceback, warnings
import numpy, torch, timm, safetensors

posix = ("fcntl", "resource", "termios", "pwd", "grp")
had = {name: sys.modules.get(name) for name in posix}
sys.modules |= dict.fromkeys(posix)  # None: as if there were none

opened = []
def recording(path, *arguments, open=safetensors.safe_open, **options):
    opened.append(str(path))
    return open(path, *arguments, **options)
def state():
    return {
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "torch_rng": torch.get_rng_state().tolist(),
        "numpy_rng": numpy.random.get_state()[1].tolist(),
        "python_rng": random.getstate(),
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "cuda": torch.cuda.is_initialized(),
    }
before = state()
safetensors.safe_open = recording
from vpt_fast import *
import vpt_fast.backbones.demo
after = state()
assert timm.is_model("vpt_fast_demo")
found = {"changed": [name for name in before if before[name] != after[name]], "opened": [*opened]}

def use():
    model = vpt_fast.PromptedViT("vpt_fast_demo", 10, 3, memory="auto")
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    for _ in range(2):  # the second replaces the files of the first
        model.save_pretrained("saved")
    assert torch.equal(vpt_fast.load_pretrained("saved").prompts, model.prompts)
    assert sorted(os.listdir("saved")) == ["config.json", "model.safetensors"]

try:
    use()
except Exception:
    found["without_posix"] = traceback.format_exc()

for name, module in had.items():
    del sys.modules[name]
    if module is not None:
        sys.modules[name] = module
opened.clear()
import vpt_fast.training.inference, vpt_fast.training.loop
found["opened"] += opened
found["slow"] = sorted({"matplotlib", "optuna", "peft", "sklearn", "torchmetrics"} & set(sys.modules))
with open("found.json", "w") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A process that has imported the package and used it without the modules that Windows lacks, and then
    imported what training and inference need; and what it found."""
    folder = tmp_path_factory.mktemp("imported")
    command = [sys.executable, "-c", IMPORTING]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result, json.loads((folder / "found.json").read_text())


def test_importing_changes_no_global_state(imported):
    assert imported[1]["changed"] == []


def test_importing_what_trains_imports_nothing_slow_that_only_some_runs_need(imported):
    assert imported[1]["slow"] == []


def test_importing_does_not_read_the_packaged_weights(imported):
    assert imported[1]["opened"] == []


def test_importing_prints_nothing(imported):
    assert (imported[0].stdout, imported[0].stderr) == ("", "")


def test_models_are_trained_saved_and_loaded_without_modules_that_windows_lacks(imported):
    assert imported[1].get("without_posix") is None, imported[1]["without_posix"]
