"""The configuration of a run: defaults, config files with arguments, and what is checked of it.

Every field stands here once, with the paper's value or a marked choice of ours. A config file
(`configs/*.py`) starts from `default_config()` and changes what it is about.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from humpback_jax.errors import HumpbackError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# Humpback, table 18: (examples N, batch, steps); a data set takes the first row with N >= its size.
STEP_TABLE = (
    (100, 8, 30),
    (800, 8, 300),
    (1600, 8, 600),
    (2999, 8, 1200),  # ours: the batch that section 3.1 gives below 3,000, and 3.2 epochs
    (3200, 32, 500),
    (6400, 32, 600),
    (12800, 32, 600),
    (25600, 32, 1200),
    (51200, 32, 1600),
)


def default_config() -> ConfigDict:
    """The paper's settings (sections 2 and 3.1); choices where it is silent are marked "ours"."""
    from ml_collections import ConfigDict

    return ConfigDict(
        {
            "name": "humpback",
            "seed": 0,
            "rounds": 2,
            "base": {"model": "smollm2-135m-instruct", "template": "auto"},
            "data": {
                "seed": "builtin",  # a file of pairs, or the packaged set
                "heldout": "builtin",  # a file of pairs, or the packaged held-out part
                "validation": "",  # a file of pairs that eval_every measures; "": the held-out ones
                "seed_limit": 0,  # 0: all
                "skip_bad": False,
            },
            "corpus": {
                "documents": ("pydoc_topics",),
                "skip_bad": False,  # count unreadable documents, go on
                "limit": 0,  # documents; 0: all
                "segments": 0,  # chosen among the kept ones by a hash of their ids; 0: all
                "min_chars": 600,  # appendix E
                "max_chars": 3000,  # appendix E
            },
            "backward": train_section(),
            "train": train_section(),
            "augment": {
                "temperature": 0.7,  # section 3.1
                "top_p": 0.9,
                "top_k": 0,
                "max_new_tokens": 512,  # ours, after the unofficial re-implementation
                "min_chars": 10,
                "max_chars": 800,
                "shard_rows": 256,
            },
            "curate": {
                "curator": "rubric",
                "also": (),  # further curators, for the report
                "also_limit": 0,  # pairs that the further curators see; 0: all
                "select": "absolute",  # absolute | top_fraction | count
                "threshold": 5.0,  # A_5
                "fraction": 0.083,  # the paper's share of A_5
                "count": 0,
                "temperature": 0.7,
                "top_p": 0.9,
                "max_new_tokens": 512,
                "shard_rows": 256,
            },
            "meters": {
                "action": "stop",  # stop | warn
                "pairs": 32,  # held-out pairs that the meters use
                "curators": (),  # measured beside the loop's own
                "min_auc": 0.6,
                "min_lift": 0.0,  # nats a token
                "max_copy_rate": 0.8,
                "max_echo_rate": 0.2,
                "min_pass_rate": 0.1,  # of generated instructions, through the gates of curation
            },
            "evaluate": {
                "tags": ("none", "S_a", "both"),
                "answers": 6,  # held-out instructions answered by every model, for the report
                "answer_tokens": 96,
            },
            "compute": {
                "precision": "auto",  # auto | float32 | bfloat16
                "batch_size": 16,  # rows decoded together, by each copy of the model
                "mesh": "auto",  # devices of all that computes: auto, or data=2,tensor=4
                "drafts": "auto",  # tokens guessed in each step: auto (where it pays), or N
                "memory_gb": 0.0,  # GiB of each device for weights and rows; 0: what it has
                "weights": "auto",  # auto | int8, of sampling and scoring
                "kv": "auto",  # auto | int8, the cache of sampling
            },
        },
        convert_dict=True,
    ).lock()


