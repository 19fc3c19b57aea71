"""Packaging. Ranges stand here; `constraints.txt` holds the exact versions that are tested."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """`__version__`, read as text: to import the package would need what is being installed."""
    source = (ROOT / "humpback_jax" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if found is None:
        raise ValueError("humpback_jax/__init__.py holds no __version__ line")
    return found[1]


def read_long_description() -> str:
    """The README where there is one: a source archive made for a test may lack it."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


INSTALL = [
    "jax>=0.10.2,<0.13",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12,<0.13",  # the checkpoint API used is still under `experimental`
    "numpy>=2.0",
    "ml-dtypes>=0.5",
    "ml-collections>=1.1,<2",
    "tokenizers>=0.22",
    "transformers>=5,<6",
    # tokenizer.model files are protocol buffers. The reader in sentencepiece 0.2.3 wants
    # protobuf 7.36, Apache Beam wants protobuf below 7.
    "sentencepiece>=0.2.1,<0.2.3",
    "protobuf>=5.28",
    "jinja2>=3.1.5",
    "pyarrow>=18",
    "fsspec>=2024.6",
    "etils[epath]>=1.12",
    "safetensors>=0.5",
    "gguf>=0.18",
    "huggingface-hub>=1",
    "tensorflow-datasets>=4.9.9",  # works without TensorFlow, which it neither needs nor imports
    "rich>=13.7",
    "matplotlib>=3.9",
    "tensorboardX>=2.6.2",
]

EXTRAS = {
    "tpu": ["jax[tpu]", "gcsfs"],  # gcsfs: models in gs:// buckets
    "cuda": ["jax[cuda13]"],
    "beam": ["apache-beam>=2.70,<3"],
    "eval": ["lm-eval>=0.4.9,<0.5"],
    "bench": ["trl>=1,<2", "accelerate>=1.10", "torch>=2.9"],
    "llamacpp": ["llama-cpp-python>=0.3.16"],
    "test": [
        *("pytest>=8.3", "pytest-xdist>=3.6", "hypothesis>=6.130"),
        *("torch==2.13.0", "peft>=0.18", "trl>=1,<2"),
    ],
    "dev": ["ruff>=0.14", "mypy>=1.18"],
}

setup(
    name="humpback-jax",
    version=read_version(),
    description="Self-alignment with instruction backtranslation in JAX, from one CPU to a TPU pod",
    long_description=read_long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["humpback_jax", "humpback_jax.*"]),
    package_data={"humpback_jax": ["data/*.jsonl", "text/prompts/*.txt", "py.typed"]},
    entry_points={"console_scripts": ["humpback = humpback_jax.cli:main"]},
    install_requires=INSTALL,
    extras_require=EXTRAS,
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
