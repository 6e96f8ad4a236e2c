"""The rooms and the arrows between them, kept by reading every import of every file.

A module-level import runs when its room is loaded; an import inside a function (or under ``TYPE_CHECKING``) is lazy.
Every check is shown a bad example that it must refuse: a check that cannot fail would keep nothing.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOM_FOLDERS = ("bench", "cluster", "deploy", "kernels", "router", "training", "workers")
PICKLE_MODULES = frozenset({"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"})
# Calls that pickle what they carry: files (torch.load runs code of the file) and sockets.
PICKLE_CALLS = frozenset(
    {
        "torch.load",
        "torch.save",
        "all_gather_object",
        "broadcast_object_list",
        "gather_object",
        "recv_object_list",
        "scatter_object_list",
        "send_object_list",
    }
)


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


@dataclass(frozen=True, slots=True)
class Room:
    """What a room may import: our rooms and third-party packages, and more of both inside functions.

    ``never``: parts of the standard library that are out of bounds.
    """

    rooms: frozenset[str]
    libraries: frozenset[str] = frozenset()
    lazy_rooms: frozenset[str] = frozenset()
    lazy_libraries: frozenset[str] = frozenset()
    never: frozenset[str] = frozenset()


# "nouns" are the values of dspark/ that every room speaks; "face" is the rest of dspark/ (LLM, cli, prompting).
NOUNS = names(
    "dspark.types dspark.drafting dspark.kv_blocks dspark.sampling dspark.asked dspark.errors dspark.config dspark.config_file"
) | names("dspark.SamplingParams dspark.AcceptanceRule dspark.__version__")
MODEL_LIBRARIES = names("torch transformers numpy safetensors tqdm")
EVERY_ROOM = names("nouns face kernels router blocks verifier drafter wire workers deploy cluster training bench")
ROOMS = {
    "nouns": Room(names("nouns"), names("numpy pydantic"), lazy_libraries=names("yaml")),
    "face": Room(names("nouns face"), names("numpy pydantic"), EVERY_ROOM, names("torch transformers jinja2 yaml tqdm")),
    "kernels": Room(names(""), names("torch triton")),
    "router": Room(names("nouns"), never=names("time datetime")),
    "blocks": Room(names("")),
    "verifier": Room(names("nouns kernels blocks"), MODEL_LIBRARIES),
    "drafter": Room(names("nouns kernels blocks"), MODEL_LIBRARIES),
    "wire": Room(names("nouns"), names("grpc google numpy torch")),
    "workers": Room(names("nouns kernels blocks verifier drafter wire deploy"), MODEL_LIBRARIES),  # build.py: where all of them meet
    "deploy": Room(names("nouns"), names("tqdm yaml"), lazy_libraries=MODEL_LIBRARIES | names("gguf")),
    "cluster": Room(
        EVERY_ROOM - names("training bench"),
        names("ray fastapi starlette uvicorn pydantic grpc google numpy prometheus_client opentelemetry yaml"),
    ),
    "training": Room(
        names("nouns face kernels workers verifier drafter deploy"),
        MODEL_LIBRARIES | names("pydantic"),
        lazy_libraries=names("matplotlib yaml ray"),
    ),
    "bench": Room(
        names("nouns face router"),
        names("numpy"),
        names("deploy kernels verifier drafter wire workers"),
        names("httpx torch transformers safetensors triton matplotlib vllm"),
    ),
    "tests": Room(EVERY_ROOM, names("pytest hypothesis numpy torch"), frozenset(), frozenset()),
}
OUR_FOLDERS = {"workers/blocks": "blocks", "workers/verifier": "verifier", "workers/drafter": "drafter", "workers/wire": "wire"} | {
    folder: folder for folder in (*ROOM_FOLDERS, "tests")
}


@dataclass(frozen=True, slots=True)
class Import:
    name: str  # dotted, as far as it is known: `from a import b` is a.b
    line: int
    lazy: bool


def room_of_file(path: str) -> str | None:
    """The room that a file (relative to the root, real path) belongs to; None: no room."""
    if path.startswith("dspark/"):
        module = "dspark." + path.removeprefix("dspark/").removesuffix(".py")
        return "nouns" if module in NOUNS else "face"
    module = path.removesuffix(".py") + "/"
    return next((room for folder, room in OUR_FOLDERS.items() if module.startswith(folder + "/")), None)


def room_of_import(name: str) -> str:
    """The room that ``dspark.…`` names."""
    if name in NOUNS or ".".join(name.split(".")[:2]) in NOUNS:
        return "nouns"
    path = name.removeprefix("dspark").lstrip(".").replace(".", "/") + "/"
    return next((room for folder, room in OUR_FOLDERS.items() if path.startswith(folder + "/")), "face")


def imported_by_call(call: ast.Call) -> str | None:
    """The module that ``import_module("…")`` or ``__import__("…")`` names, if it is written out."""
    if ast.unparse(call.func).split(".")[-1] not in ("import_module", "__import__") or not call.args:
        return None
    return str(call.args[0].value) if isinstance(call.args[0], ast.Constant) else None


def imports(source: str, path: str) -> Iterator[Import]:
    """Every import of a file, relative ones resolved, imports by call included."""
    package = ["dspark", *Path(path.removeprefix("dspark/")).parts[:-1]]

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *filter(None, [node.module])] if node.level else [node.module or ""]
            yield from (Import(".".join([*base, alias.name]), node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.Call) and (name := imported_by_call(node)):
            yield Import(name, node.lineno, lazy)
        if isinstance(node, ast.If) and ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING":
            for branch, is_typing in ((node.body, True), (node.orelse, False)):
                for statement in branch:
                    yield from visit(statement, lazy or is_typing)
            return
        inside = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(source), False)


def refusal(room_name: str, found: Import) -> str | None:
    """Why the room may not import this; None if it may."""
    room, top = ROOMS[room_name], found.name.split(".")[0]
    if top in PICKLE_MODULES:
        return f"{found.name}: nothing here is pickled"
    if top in ROOM_FOLDERS and not (room_name == "tests" and found.lazy):
        return f"{found.name}: a room's import name is dspark.{found.name}"
    if top == "dspark":
        target = room_of_import(found.name)
        if target == room_name or target in room.rooms or (found.lazy and target in room.lazy_rooms):
            return None
        return f"{found.name}: {room_name} may not import {target}{' at module level' if target in room.lazy_rooms else ''}"
    if top in sys.stdlib_module_names:
        return f"{found.name}: {room_name} takes time as an argument" if top in room.never else None
    if room_name == "tests" or top in room.libraries or (found.lazy and top in room.lazy_libraries):
        return None
    return f"{found.name}: {room_name} may not import {top}{' at module level' if top in room.lazy_libraries else ''}"


def unsafe_calls(source: str) -> Iterator[str]:
    """Calls that pickle, and any ``trust_remote_code`` that is not plainly False."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in PICKLE_CALLS or called.split(".")[-1] in PICKLE_CALLS:
                yield f"line {node.lineno}: {called} pickles"
        pairs: list[tuple[str | None, ast.expr]] = []
        if isinstance(node, ast.keyword):
            pairs = [(node.arg, node.value)]
        elif isinstance(node, ast.Dict):
            pairs = [(str(key.value), value) for key, value in zip(node.keys, node.values, strict=True) if isinstance(key, ast.Constant)]
        for name, value in pairs:
            if name in ("trust_remote_code", "allow_pickle") and not (isinstance(value, ast.Constant) and value.value is False):
                yield f"line {value.lineno}: {name} must stay False"