def train_section() -> dict[str, Any]:
    """Settings of one SFT run; the length is `steps`, or `epochs`, or else `step_table`."""
    return {
        "steps": 0,
        "epochs": 0.0,
        "step_table": STEP_TABLE,
        "batch_examples": 32,  # with the step table: its batch
        "row_tokens": 2048,
        "accumulation": 0,  # micro-batches; 0: on CPU one for each row, else 1
        "on_long": "drop",  # error | drop | truncate
        "mixture": (),  # e.g. web:weight=0.5:cap=1000; fields: training/mixture.py
        "learning_rate": 1e-5,
        "end_learning_rate": 9e-6,
        "schedule": "linear",  # linear | cosine | constant | wsd | inverse_sqrt
        "warmup_steps": 0,
        "decay_share": 0.1,  # the last part of the steps, in which the schedule "wsd" decays
        "optimizer": "adamw",  # adamw | adamw_bf16 | adafactor | lion; see docs/training.md
        "beta1": 0.9,
        "beta2": 0.95,
        "epsilon": 1e-8,
        "weight_decay": 0.1,
        "clip_norm": 1.0,  # 0: none
        "dropout": 0.1,
        "dropout_ramp": False,  # from 0 in the first layer to `dropout` in the last (LIMA)
        "neftune_alpha": 0.0,  # noise on the embeddings (NEFTune); 0: none
        "label_smoothing": 0.0,
        "z_loss": 0.0,
        "lora": {
            "rank": 0,  # 0: full tuning
            "alpha": 32.0,
            "dropout": 0.0,
            "targets": ("q", "v"),  # projections, all, or patterns like attn.*
            "scaling": "lora",  # lora: alpha / rank | rslora: alpha / sqrt(rank)
            "dora": False,
            "plus_ratio": 1.0,  # LoRA+: the learning rate of B by that of A
            "base": "auto",  # auto: float32 | int8, the frozen weights in training
        },
        "remat": "none",  # activations to compute again: none | full | named | offload
        "log_every": 1,
        "eval_every": 0,
        "resume_every": 0,
        "keep_resume": 2,  # states of an unfinished run
        "select": "last",  # last | best: by the loss on data.validation, every eval_every steps
        "spike_factor": 0.0,  # stop at a loss so many standard deviations up; 0: never
        "checkpoint_epochs": False,
    }


# Fields that change what is shown or kept, or the memory that is used, and no result but by
# rounding: no artifact depends on them, and a run goes on with others.
WITHOUT_EFFECT = (
    *("log_every", "eval_every", "resume_every", "keep_resume", "spike_factor"),
    *("checkpoint_epochs", "shard_rows", "accumulation", "remat"),
)

# Limits of numbers, by the name of the field; all others are at least 0.
POSITIVE = (
    *("max_chars", "row_tokens", "batch_examples", "log_every", "batch_size"),
    *("max_new_tokens", "answer_tokens", "shard_rows", "plus_ratio", "keep_resume"),
)
LEAST = dict.fromkeys(POSITIVE, 1) | {"pairs": 2}  # a shuffled pair needs another's instruction
SHARES = ("top_p", "fraction", "decay_share")
PARTS = ("dropout", "label_smoothing")
ANY_NUMBER = ("seed", "curate.threshold", "meters.min_lift")
NOT_EMPTY = ("evaluate.tags",)
FALLING = ("linear", "cosine", "wsd")  # schedules that end at `end_learning_rate`
# By `curate.select`, the field that says where it cuts.
CUTS = {"absolute": "threshold", "top_fraction": "fraction", "count": "count"}
DATA = ("data.seed", "data.heldout", "corpus.documents")  # a config may leave them to its user


def apply_tiny(config: ConfigDict) -> None:
    """Shrinks any experiment to a rehearsal: a random 2-layer model on bytes, seconds on a CPU.

    The curator becomes a likelihood one, selection the top fraction, and the meters only warn: a
    random model cannot pass them.
    """
    with config.unlocked():
        config.name = f"{config.name}-tiny"
        config.base.model = "tiny-random"
        config.base.template = "auto"
        config.data.seed_limit = 24
        config.data.update({key: "builtin" for key in ("seed", "heldout") if not config.data[key]})
        config.corpus.update({"documents": ("pydoc_topics",), "limit": 12, "segments": 16})
        config.corpus.max_chars = 800
        for section in (config.backward, config.train):
            section.update({"steps": 8, "epochs": 0.0, "batch_examples": 4, "row_tokens": 1024})
            section.update({"learning_rate": 1e-2, "end_learning_rate": 1e-2})
            section.update({"resume_every": 3, "eval_every": 4, "on_long": "drop"})
        config.backward.steps = 12
        config.augment.update({"max_new_tokens": 128, "min_chars": 0, "shard_rows": 4})
        config.augment.update({"temperature": 1.0, "top_p": 1.0})  # else bytes repeat for ever
        config.curate.update({"curator": "pmi", "also": ("rubric_likelihood",), "also_limit": 0})
        config.curate.update({"select": "top_fraction", "fraction": 0.5, "shard_rows": 4})
        config.curate.max_new_tokens = 16
        config.meters.update({"action": "warn", "pairs": 4, "curators": ("rubric_likelihood",)})
        config.evaluate.update({"answers": 2, "answer_tokens": 16})
        config.compute.update({"precision": "float32", "batch_size": 4})


