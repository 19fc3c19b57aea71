"""Data sets of TFDS: if these fail, who prepared one must convert it, or install TensorFlow."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from humpback_jax.corpus.documents import read_documents
from humpback_jax.errors import HumpbackError
from humpback_jax.records import Example
from humpback_jax.rows import read_examples, write_rows
from humpback_jax.stages.sources import packaged_pairs

TEXT = tfds.features.Text
TURN = {"role": TEXT(), "content": TEXT()}


class Pairs(tfds.core.GeneratorBasedBuilder):
    """The packaged pairs, as two columns and as conversations in both forms that TFDS has."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "id": TEXT(),
            "instruction": TEXT(),
            "output": TEXT(),
            "columns": tfds.features.Sequence(TURN),
            "rows": tfds.features.Dataset(TURN),
            "words": tfds.features.Sequence(TEXT()),
            "place": tfds.features.Scalar(np.int64),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(packaged_pairs("train")[:20]),
            "heldout": self._generate_examples(packaged_pairs("heldout")[:3]),
        }

    def _generate_examples(self, pairs: list[Example]):
        for place, pair in enumerate(pairs):
            turns = [{"role": m.role, "content": m.content} for m in pair.messages]
            yield (
                pair.id,
                {
                    "id": pair.id,
                    "instruction": pair.instruction,
                    "output": pair.response,
                    "columns": turns,
                    "rows": turns,
                    "words": pair.response.split()[:2],
                    "place": place,
                },
            )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tfds")
    Pairs(data_dir=str(root), file_format="array_record").download_and_prepare()
    return root / "pairs" / "1.0.0"


def by_id(examples: list[Example]) -> dict[str, Example]:
    return {example.id: example for example in examples}


def test_a_split_holds_the_same_pairs_as_a_file_of_rows(prepared):
    for path, part, count in ((prepared, "train", 20), (prepared / "heldout", "heldout", 3)):
        pairs, report = read_examples(path, "seed")
        assert report.forms == {"instruction+output": count}
        wanted = packaged_pairs(part)[:count]
        wanted = [dataclasses.replace(pair, source="seed") for pair in wanted]
        assert by_id(pairs) == by_id(wanted)


def test_a_split_keeps_conversations_numbers_and_lists(prepared):
    from humpback_jax.row_files import raw_rows

    rows = [row for _, row in raw_rows(prepared)]
    assert [row["id"] for row in rows] != [] and len({row["id"] for row in rows}) == 20
    pairs = by_id(packaged_pairs("train")[:20])
    for row in rows:
        turns = [{"role": m.role, "content": m.content} for m in pairs[row["id"]].messages]
        assert row["columns"] == turns
        assert row["rows"] == turns
        assert row["words"] == pairs[row["id"]].response.split()[:2]
        assert type(row["place"]) is int
        json.dumps(row)


def test_a_split_is_read_without_tensorflow(prepared):
    program = (
        "import sys; from pathlib import Path; from humpback_jax.rows import read_examples; "
        f"print(len(read_examples(Path({str(prepared)!r}), 'seed')[0])); "
        "print('tensorflow' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["20", "False"]


def test_training_takes_a_split_and_makes_its_tokens_anew_when_the_data_set_changes(
    prepared, tmp_path, capsys
):
    from humpback_jax.cli import main

    arguments = ["train", "--model=tiny-random", f"--data=web={prepared}", "--config.train.steps=1"]
    arguments += [f"--out={tmp_path / 'out'}", f"--tokens={tmp_path / 'tokens'}"]
    arguments += ["--config.train.on_long=truncate", f"--heldout={prepared / 'heldout'}"]
    arguments += ["--config.train.eval_every=1"]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["sources"]["web"]["examples"] == 20
    (prepared / "dataset_info.json").touch()
    arguments[3] = f"--out={tmp_path / 'again'}"
    assert main(arguments) == 0
    assert len(list((tmp_path / "tokens").iterdir())) == 2


def test_documents_of_a_corpus_may_lie_in_a_split(tmp_path):
    texts = [{"id": str(n), "text": f"Text {n}.\r\nSecond line é."} for n in range(4)]
    write_rows(tmp_path / "texts.jsonl", texts)

    class Pages(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("2.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"id": TEXT(), "text": TEXT()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from ((row["id"], row) for row in texts)

    Pages(data_dir=str(tmp_path / "tfds"), file_format="array_record").download_and_prepare()
    split = tmp_path / "tfds" / "pages" / "2.0.0" / "train"
    found = {d.id: d.text for d in read_documents([str(split)])}
    assert found == {d.id: d.text for d in read_documents([str(tmp_path / "texts.jsonl")])}


def test_a_split_that_is_not_there_is_named_with_those_that_are(prepared):
    with pytest.raises(HumpbackError, match=r"no split 'test'; it has: heldout, train"):
        read_examples(prepared / "test", "seed")


def test_a_data_set_for_tensorflow_says_how_to_prepare_another(prepared, tmp_path):
    other = copy_of(prepared, tmp_path)
    info = json.loads((other / "dataset_info.json").read_text())
    (other / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    with pytest.raises(HumpbackError, match=r"stored as tfrecord.*file_format=\"array_record\""):
        read_examples(other, "seed")


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json", "pairs-train"])
def test_a_damaged_data_set_is_named(prepared, tmp_path, name):
    other = copy_of(prepared, tmp_path)
    (file,) = other.glob(f"{name}*")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(HumpbackError, match=str(other)):
        read_examples(other, "seed")


def copy_of(folder: Path, where: Path) -> Path:
    return Path(shutil.copytree(folder, where / "copy"))
