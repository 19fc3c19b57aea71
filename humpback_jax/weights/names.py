"""What each parameter is called here, in Hugging Face files and in GGUF files: the one table.

Reading, writing and checking of files derive from it, and so do the module names of an adapter.
Shapes are not repeated here: they come from the model's own declaration.
"""

from __future__ import annotations

import dataclasses

from flax import nnx

from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.llama import abstract_model

LeafPath = tuple[str, ...]

# Our module -> (Hugging Face module, GGUF tensor); `{i}` stands for the layer.
MODULE_NAMES: dict[LeafPath, tuple[str, str]] = {
    ("embed",): ("model.embed_tokens", "token_embd"),
    ("layers", "attn_norm"): ("model.layers.{i}.input_layernorm", "blk.{i}.attn_norm"),
    ("layers", "attn", "q"): ("model.layers.{i}.self_attn.q_proj", "blk.{i}.attn_q"),
    ("layers", "attn", "k"): ("model.layers.{i}.self_attn.k_proj", "blk.{i}.attn_k"),
    ("layers", "attn", "v"): ("model.layers.{i}.self_attn.v_proj", "blk.{i}.attn_v"),
    ("layers", "attn", "o"): ("model.layers.{i}.self_attn.o_proj", "blk.{i}.attn_output"),
    ("layers", "mlp_norm"): ("model.layers.{i}.post_attention_layernorm", "blk.{i}.ffn_norm"),
    ("layers", "mlp", "gate"): ("model.layers.{i}.mlp.gate_proj", "blk.{i}.ffn_gate"),
    ("layers", "mlp", "up"): ("model.layers.{i}.mlp.up_proj", "blk.{i}.ffn_up"),
    ("layers", "mlp", "down"): ("model.layers.{i}.mlp.down_proj", "blk.{i}.ffn_down"),
    ("norm",): ("model.norm", "output_norm"),
    ("lm_head",): ("lm_head", "output"),
}
# Our leaf -> its suffix in files. Files hold a kernel transposed: [out, in].
LEAF_SUFFIXES = {"embedding": "weight", "scale": "weight", "kernel": "weight", "bias": "bias"}
_LISTED = 5  # how many names an error spells out


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """One tensor of a weights file and its place in the parameter tree.

    Attributes:
      path: path of our leaf, e.g. ("layers", "attn", "q", "kernel").
      layer: index on the leaf's first axis, or None for a leaf outside the layers.
      hf, gguf: the tensor's name in each kind of file.
      shape: as Hugging Face stores it (GGUF lists the same dimensions in reverse).
      transposed: whether the file's rows are our columns.
    """

    path: LeafPath
    layer: int | None
    hf: str
    gguf: str
    shape: tuple[int, ...]
    transposed: bool


def leaf_shapes(config: LlamaConfig) -> dict[LeafPath, tuple[int, ...]]:
    """Path -> shape of every parameter leaf, layers stacked on axis 0."""
    _, state = abstract_model(config)
    return {
        tuple(str(key) for key in path): tuple(variable.shape)
        for path, variable in nnx.to_flat_state(state)
    }


def file_tensors(config: LlamaConfig) -> list[FileTensor]:
    """Every tensor that a file of this model holds, in the order in which files list them."""
    shapes = leaf_shapes(config)
    order = {module: rank for rank, module in enumerate(MODULE_NAMES)}
    paths = sorted(shapes, key=lambda path: (order[path[:-1]], path[-1] == "bias"))
    stacked = [path for path in paths if path[0] == "layers"]
    first = paths.index(stacked[0])
    before, after = paths[:first], paths[first + len(stacked) :]
    return [
        *(_file_tensor(path, None, shapes[path]) for path in before),
        *(
            _file_tensor(path, layer, shapes[path][1:])
            for layer in range(config.num_hidden_layers)
            for path in stacked
        ),
        *(_file_tensor(path, None, shapes[path]) for path in after),
    ]


def _file_tensor(path: LeafPath, layer: int | None, shape: tuple[int, ...]) -> FileTensor:
    hf, gguf = MODULE_NAMES[path[:-1]]
    suffix = LEAF_SUFFIXES[path[-1]]
    transposed = path[-1] == "kernel"
    return FileTensor(
        path=path,
        layer=layer,
        hf=f"{hf}.{suffix}".format(i=layer),
        gguf=f"{gguf}.{suffix}".format(i=layer),
        shape=shape[::-1] if transposed else shape,
        transposed=transposed,
    )


def some_of(listed: list[str]) -> str:
    """The first of some names, and how many more there are, for a message."""
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return f"{', '.join(repr(name) for name in listed[:_LISTED])}{more}"
