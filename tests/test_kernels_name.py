"""The name ``kernels`` has two owners: Hugging Face's package, which transformers looks for, and a room of ours.

transformers takes any top-level module of that name for the package, so our folder must stay a namespace folder
(no ``__init__.py``): a regular package always wins over it, and it executes nothing if there is none.

The index's newest ``kernels`` may be outside the range that the installed transformers accepts (0.17.2 beside
transformers 5.23, which wants 0.18.2 or newer); transformers then ignores it. The test therefore runs with the package
as it is, with the package hidden, and with the package under an accepted version number, where transformers uses it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SITE = Path(sysconfig.get_path("purelib"))
PROBE = """
import json, sys
import kernels
import dspark.kernels.keyed_random as ours
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import is_kernels_available

config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
logits = LlamaForCausalLM(config)(torch.arange(4)[None]).logits
noise = ours.gumbel(torch.tensor([1]), torch.tensor([2]), ours.TOKEN, torch.arange(32))
print(json.dumps({
    "kernels_file": getattr(kernels, "__file__", None),
    "kernels_paths": list(kernels.__path__),
    "ours": ours.__file__,
    "is_used": is_kernels_available(),
    "shape": list(logits.shape),
    "noise": len(noise.flatten()),
    "executed": [name for name in sys.modules if name.startswith("kernels.keyed_random")],
}))
"""


def site_without_kernels(folder: Path) -> Path:
    """A copy, by links, of the installed packages without Hugging Face's ``kernels``."""
    folder.mkdir()
    for entry in SITE.iterdir():
        if entry.name != "kernels" and not entry.name.startswith("kernels-"):
            (folder / entry.name).symlink_to(entry)
    return folder


def add_kernels(site: Path, version: str) -> None:
    """Puts the installed ``kernels`` back under another version number."""
    (site / "kernels").symlink_to(SITE / "kernels")
    metadata = site / f"kernels-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")


def probe(cwd: Path, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the probe with ``cwd`` on sys.path; ``site`` stands in for the installed packages."""
    flags = [] if site is None else ["-S"]  # without site-packages
    paths = os.pathsep.join([str(ROOT)] + ([str(site)] if site else []))
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *flags, "-c", PROBE]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False)


def report(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert Path(found["ours"]).resolve() == ROOT / "kernels/keyed_random.py"
    assert (found["shape"], found["noise"], found["executed"]) == ([1, 4, 32], 32, [])
    return found


def accepted_version() -> str:
    from transformers.utils import import_utils

    return str(import_utils.KERNELS_MIN_VERSION)


def test_the_package_wins_over_our_folder() -> None:
    found = report(probe(ROOT))
    assert importlib.metadata.version("kernels")
    assert Path(found["kernels_file"]).resolve() == (SITE / "kernels/__init__.py").resolve()


def test_all_works_without_the_package(tmp_path: Path) -> None:
    found = report(probe(ROOT, site_without_kernels(tmp_path / "site")))
    assert found["kernels_file"] is None
    assert {Path(path).resolve() for path in found["kernels_paths"]} == {ROOT / "kernels"}
    assert not found["is_used"]


def test_transformers_gets_the_package_when_it_accepts_its_version(tmp_path: Path) -> None:
    site = site_without_kernels(tmp_path / "site")
    add_kernels(site, accepted_version())
    found = report(probe(ROOT, site))
    assert found["is_used"]
    assert Path(found["kernels_file"]).resolve() == (SITE / "kernels/__init__.py").resolve()


def test_a_regular_package_in_our_place_would_break_every_model(tmp_path: Path) -> None:
    """The trap itself, sprung: the same probe beside a ``kernels/__init__.py`` fails while importing a model."""
    site = site_without_kernels(tmp_path / "site")
    add_kernels(site, accepted_version())
    (tmp_path / "root/kernels").mkdir(parents=True)
    (tmp_path / "root/kernels/__init__.py").touch()
    done = probe(tmp_path / "root", site)
    assert done.returncode != 0
    assert "CUDAProperties" in done.stderr
    with pytest.raises(AssertionError):
        report(done)
