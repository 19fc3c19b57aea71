"""Splits of data sets that TensorFlow Datasets has prepared, read without TensorFlow.

`FOLDER/SPLIT` names a split, FOLDER being the one of a version (`NAME/CONFIG/1.0.0`), where
`features.json` lies; FOLDER alone is its split "train".
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from humpback_jax.errors import HumpbackError

FEATURES = "features.json"
READABLE = "array_record"  # the one format that TFDS reads, and writes, without TensorFlow


def is_split(path: Path) -> bool:
    """Whether a path names a data set, or a split of one (which need not exist)."""
    if (path / FEATURES).is_file():
        return True
    return (path.parent / FEATURES).is_file() and not path.is_file()


def info_file(path: Path) -> Path:
    """The file of the data set to which a split belongs that is written when its data are whole."""
    folder = path if (path / FEATURES).is_file() else path.parent
    return folder / "dataset_info.json"


def split_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, row) in the order of the files; a row not in UTF-8 comes as its `ValueError`.

    Texts are str, sequences lists, and sequences of named fields lists of dicts, as in JSON.

    Raises:
      HumpbackError: no such split, another file format, or damaged files.
    """
    import tensorflow_datasets as tfds

    folder = info_file(path).parent
    split = "train" if folder == path else path.name
    try:
        builder = tfds.builder_from_directory(str(folder))
    except Exception as error:  # TFDS has no class of its own for what may be wrong here
        raise HumpbackError(f"{folder}: not a readable TFDS data set ({error}).") from error
    if split not in builder.info.splits:
        known = ", ".join(sorted(builder.info.splits))
        raise HumpbackError(f"{folder} has no split {split!r}; it has: {known}.")
    found = builder.info.file_format.value
    if found != READABLE:
        raise HumpbackError(
            f"{folder} is stored as {found}, which takes TensorFlow to read. Prepare it with "
            f'tfds.builder(NAME, file_format="{READABLE}").download_and_prepare().'
        )
    rows = builder.as_data_source(split)
    for number in range(len(rows)):
        place = f"row {number + 1}"
        try:
            row = rows[number]
        except Exception as error:  # what a damaged file raises depends on where it is damaged
            raise HumpbackError(
                f"{folder}, split {split!r}, {place}: damaged ({error})."
            ) from error
        yield place, _parsed(row, builder.info.features)


def _parsed(row: Any, features: Any) -> Any:
    try:
        return _plain(row, features)
    except UnicodeDecodeError as error:
        return error


def _plain(value: Any, feature: Any) -> Any:
    """A value as JSON would have it; `feature` says which sequences TFDS keeps by columns."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.FeaturesDict):
        return {name: _plain(value[name], feature[name]) for name in feature}
    if isinstance(feature, tfds.features.Dataset):
        return [_plain(item, feature.feature) for item in value]
    if isinstance(feature, tfds.features.Sequence):
        return _sequence(value, feature.feature)
    if isinstance(value, bytes):
        return value.decode()
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _sequence(value: Any, item: Any) -> list[Any]:
    import tensorflow_datasets as tfds

    if not isinstance(item, tfds.features.FeaturesDict):
        return [_plain(each, item) for each in value]
    columns = [_sequence(value[name], item[name]) for name in item]
    return [dict(zip(item, fields, strict=True)) for fields in zip(*columns, strict=True)]
