"""Who may import whom (ARCHITECTURE.md), read by `ast`; and what must not be imported at all."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlmed.core.process.threads import COUNTS, WAITING
from tests.root import ROOT

PACKAGES = ("rlmed", "rollout", "learner", "rewards", "conf")
BELOW = ("rlmed.core", "rlmed.tasks", "rlmed.models", "rlmed.data", "rewards", "rollout", "learner")
BORROWED = {
    "rlmed.core": {"rlmed.core"},
    "rlmed.models": {"rlmed.core", "rlmed.models"},
    "rlmed.tasks": {"rlmed.core", "rlmed.tasks"},
    "rlmed.data": {"rlmed.core", "rlmed.tasks", "rlmed.data"},
    "rewards": {"rlmed.core", "rlmed.tasks", "rewards"},
    "rollout": {"rlmed.core", "rlmed.models", "rollout"},
    "learner": {"rlmed.core", "rlmed.models", "learner"},
    "rlmed.recording": {"rlmed.core", "rlmed.tasks", "rlmed.data", "rlmed.recording"},
    "rlmed.cluster": {*BELOW, "rlmed.recording", "rlmed.cluster"},
    "rlmed.evaluation": {*BELOW, "rlmed.recording", "rlmed.evaluation"},
    "rlmed.report": {*BELOW, "rlmed.recording", "rlmed.evaluation", "rlmed.report"},
    "rlmed.export": {*BELOW, "rlmed.recording", "rlmed.cluster", "rlmed.evaluation", "rlmed.export"},
    "rlmed.reproduce": {*BELOW, "rlmed.recording", "rlmed.evaluation", "rlmed.report", "rlmed.reproduce"},
    "rlmed.studio": {
        *BELOW,
        "rlmed.recording",
        "rlmed.cluster",
        "rlmed.evaluation",
        "rlmed.report",
        "rlmed.studio",
    },
    "conf": set(),
}
"""What the modules of each room may import of ours.

The files directly in `rlmed/` may import all rooms, and no room them.
"""


DYNAMIC = ("importlib.import_module", "import_module", "__import__")


@dataclass(frozen=True)
class Import:
    """One import statement."""

    importer: str
    path: Path
    imported: str
    lazy: bool
    """True inside a function; such an import runs only when it is called."""
    typing_only: bool
    """True under `if TYPE_CHECKING`."""


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules():
    """Path of every module of ours, by its dotted name."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {module_name(path): path for path in paths}


MODULES = modules()