def load_config(reference: str) -> ConfigDict:
    """Loads `path/to/config.py[:arg,...]`; `overrides.apply_overrides` checks it.

    Raises:
      HumpbackError: the file is missing or fails, or an argument is unknown.
    """
    path_text, _, argument = reference.partition(":")
    path = Path(path_text)
    if not path.is_file():
        raise HumpbackError(f"--config={reference}: the file {path} does not exist.")
    spec = importlib.util.spec_from_file_location(f"humpback_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise HumpbackError(f"--config={reference}: {path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config: ConfigDict = module.get_config(*([argument] if argument else []))
    except HumpbackError:
        raise
    except Exception as error:
        raise HumpbackError(f"--config={reference}: {path} failed: {error!r}.") from error
    return config


def check_config(config: ConfigDict) -> None:
    """Refuses what a stage would refuse only after compute was spent, or take for something else.

    Raises:
      HumpbackError: an unknown or missing field, an unknown choice, a number out of range, or a
        threshold off its curator's scale; names the key.
    """
    from humpback_jax.training.mixture import parse_mixture

    _check_fields(config)
    for key, value in _leaves(config):
        name = key.rpartition(".")[2]
        if key in NOT_EMPTY and not value:
            raise HumpbackError(f"config.{key} is empty; it needs one entry at least.")
        for choice in value if isinstance(value, tuple) else (value,):
            known = _choices().get(key, _choices().get(name))
            if known is not None and choice not in known:
                raise HumpbackError(
                    f"config.{key}={choice!r} is unknown{nearest(str(choice), known)}; known: "
                    f"{', '.join(known)}."
                )
        if isinstance(value, int | float) and key not in ANY_NUMBER:
            _check_number(key, name, value)
    for name in ("backward", "train"):
        _check_rates(f"config.{name}", config[name])
        _check_lora(f"config.{name}.lora", config[name].lora)
        parse_mixture(config[name].mixture)
    if config.corpus.min_chars > config.corpus.max_chars:
        raise HumpbackError("config.corpus.min_chars is above config.corpus.max_chars.")
    _check_selection(config.curate)
    for name in ("backward", "train"):
        if config[name].select == "best" and not config[name].eval_every:
            raise HumpbackError(
                f"config.{name}.select=best needs config.{name}.eval_every, at least 1."
            )


def check_data(config: ConfigDict) -> None:
    """Refuses a run of which the config does not say where its data are.

    Raises:
      HumpbackError: names the empty fields; `data.validation` is needed for `select=best` alone.
    """
    fields = dict(_leaves(config))
    missing = [f"--config.{key}=FILE" for key in DATA if not fields[key]]
    if missing:
        raise HumpbackError(f"{config.name} brings no data of its own: add {' '.join(missing)}.")
    for name in ("backward", "train"):
        if config[name].select == "best" and not config.data.validation:
            raise HumpbackError(
                f"config.{name}.select=best would choose weights on the held-out pairs, on which "
                "the run then reports: add --config.data.validation=FILE with other pairs."
            )


def _check_fields(config: ConfigDict) -> None:
    """Refuses a field that an unlocked section was given, which nothing reads, or has lost."""
    known, found = (dict(_leaves(section)) for section in (default_config(), config))
    for key in known:
        if found.get(key) is None:  # fields of every type can be set to None
            raise HumpbackError(
                f"config.{key} is missing; begin with default_config() and take nothing out of it."
            )
    for key in found:
        if key not in known:
            raise HumpbackError(
                f"config.{key} is unknown{nearest(key, list(known))}; correct or remove it."
            )


def _check_selection(section: ConfigDict) -> None:
    from humpback_jax.curators import SCALES

    if section.select == "count" and not section.count:
        raise HumpbackError("config.curate.select=count needs config.curate.count, at least 1.")
    scale = SCALES[section.curator]
    if section.select == "absolute" and not scale.holds(section.threshold):
        raise HumpbackError(
            f"config.curate.threshold={section.threshold!r} selects no pair or every one: the "
            f"curator {section.curator!r} gives {scale.text}. Choose a threshold among these, or "
            "set config.curate.select=top_fraction."
        )


def _check_rates(key: str, section: ConfigDict) -> None:
    last = section.end_learning_rate
    if section.schedule in FALLING and last > section.learning_rate:
        raise HumpbackError(
            f"{key}.end_learning_rate={last} is above {key}.learning_rate="
            f"{section.learning_rate}, from which the {section.schedule} schedule falls: set both."
        )


def _check_lora(key: str, section: ConfigDict) -> None:
    from humpback_jax.model.lora import lora_spec

    if section.rank:
        lora_spec(section.rank, section.alpha, section.dropout, section.targets)
        return
    unused = train_section()["lora"]
    given = [name for name, value in section.items() if value != unused[name]]
    if given:
        raise HumpbackError(f"{key}.{given[0]} has no effect without {key}.rank.")


def _check_number(key: str, name: str, value: float) -> None:
    if name in SHARES:
        fine, limits = 0 < value <= 1, "above 0 and at most 1"
    elif name in PARTS:
        fine, limits = 0 <= value < 1, "at least 0 and below 1"
    else:
        least = LEAST.get(name, 0)
        fine, limits = value >= least, f"at least {least}"
    if not fine:
        raise HumpbackError(f"config.{key}={value!r} must be {limits}.")


def _leaves(section: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    from ml_collections import ConfigDict

    for name, value in section.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@functools.cache
def _choices() -> dict[str, tuple[str, ...]]:
    """Known values by dotted key, or by the name of the field wherever it stands."""
    from humpback_jax.compute import FORMATS
    from humpback_jax.curators import CURATORS
    from humpback_jax.model.remat import REMATS
    from humpback_jax.text.template import TAG_TEXT
    from humpback_jax.training.optimizer import OPTIMIZERS, SCHEDULES

    return {
        "base.template": ("auto", "chat", "plain"),
        "curate.curator": CURATORS,
        "curate.also": CURATORS,
        "meters.curators": CURATORS,
        "curate.select": tuple(CUTS),
        "backward.select": ("last", "best"),
        "train.select": ("last", "best"),
        "meters.action": ("stop", "warn"),
        "evaluate.tags": tuple(TAG_TEXT),
        "compute.precision": ("auto", "float32", "bfloat16"),
        "compute.weights": FORMATS,
        "compute.kv": FORMATS,
        "on_long": ("error", "drop", "truncate"),
        "schedule": SCHEDULES,
        "scaling": ("lora", "rslora"),
        "base": ("auto", "int8"),
        "optimizer": OPTIMIZERS,
        "remat": REMATS,
    }


def arguments(argument: str, known: Sequence[str], where: str) -> list[str]:
    """Splits a config argument (`llama2_70b,tiny`) and checks each part."""
    parts = [part for part in argument.split(",") if part]
    for part in parts:
        if part not in known:
            raise HumpbackError(
                f"{where}: the argument {part!r} is unknown{nearest(part, known)}; "
                f"known: {', '.join(known)}."
            )
    return parts


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint at the known name that is most like this one, "" where none is."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def effective_fields(section: Any) -> dict[str, Any]:
    """A section as plain data, without the fields that change nothing in the result."""
    plain = section.to_dict() if hasattr(section, "to_dict") else dict(section)
    chosen_by_loss = ("eval_every",) if plain.get("select") == "best" else ()
    without = set(WITHOUT_EFFECT) - set(chosen_by_loss)
    return {name: value for name, value in plain.items() if name not in without}
