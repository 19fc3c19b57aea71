"""Going on from what a stopped run left: it has to fit, and a bad moment must not cost it.

If these fail, a run that just fits into memory cannot be resumed, or starts over although its
states are whole.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from test_trainer import EXAMPLES, SPEC, VARIANTS, Stop, base, step_spec, stop_after
from tiny_llama import from_torch, torch_llama

import humpback_jax
from humpback_jax.checkpoint import ResumeFolder
from humpback_jax.parallel.mesh import make_mesh, parse_mesh
from humpback_jax.training.optimizer import make_optimizer
from humpback_jax.training.state import abstract_state, initial_state
from humpback_jax.training.trainer import train

PACKAGE = str(Path(humpback_jax.__file__).parent)


class Peak:
    """The most that live arrays have held, over what they held at first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._before, self.bytes = self._held(), 0
        load = ocp.load

        def measured(*arguments: Any) -> Any:
            self.measure()
            return load(*arguments)

        monkeypatch.setattr(ocp, "load", measured)
        sys.setprofile(self._returns)

    def _returns(self, frame: Any, event: str, value: Any) -> None:
        if event == "return" and frame.f_code.co_filename.startswith(PACKAGE):
            self.measure()

    def measure(self) -> None:
        self.bytes = max(self.bytes, self._held() - self._before)

    @staticmethod
    def _held() -> int:
        # One buffer may have several arrays.
        return sum({a.unsafe_buffer_pointer(): a.nbytes for a in jax.live_arrays()}.values())


@pytest.mark.parametrize(
    ("layout", "select", "most"),
    # Unrolled layers are stacked when they are saved, here the best parameters of step 3.
    [
        ("scan", "last", 1.2),
        ("scan", "best", 1.2),
        ("unrolled", "last", 1.2),
        ("unrolled", "best", 1.4),
    ],
)
def test_a_run_that_just_fits_cannot_be_resumed(
    layout, select, most, tmp_path, monkeypatch
) -> None:
    """Two states at once, the fresh one and the one that is read, would not fit."""
    config, params = from_torch(torch_llama(num_hidden_layers=4))
    spec = dataclasses.replace(SPEC, steps=3, resume_every=2, eval_every=2)
    spec = dataclasses.replace(spec, layout=layout, select=select)
    arguments: dict[str, Any] = {"validation": EXAMPLES[:2], "resume": ResumeFolder(tmp_path)}
    with pytest.raises(Stop):
        train(config, params, EXAMPLES, spec, **arguments, on_metrics=stop_after(3))
    state_bytes = 3 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    peak = Peak(monkeypatch)
    try:
        done = train(config, params, EXAMPLES, spec, **arguments)
    finally:
        sys.setprofile(None)
    assert [row["step"] for row in done.history if "loss" in row] == [3]
    assert 0.95 * state_bytes < peak.bytes < most * state_bytes


MESHES = {"alone": None, "mesh": "data=1,fsdp=1,tensor=1"}


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("variant", ["full", "full_scan", "adapter", "adapter_scan"])
def test_what_is_read_has_another_form_than_what_is_trained(variant, mesh, optimizer) -> None:
    """Shapes tell where a state goes, before there is one."""
    changes = dict(VARIANTS[variant])
    changes["optimizer"] = dataclasses.replace(
        changes.get("optimizer", SPEC.optimizer), name=optimizer
    )
    spec = dataclasses.replace(SPEC, **changes)
    shape = MESHES[mesh] and parse_mesh(MESHES[mesh])
    step = dataclasses.replace(step_spec(spec), mesh=shape and make_mesh(shape, jax.devices()[:1]))
    made = make_optimizer(spec.optimizer, spec.steps)
    expected = initial_state(step, base()[1], made, spec.seed)._replace(frozen={})
    found = abstract_state(step, made)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.sharding.is_equivalent_to(theirs.sharding, theirs.ndim)