def imported_names(node):
    """Dotted names that a statement or call imports; `from a import b` may mean the module a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"relative import in line {node.lineno}: write the whole name"
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name in MODULES else node.module for name in names]
    if isinstance(node, ast.Call) and ast.unparse(node.func) in DYNAMIC:
        first = node.args[0] if node.args else None
        return [first.value] if isinstance(first, ast.Constant) else []
    return []


def imports_of(name, path):
    found = []

    def visit(node, lazy, typing_only):
        found.extend(Import(name, path, imported, lazy, typing_only) for imported in imported_names(node))
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for field, value in ast.iter_fields(node):
            typing_here = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and field == "body"
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    visit(child, lazy, typing_only or typing_here)

    visit(ast.parse(path.read_text(encoding="utf-8")), False, False)
    return found


IMPORTS = [entry for name, path in MODULES.items() for entry in imports_of(name, path)]


def inside(name, package):
    return name == package or name.startswith(f"{package}.")


def part_of(module):
    """The part that a module of ours belongs to; None for the files directly in `rlmed/`."""
    return next((part for part in BORROWED if inside(module, part)), None)


def is_ours(name):
    return name.split(".")[0] in PACKAGES


def shown(imports):
    return sorted(f"{entry.importer} imports {entry.imported}" for entry in imports)


def test_all_modules_are_read():
    assert {"rlmed.core.types", "rlmed.controller", "rollout.native.engine", "learner.losses", "conf"} <= MODULES.keys()
    assert ("rollout.native.engine", "rlmed.models.policy") in {(entry.importer, entry.imported) for entry in IMPORTS}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import ray", [("ray", False, False)]),
        ("from ray.util import queue", [("ray.util", False, False)]),
        ("def f():\n    import ray", [("ray", True, False)]),
        ("class A:\n    from vllm import LLM", [("vllm", False, False)]),
        ("if TYPE_CHECKING:\n    import ray\nelse:\n    import vllm", [("ray", False, True), ("vllm", False, False)]),
        ("x = importlib.import_module('ray')", [("ray", False, False)]),
        ("from rlmed.core import types", [("rlmed.core.types", False, False)]),
        ("from rlmed.core.types import Prompt", [("rlmed.core.types", False, False)]),
    ],
)
def test_the_reader_sees_every_kind_of_import(source, expected, tmp_path):
    path = tmp_path / "module.py"
    path.write_text(source)
    assert [(entry.imported, entry.lazy, entry.typing_only) for entry in imports_of("module", path)] == expected


def test_each_room_has_a_row():
    rooms = {f"rlmed.{path.parent.name}" for path in (ROOT / "rlmed").glob("*/__init__.py")} | set(PACKAGES) - {"rlmed"}
    assert rooms == BORROWED.keys()


def test_each_part_imports_only_what_it_may():
    wrong = [
        entry
        for entry in IMPORTS
        if part_of(entry.importer) is not None
        and is_ours(entry.imported)
        and part_of(entry.imported) not in BORROWED[part_of(entry.importer)]
    ]
    assert shown(wrong) == []


def test_nobody_imports_the_files_that_wire_everything():
    # part_of is None for rlmed itself and for the files directly in it
    wrong = [
        entry
        for entry in IMPORTS
        if part_of(entry.importer) is not None and is_ours(entry.imported) and part_of(entry.imported) is None
    ]
    assert shown(wrong) == []


def test_ray_and_vllm_stay_in_their_places():
    wrong = [
        entry
        for entry in IMPORTS
        if (
            inside(entry.imported, "ray")
            and entry.path.name != "actor.py"
            and entry.importer != "rlmed.cluster.ray_session"
        )
        or (inside(entry.imported, "vllm") and not inside(entry.importer, "rollout.vllm_backend"))
    ]
    assert shown(wrong) == []


def test_ray_and_vllm_and_what_needs_them_are_imported_lazily():
    def needs_extra(module):
        return (
            inside(module, "rollout.vllm_backend") or module.endswith(".actor") or module == "rlmed.cluster.ray_session"
        )

    wrong = [
        entry
        for entry in IMPORTS
        if not (entry.lazy or entry.typing_only or needs_extra(entry.importer))
        and (inside(entry.imported, "ray") or inside(entry.imported, "vllm") or needs_extra(entry.imported))
    ]
    assert shown(wrong) == []


def test_only_tests_import_test_tools():
    tools = {"pytest", "hypothesis", "pycocotools", "scipy", "sklearn", "statsmodels", "tests"}
    assert shown(entry for entry in IMPORTS if entry.imported.split(".")[0] in tools) == []


STATE = f"""
import importlib, os, sys, types
def changed():
    planted = sorted(name for name, module in sys.modules.items() if module is None)
    torch = sys.modules.get("torch")
    operators = [name for name in ("nms", "qnms") if torch and hasattr(torch.ops.torchvision, name)]
    return [*planted, *operators, *sorted({{*{WAITING}, *{COUNTS}}} & os.environ.keys())]
