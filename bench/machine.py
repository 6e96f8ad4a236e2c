"""Where a figure was measured: one line for the machine, one word for the source."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from dspark import __version__

COMMIT_VARIABLE = "DSPARK_COMMIT"


def describe_machine(dtype: str | None = None) -> str:
    """CPU model, cores, GPU if there is one, torch version, dtype, threads.

    Without ``dtype`` the machine is only a client: torch, which may not even be installed there, is left out.
    """
    parts = [cpu_model(), f"{usable_cores()} cores"]
    if dtype is not None:
        import torch

        if torch.cuda.is_available():
            parts.append(torch.cuda.get_device_name())
        parts += [f"torch {importlib.metadata.version('torch')}", dtype, f"{torch.get_num_threads()} threads"]
    return ", ".join(parts)


def cpu_model() -> str:
    """The processor's name as Linux tells it, otherwise what Python knows of it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return " ".join(value.split())
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def source_commit() -> str:
    """The short commit of this checkout, ``-dirty`` if files differ from it.

    Where there is no checkout (installed, or copied to another machine): ``DSPARK_COMMIT`` if it is set, otherwise the version.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # git would report whatever checkout the environment happens to lie in
        return os.environ.get(COMMIT_VARIABLE) or __version__
    try:
        commit = _git(root, "rev-parse", "--short", "HEAD")
        return commit + ("-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return os.environ.get(COMMIT_VARIABLE) or __version__


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout.strip()
