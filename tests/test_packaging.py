"""What is installed is what is in the rooms: the wheel, also when it is built from the sdist."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("bench", "cluster", "deploy", "kernels", "router", "training", "workers")
FILES = ("pyproject.toml", "MANIFEST.in", "LICENSE", "CHANGELOG.md", "constraints.txt", "README.md")
DATA = (".py", ".pyi", ".jsonl", ".proto", ".safetensors", ".json", ".yaml")


def copy_sources(target: Path) -> Path:
    """A copy of what setuptools reads, links as links: a build writes into the folder it builds."""
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("dspark", *ROOMS):
        shutil.copytree(ROOT / folder, target / folder, symlinks=True, ignore=ignore)
    for name in FILES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, target / name)
    return target


def build(kind: str, source: Path, out: Path) -> Path:
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


def source_names() -> set[str]:
    """Every file of the rooms that belongs into a wheel, by its installed name."""
    found = {f"dspark/{path.name}" for path in (ROOT / "dspark").iterdir() if path.suffix in DATA}
    for room in ROOMS:
        found |= {f"dspark/{path.relative_to(ROOT)}" for path in (ROOT / room).rglob("*") if path.suffix in DATA and path.is_file()}
    return found


def test_wheel_and_sdist_hold_every_room(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    wheel = zipfile.ZipFile(build("wheel", copy_sources(tmp_path / "checkout"), out))
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {"dspark/workers/build.py", "dspark/kernels/keyed_random.py", "dspark/bench/prompts/code.jsonl"} <= names
    assert names - {"dspark/py.typed"} == source_names()
    assert not any(info.external_attr >> 28 == 0o12 for info in wheel.infolist())  # real files, no links

    with tarfile.open(build("sdist", tmp_path / "checkout", out)) as sdist:
        sdist.extractall(tmp_path, filter="data")
        assert not [name for name in sdist.getnames() if "/tests/" in name]
    (unpacked,) = tmp_path.glob("dspark_serve-*")
    (tmp_path / "again").mkdir()
    again = zipfile.ZipFile(build("wheel", unpacked, tmp_path / "again"))
    assert {name for name in again.namelist() if ".dist-info/" not in name} == names