"""
"""Defines `changed()`: what `rlmed.core.process.starting.prepare_process` has changed."""


HIDDEN = """
import transformers.utils.import_utils as checks
checks.is_torchvision_available = checks.is_torchaudio_available = lambda: False
import transformers.utils as utils
utils.is_torchvision_available = utils.is_torchaudio_available = lambda: False
"""
"""Has transformers believe that neither package is installed."""


@pytest.fixture
def broken_extensions(tmp_path):
    """A folder whose packages torchvision, torchaudio do not load, as beside another torch."""
    for name, binary in (("torchvision", "_C.so"), ("torchaudio", "lib/_torchaudio.so")):
        (tmp_path / name / "lib").mkdir(parents=True)
        (tmp_path / name / binary).write_bytes(b"no library")
        (tmp_path / name / "__init__.py").write_text("")
    return tmp_path


def run_python(*arguments, path):
    """The last line that a process prints which starts without a choice for OpenMP."""
    clean = {name: value for name, value in os.environ.items() if name not in (*WAITING, *COUNTS)}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=clean | {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_importing_any_module_changes_nothing_in_the_process(broken_extensions):
    """Commands and workers ask for it: who imports a library has the process that he has made."""
    extras = {entry.importer for entry in IMPORTS if not entry.lazy and entry.imported.split(".")[0] in ("ray", "vllm")}
    libraries = [name for name in MODULES if name not in extras and not name.endswith("__main__")]
    program = f"{STATE}{HIDDEN}for name in {libraries}: importlib.import_module(name)\nprint(changed())"
    assert run_python("-c", program, path=broken_extensions) == "[]"


def test_the_program_of_a_package_that_imports_rlmed_is_left_alone(broken_extensions):
    package = broken_extensions / "theirs"
    package.mkdir()
    (package / "__init__.py").write_text("import rlmed\nimport rlmed.doctor\n")
    program = f"{STATE}print([*changed(), *{{'torch', 'ray'}} & sys.modules.keys(), sys.excepthook.__name__])"
    (package / "program.py").write_text(program)
    assert run_python("-m", "theirs.program", path=broken_extensions) == "['excepthook']"


COMMANDS = sorted(
    name.removesuffix(".__main__") for name, path in MODULES.items() if '"__main__"' in path.read_text(encoding="utf-8")
)
"""What can follow `python -m`."""


def changed_before(module, command, folder):
    """What a command has changed in its process when it begins to import a module."""
    (folder / "sitecustomize.py").write_text(
        f"{STATE}\n"
        "class Finder:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path, target=None):\n"
        f"        if name == {module!r}:\n"
        "            print(changed()); sys.stdout.flush(); os._exit(0)\n"
        "sys.meta_path.insert(0, Finder)\n"
    )
    return ast.literal_eval(run_python("-m", *command.split(), path=folder))


ASKING = "rlmed.ask docs/figures/report.png What? --options a b"
WITH_TORCH = {
    **{name: f"{name} +experiment=medvqa_600 --help" for name in ("rlmed.launch", "rlmed.sft", "rlmed.evaluate")},
    "rlmed.reliability": "rlmed.reliability +experiment=medvqa_600 --help",
    "rlmed.reproduce": "rlmed.reproduce +experiment=medvqa_600 --out {folder}",
    "rlmed.ask": ASKING,
    "rlmed": ASKING.replace("rlmed.ask", "rlmed ask"),
    "rlmed.doctor": "rlmed.doctor",
    "rlmed.smol_base": "rlmed.smol_base --vlm --out {folder} --work {folder}/work",
    "rlmed.tiny_base": "rlmed.tiny_base --work {folder}",
    "rlmed.export": "rlmed.export {folder} --out {folder}",
    "rollout.vllm_backend.serve": "rollout.vllm_backend.serve {folder}",
}
"""Arguments with which the commands that load torch come to do so."""
WITHOUT_TORCH = {"rlmed.prepare", "rlmed.leakage", "rlmed.report", "rlmed.init", "rlmed.studio"}
"""Commands that do not load it, or (init) only once the data has been read."""


@pytest.mark.parametrize("command", WITH_TORCH.values(), ids=WITH_TORCH)
def test_a_command_settles_openmp_before_torch_is_imported(command, broken_extensions):
    changed = changed_before("torch", command.format(folder=broken_extensions / "out"), broken_extensions)
    assert set(changed) & {*WAITING}


def test_a_command_disables_extensions_that_do_not_load(broken_extensions):
    changed = changed_before("rlmed.cluster", ASKING, broken_extensions)
    assert changed[:3] == ["torchaudio", "nms", "qnms"]


def test_all_that_help_loads_is_light():
    """Each of these takes seconds, and help is read by a person who waits."""
    assert WITH_TORCH.keys() | WITHOUT_TORCH == set(COMMANDS)
    programs = [name if f"{name}.__main__" not in MODULES else f"{name}.__main__" for name in COMMANDS]
    heavy = ("torch", "transformers", "ray", "vllm", "scipy")
    program = (
        f"import importlib, sys\nfor name in {programs}:\n    importlib.import_module(name)\n"
        f"    print(name, [heavy for heavy in {heavy} if heavy in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [f"{name} []" for name in programs], done.stderr


def test_a_folder_that_holds_the_checkout_is_not_taken_for_the_package(tmp_path):
    """Python takes any folder for an empty package, before it asks an editable install's hook."""
    pytest.importorskip("setuptools", minversion="77")
    checkout, site = tmp_path / "rlmed", tmp_path / "site"
    for package in ("rlmed", "rollout", "learner", "rewards", "conf"):
        (checkout / package).mkdir(parents=True)
        (checkout / package / "__init__.py").write_text("settled = True\n")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    site.mkdir()
    build = f"from setuptools import build_meta; print(build_meta.build_editable({str(site)!r}))"
    done = subprocess.run([sys.executable, "-c", build], cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(site.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    look = (
        f"import site, sys; sys.path.insert(0, ''); site.addsitedir({str(site)!r}); import rlmed; print(rlmed.settled)"
    )
    done = subprocess.run(
        [sys.executable, "-IS", "-c", look], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout == "True\n", done.stderr


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: set() for name in MODULES}
    for entry in IMPORTS:
        if entry.imported in MODULES and not (entry.lazy or entry.typing_only):
            graph[entry.importer].add(entry.imported)
    # take away, again and again, the modules that wait for nobody
    while ready := [name for name, waits in graph.items() if not waits]:
        for name in ready:
            del graph[name]
        for waits in graph.values():
            waits.difference_update(ready)
    assert graph == {}


def test_the_core_needs_no_torch():
    core = [name for name in MODULES if inside(name, "rlmed.core")]
    code = (
        "import importlib, sys\n"
        "for absent in ('torch', 'transformers', 'ray', 'vllm'): sys.modules[absent] = None\n"
        f"for name in {core!r}: importlib.import_module(name)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