def violations(source: str, path: str) -> list[str]:
    """What is wrong with one file; ``path`` is its real path under the root."""
    room = room_of_file(path)
    if room is None:
        return [f"{path}: belongs to no room"]
    found = [f"line {item.line}: {why}" for item in imports(source, path) if (why := refusal(room, item))]
    return [f"{path}: {why}" for why in [*found, *unsafe_calls(source)]]


def layout_faults(root: Path) -> list[str]:
    """What is wrong with the folders themselves."""
    faults = ["kernels/__init__.py must not exist: transformers would execute it"] if (root / "kernels/__init__.py").exists() else []
    for folder in ROOM_FOLDERS:
        link = root / "dspark" / folder
        if not link.is_symlink():
            faults.append(f"dspark/{folder} must be a symlink (a checkout without symlinks? git config core.symlinks true)")
        elif os.readlink(link) != f"../{folder}":
            faults.append(f"dspark/{folder} must point to ../{folder}, not {os.readlink(link)}")
        elif not link.is_dir():
            faults.append(f"dspark/{folder} points nowhere")
    return faults


def python_files(root: Path) -> list[str]:
    """All .py files of the checkout by their real paths: links are not followed, hidden and built folders are skipped."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in ("build", "dist", "__pycache__")]
        found += [os.path.relpath(os.path.join(folder, name), root) for name in files if name.endswith(".py")]
    return sorted(path for path in found if not path.endswith(("_pb2.py", "_pb2_grpc.py")))


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_file_keeps_the_arrows() -> None:
    files = python_files(ROOT)
    assert {"dspark/types.py", "tests/test_boundaries.py"} <= set(files)
    faults = [fault for path in files for fault in violations((ROOT / path).read_text(), path)]
    assert not faults, "\n".join(faults)


def test_layout() -> None:
    assert not layout_faults(ROOT)


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("dspark/llm.py", "import torch", "face may not import torch at module level"),
        ("dspark/cli.py", "class A:\n    import ray", "face may not import ray"),
        ("dspark/cli.py", "def f():\n    import ray", "face may not import ray"),
        ("dspark/cli.py", "from dspark.cluster import app", "may not import cluster at module level"),
        ("dspark/cli.py", "from . import workers", "may not import workers at module level"),
        ("dspark/types.py", "def f():\n    from dspark.llm import LLM", "nouns may not import face"),
        ("kernels/judge.py", "from dspark.types import Request", "kernels may not import nouns"),
        ("kernels/judge.py", "import numpy", "kernels may not import numpy"),
        ("router/rank.py", "from time import monotonic", "takes time as an argument"),
        ("router/rank.py", "import torch", "router may not import torch"),
        ("workers/verifier/engine.py", "from dspark.workers.drafter.local import LocalDrafter", "verifier may not import drafter"),
        ("workers/verifier/engine.py", "from ..drafter import local", "verifier may not import drafter"),
        ("workers/verifier/engine.py", "def f():\n    from dspark.workers import drafter", "verifier may not import drafter"),
        ("workers/verifier/engine.py", "if TYPE_CHECKING:\n    from dspark.workers.drafter import local", "may not import drafter"),
        ("workers/verifier/engine.py", "from dspark.workers import build", "verifier may not import workers"),
        ("workers/verifier/engine.py", "from dspark import LLM", "verifier may not import face"),
        ("workers/verifier/engine.py", "def f():\n    import fastapi.responses", "verifier may not import fastapi"),
        ("workers/drafter/local.py", "import dspark.workers.verifier.sequence as s", "drafter may not import verifier"),
        ("workers/drafter/local.py", "import ray", "drafter may not import ray"),
        ("workers/blocks.py", "import torch", "blocks may not import torch"),
        ("workers/build.py", "import importlib\nimportlib.import_module('ray.serve')", "workers may not import ray"),
        ("workers/wire/grpc.py", "import pickle", "nothing here is pickled"),
        ("training/run.py", "import dspark.cluster", "training may not import cluster"),
        ("bench/offline.py", "from dspark.workers.verifier import engine", "bench may not import verifier"),
        ("cluster/app.py", "def f():\n    import torch", "cluster may not import torch"),
        ("cluster/app.py", "from workers.build import load_engine", "import name is dspark.workers.build.load_engine"),
        ("tests/test_x.py", "import kernels", "import name is dspark.kernels"),
        ("tests/test_x.py", "def f():\n    from cloudpickle import dumps", "nothing here is pickled"),
        ("workers/verifier/load.py", "import torch\ntorch.load('w.pt')", "torch.load pickles"),
        ("workers/verifier/tp.py", "import torch.distributed as dist\ndist.broadcast_object_list(x)", "pickles"),
        ("workers/verifier/load.py", "f(trust_remote_code=True)", "trust_remote_code must stay False"),
        ("workers/verifier/load.py", "f(trust_remote_code=flag)", "trust_remote_code must stay False"),
        ("workers/verifier/load.py", "f(**{'trust_remote_code': True})", "trust_remote_code must stay False"),
        ("scripts/helper.py", "import os", "belongs to no room"),
    ],
)
def test_a_bad_import_is_found(path: str, source: str, message: str) -> None:
    assert any(message in fault for fault in violations(source, path)), violations(source, path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("dspark/cli.py", "def main():\n    from dspark.cluster import app\n    import torch"),
        ("dspark/llm.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\nfrom dspark.types import Request"),
        ("kernels/judge.py", "import torch\nfrom dspark.kernels.keyed_random import gumbel"),
        ("workers/verifier/engine.py", "from dspark.kernels.keyed_random import gumbel\nfrom dspark import SamplingParams\nimport torch"),
        ("workers/verifier/engine.py", "from . import blocks\nfrom .blocks import Pool\nimport transformers"),
        ("workers/build.py", "from dspark.workers.drafter.local import LocalDrafter\nfrom dspark.workers.verifier.engine import Engine"),
        ("cluster/app.py", "from ray import serve\nfrom dspark.workers.build import load_engine\nimport time"),
        ("workers/verifier/load.py", "f(trust_remote_code=False)"),
    ],
)
def test_a_good_import_passes(path: str, source: str) -> None:
    assert violations(source, path) == []


def test_bad_layouts_are_found(tmp_path: Path) -> None:
    (tmp_path / "dspark").mkdir()
    for folder in ROOM_FOLDERS:
        (tmp_path / folder).mkdir()
        (tmp_path / "dspark" / folder).symlink_to(f"../{folder}")
    assert layout_faults(tmp_path) == []
    (tmp_path / "kernels/__init__.py").touch()
    assert "kernels/__init__.py must not exist" in layout_faults(tmp_path)[0]
    (tmp_path / "kernels/__init__.py").unlink()
    (tmp_path / "dspark/router").unlink()
    assert "dspark/router must be a symlink" in layout_faults(tmp_path)[0]
    (tmp_path / "dspark/router").symlink_to(tmp_path / "router")
    assert "dspark/router must point to ../router" in layout_faults(tmp_path)[0]


def test_importing_dspark_loads_nothing_heavy() -> None:
    probe = "import sys; print(sorted({'torch', 'ray', 'transformers', 'numpy'} & set(sys.modules)))"
    assert run_python(f"import dspark, dspark.types, dspark.sampling, dspark.errors; {probe}") == "[]"
    assert run_python(f"import numpy; {probe}") == "['numpy']"


def test_replicas_load_torch_only_when_they_have_set_its_threads() -> None:
    """Ray starts actors with OMP_NUM_THREADS=1, which torch would keep if it were imported with the replica's module."""
    modules = "dspark.cluster.app, dspark.cluster.ingress, dspark.cluster.verifier, dspark.cluster.draft_worker, dspark.cluster.ranks"
    assert run_python(f"import sys, {modules}; print('torch' in sys.modules)") == "False"


def test_no_room_but_cluster_needs_ray_or_a_web_server() -> None:
    """Every module outside cluster/ and bench/ loads where Ray, FastAPI and gRPC are not installed."""
    modules = [
        "dspark." + path.removeprefix("dspark/").removesuffix(".py").replace("/", ".")
        for path in python_files(ROOT)
        if not path.startswith(("cluster/", "tests/", "workers/wire/")) and not path.endswith(("__init__.py", "__main__.py"))
    ]
    code = """
import importlib, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "fastapi", "starlette", "uvicorn", "grpc", "httpx", "openai"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
sys.meta_path.insert(0, Blocked())
"""
    assert run_python(f"{code}\nfor name in {modules!r}: importlib.import_module(name)\nprint('loaded')") == "loaded"
    with pytest.raises(AssertionError, match="ray is blocked"):
        run_python(f"{code}\nimport ray")
