"""Holds the house to docs/architecture.md: layers, cycles, light imports, sizes, and rules no linter sees."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gesso"

LAYERS = (
    {"config", "errors", "files", "launch", "log", "random_key"},
    {"structures", "boxes", "fusion", "distributed", "label_space"},
    {"data", "models", "reports"},
    {"training", "evaluation"},
    {"run"},
    {"transfer", "analysis", "ensemble", "planning"},
    {"recipes"},
    {"comparison"},
    {"api"},
    {"commands"},
    {"cli", "__main__"},
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
FORBIDDEN = {("models", "data"), ("data", "models"), ("data", "reports"), ("models", "reports")}
REPORTS_MAY = {"errors", "files", "reports"}
BARE_GPU = {"torch", "torchvision", "timm", "safetensors", "numpy"}
BARE_GPU_ROOMS = {"structures", "boxes", "distributed", "models", "training"}
TRITON_FILES = {"gesso.models.ops.triton_nms", "gesso.models.ops.triton_roi_align"}
MAX_LINES, MAX_FUNCTION = 400, 80

FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "gesso"


def imports(path: Path) -> set[str]:
    """Every module that a file imports, ``from package import module`` resolved."""
    found: set[str] = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in MODULES else base)
    return found


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [n for n in ast.walk(TREES[path]) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_every_room_has_a_layer():
    rooms = {room(m) for m in MODULES if m != "gesso"}
    assert rooms <= LEVEL.keys(), f"rooms without a layer: {rooms - LEVEL.keys()}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_layers(module):
    here = room(module)
    for target in imports(MODULES[module]):
        if not target.startswith("gesso.") or here == "gesso":
            continue
        there = room(target)
        assert LEVEL[there] <= LEVEL[here], f"{module} imports {target} from a higher layer"
        assert (here, there) not in FORBIDDEN, f"{module} imports {target}"
        if here == "reports":
            assert there in REPORTS_MAY, f"{module} imports {target}"


def test_no_import_cycles():
    edges = {m: {t for t in imports(p) if t in MODULES and t != m} for m, p in MODULES.items()}
    state: dict[str, int] = {}

    def visit(module: str, trail: list[str]) -> None:
        if state.get(module) == 2:
            return
        assert state.get(module) != 1, "import circle: " + " -> ".join([*trail, module])
        state[module] = 1
        for target in sorted(edges[module]):
            visit(target, [*trail, module])
        state[module] = 2

    for module in MODULES:
        visit(module, [])


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_size_and_style(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES, f"{path.name} has more than {MAX_LINES} lines"
    for function in functions(path):
        lines = (function.end_lineno or 0) - function.lineno + 1
        assert lines <= MAX_FUNCTION, f"{path.name}:{function.name} has {lines} lines"
    if path.name == "__init__.py":
        assert module_name(path) == "gesso" or not text.strip(), f"{path} is not empty"
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path.name}:{node.lineno}: bare except"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            assert path.name == "cli.py", f"{path.name}:{node.lineno}: print"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_import_inside_functions(path):
    if path.name == "cli.py":
        return
    for function in functions(path):
        inner = [n for n in ast.walk(function) if isinstance(n, ast.Import | ast.ImportFrom)]
        assert not inner, f"{path.name}:{function.name} imports inside a function"


def test_torch_distributed_has_one_importer():
    for module, path in MODULES.items():
        if module != "gesso.distributed":
            assert not any(t.startswith("torch.distributed") for t in imports(path)), module
            assert "torch.distributed" not in path.read_text(encoding="utf-8").replace("``torch.distributed``", "")


def test_bare_gpu_rooms_import_five_libraries_only():
    """Everything that these rooms reach, through other rooms too, needs the five libraries alone."""
    todo = [m for m in MODULES if room(m) in BARE_GPU_ROOMS]
    seen: set[str] = set()
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        for target in imports(MODULES[module]):
            if target in MODULES:
                todo.append(target)
            else:
                top = target.split(".")[0]
                allowed = BARE_GPU | ({"triton"} if module in TRITON_FILES else set())
                assert top in allowed or top in sys.stdlib_module_names, f"{module} imports {target}"


def test_triton_files_are_loaded_only_when_needed():
    for module, path in MODULES.items():
        assert not imports(path) & TRITON_FILES, f"{module} imports a Triton file"


LIGHT = (
    ["config", "errors", "log", "label_space", "random_key"]
    + [f"data.{name}" for name in ("records", "index", "importing", "check", "statistics", "select", "export")]
    + [f"data.readers.{name}" for name in ("coco", "voc", "yolo", "detect")]
)


@pytest.mark.parametrize("command", [*(f"import gesso.{name}" for name in LIGHT), "HELP"])
def test_light_modules_import_no_torch(command):
    if command == "HELP":
        command = "import gesso.cli\ntry:\n    gesso.cli.main(['--help'])\nexcept SystemExit:\n    pass"
    code = f"{command}\nimport sys\nassert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
