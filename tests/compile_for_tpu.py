"""Compiles the kernels for TPU on a machine without one, and says how long that took.

    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python tests/compile_for_tpu.py v5e:2x2

Needs libtpu (`pip install jax[tpu]`). One line of JSON for each program, on standard output.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from humpback_jax.model.blockwise import BLOCK, Shared
from humpback_jax.model.cache import empty_cache
from humpback_jax.model.config import LlamaConfig
from humpback_jax.model.kernels import Kernels
from humpback_jax.model.linear import Precision
from humpback_jax.model.llama import init_params
from humpback_jax.sampling.prefix import PrefixArrays
from humpback_jax.sampling.programs import decode_program, empty_slots
from humpback_jax.training.loss import Batch
from humpback_jax.training.optimizer import OptimizerSpec, make_optimizer
from humpback_jax.training.state import StepSpec, abstract_state
from humpback_jax.training.step import make_train_step

BFLOAT16 = Precision("bfloat16", "bfloat16")
# Query heads, key/value heads, head width.
HEADS = {"LLaMA 7B": (32, 32, 128), "LLaMA 3 8B": (32, 8, 128), "LLaMA 3.2 1B": (32, 8, 64)}
CAPACITY, SLOTS, CHUNKS, PREFIX = 4096, 64, 8, 512


def abstract(mesh: Mesh, spec: P, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def config_of(heads: int, groups: int, width: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=1024,
        hidden_size=heads * width,
        intermediate_size=1024,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=width,
        max_position_embeddings=CAPACITY,
    )


def attention_programs(
    mesh: Mesh, heads: int, groups: int, width: int
) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """(name, function, its arguments) of decoding, with drafts too, of prefill and of training."""
    kernels = Kernels.of_platform("tpu", mesh)
    cut, rows = P("data", "tensor"), P("data")
    cache = jax.tree.map(
        lambda x: abstract(mesh, cut, x.dtype, *x.shape),
        jax.eval_shape(
            lambda: empty_cache(config_of(heads, groups, width), SLOTS, CAPACITY, "bfloat16")[0]
        ),
    )
    shared = Shared(
        abstract(mesh, P("tensor"), "bfloat16", groups, width, PREFIX),
        abstract(mesh, P("tensor"), "bfloat16", groups, PREFIX, width),
    )

    def qkv(spec: P, rows: int, tokens: int) -> list[jax.ShapeDtypeStruct]:
        counts = (heads, groups, groups)
        return [abstract(mesh, spec, "bfloat16", rows, tokens, n, width) for n in counts]

    def decode(q: Any, k: Any, v: Any, cache: Any, places: jax.Array, live: jax.Array) -> Any:
        return kernels.decode(places, places, live, BFLOAT16)(q, k, v, cache)

    def prefill(q: Any, k: Any, v: Any, cache: Any, slots: jax.Array) -> Any:
        return kernels.prefill(slots, slots, slots, BFLOAT16)(q, k, v, cache)

    def loss(q: Any, k: Any, v: Any, segment_ids: jax.Array) -> jax.Array:
        attend = kernels.packed(segment_ids, segment_ids, BFLOAT16, 1024)
        return jnp.square(attend(q, k, v, None)[0].astype("float32")).sum()

    slots = abstract(mesh, rows, "int32", SLOTS), abstract(mesh, rows, bool, SLOTS)
    tokens = P("data", None, "tensor")
    for count in (1, 5):
        yield f"decode {count}", decode, (*qkv(tokens, SLOTS, count), (cache, shared), *slots)
    chunks = qkv(P(None, None, "tensor"), CHUNKS, BLOCK)
    yield "prefill", prefill, (*chunks, (cache, shared), abstract(mesh, P(), "int32", CHUNKS))
    segments = abstract(mesh, rows, "int32", 4, 2048)
    yield "train", jax.grad(loss, argnums=(0, 1, 2)), (*qkv(tokens, 4, 2048), segments)


def decoding_of_a_layer(device: Any, heads: int, groups: int, width: int) -> dict[str, int]:
    """Bytes of a large cache, and those that the loop which draws tokens needs beside it."""
    mesh = Mesh(np.array([device]), "data")
    config = config_of(heads, groups, width)
    kernels = Kernels.of_platform("tpu")

    def arguments() -> tuple[Any, ...]:
        params = init_params(config, jax.random.key(0), "bfloat16", "unrolled")
        slots = empty_slots(config, BFLOAT16, SLOTS, CAPACITY)
        shared = Shared(
            jnp.zeros((groups, width, PREFIX), "bfloat16"),
            jnp.zeros((groups, PREFIX, width), "bfloat16"),
        )
        prefix = PrefixArrays([shared], jnp.zeros(config.vocab_size, bool))
        return params, slots, prefix, jnp.zeros(SLOTS, bool), jnp.int32(0)

    place = jax.tree.map(
        lambda x: abstract(mesh, P(), x.dtype, *x.shape), jax.eval_shape(arguments)
    )
    cache = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(place[1].caches))
    program = decode_program(config, BFLOAT16, 16, 0, None, kernels)
    memory = program.lower(*place).compile().memory_analysis()
    return {"cache_bytes": cache, "scratch_bytes": memory.temp_size_in_bytes}


def training_with_activations_on_the_host(mesh: Mesh) -> dict[str, int]:
    """Bytes of a device's memory on the host, and of what each device's rows keep there."""
    config = dataclasses.replace(config_of(2, 2, 128), num_hidden_layers=8)
    rows, tokens = 4, 256
    spec = StepSpec(
        config,
        1,
        precision=BFLOAT16,
        dropout=0.1,
        remat="offload",
        longest=tokens,
        kernels=Kernels.of_platform("tpu"),
        mesh=mesh,
    )
    optimizer = make_optimizer(OptimizerSpec(name="adafactor"), 10)
    state = abstract_state(spec, optimizer)
    places = abstract(mesh, P(None, ("data", "fsdp")), "int32", 1, rows, tokens)
    mask = abstract(mesh, P(None, ("data", "fsdp")), bool, 1, rows, tokens)
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = make_train_step(spec, optimizer)
    batch = Batch(places, places, places, places, places, mask, places)
    memory = step.lower(state, batch, key).compile().memory_analysis()
    # bfloat16: q, k, v and context are cut along tensor, the sum after attention is whole; float32:
    # the sums of the softmax.
    heads = config.num_attention_heads // mesh.shape["tensor"]
    values = 2 * (4 * heads * config.head_dim + config.hidden_size) + 4 * heads
    mine = rows * tokens // (mesh.shape["data"] * mesh.shape["fsdp"])
    return {
        "host_bytes": memory.host_temp_size_in_bytes,
        "kept_bytes": mine * values * config.num_hidden_layers,
    }


def main(topology: str) -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices[:4]).reshape(2, 1, 2), ("data", "fsdp", "tensor"))
    for model, heads in HEADS.items():
        for name, function, arguments in attention_programs(mesh, *heads):
            start = time.perf_counter()
            jax.jit(function).lower(*arguments).compile()
            seconds = round(time.perf_counter() - start, 1)
            print(json.dumps({"model": model, "program": name, "seconds": seconds}), flush=True)
        memory = decoding_of_a_layer(devices[0], *heads)
        print(json.dumps({"model": model, "program": "sampling", **memory}), flush=True)
    memory = training_with_activations_on_the_host(mesh)
    print(json.dumps({"program": "offload", **memory}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
