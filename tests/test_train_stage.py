"""The stage that trains: if these fail, a run leaves out in silence what it was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_run import tiny_config

from humpback_jax.loop import opened
from humpback_jax.models import holds_checkpoint, load_model
from humpback_jax.records import Example, Message
from humpback_jax.stages.texts import render
from humpback_jax.stages.train import train_stage


def trained(root: Path, *, fresh: bool = False, **settings: Any) -> tuple[list[str], list[str]]:
    """(what M_0 of the run says about epochs, the epochs that have checkpoints)."""
    config, said = tiny_config(), list[str]()
    config.train.update({"eval_every": 0, "resume_every": 0, **settings})
    with opened(config, root / "run", fresh=fresh, say=said.append) as context:
        model = train_stage(context, "round_0/M_0", context.seed[:6], "forward", [], "S_a")
    made = sorted((root / "run" / model.path).glob("epoch_*"))
    assert all(holds_checkpoint(folder) for folder in made)
    return [line for line in said if "checkpoint_epochs" in line], [folder.name for folder in made]


def test_epochs_that_a_finished_model_lacks_are_left_out_in_silence(tmp_path: Path) -> None:
    assert trained(tmp_path, steps=3) == ([], [])  # 12 draws of 6 examples
    (said,), made = trained(tmp_path, steps=3, checkpoint_epochs=True)
    assert made == []
    assert "round_0/M_0: epochs 1, 2 " in said and "--fresh" in said
    again = trained(tmp_path, steps=3, checkpoint_epochs=True, fresh=True)
    assert again == ([], ["epoch_1", "epoch_2"])


def test_m_yx_learns_to_write_an_instruction_that_its_text_alone_does_not_answer() -> None:
    """The last pair of a conversation wants the turns before it."""
    turns = ("user", "When do bears sleep?"), ("assistant", "In winter."), ("user", "And bees?")
    messages = [Message("system", "Be brief."), *(Message(*turn) for turn in turns)]
    talk = Example("a", (*messages, Message("assistant", "In winter, too.")), "seed")
    model = load_model("tiny-random")
    ((name, backward),) = render(model.template, [talk], "backward")
    expected = model.template.backward("In winter.", "When do bears sleep?")
    assert (name, backward.text, backward.spans) == ("a", expected.text, expected.spans)
    ((_, forward),) = render(model.template, [talk], "forward")
    assert len(forward.spans) == 2, "forwards, every answer is learnt"
