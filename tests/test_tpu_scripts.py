"""The scripts for Cloud TPU: if these fail, users pay for machines on which nothing starts.

The machines are folders here, and `gcloud` and each `python3` a small program of this file.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = ("bash", "cat", "dirname", "env", "git", "gzip", "hostname", "mkdir", "mktemp", "rm")
TOOLS += ("tar", "touch")
INSTALL = ["-m", "pip", "install", "--quiet", "--constraint", "constraints.txt"]
INSTALL += ["--editable", ".[tpu]"]

# A Python of another version. What it installs is another one, and a program that notes its call.
PYTHON = """#!{real}
import json, os, pathlib, shutil, sys

sys.version_info = {version}
if {version} < (3, 11) or not {has_venv}:
    sys.modules["ensurepip"] = None
if not {has_pip}:
    sys.modules["pip"] = None
if sys.argv[1] == "-c":
    exec(sys.argv[2])
elif sys.argv[1:3] == ["-m", "venv"]:
    folder = pathlib.Path(sys.argv[-1])
    if "--clear" in sys.argv:
        shutil.rmtree(folder, ignore_errors=True)
    (folder / "bin").mkdir(parents=True)
    shutil.copy(sys.argv[0], folder / "bin" / "python")
    shutil.copy(pathlib.Path(sys.argv[0]).with_name("humpback.txt"), folder / "bin" / "humpback")
else:
    note = {{"python": {version}, "call": sys.argv[1:], "in": os.getcwd()}}
    with open(os.environ["NOTES"], "a") as notes:
        notes.write(json.dumps(note) + "\\n")
"""
HUMPBACK = """#!{real}
import json, os, sys

joins = os.environ.get("HUMPBACK_DISTRIBUTED")
note = {{"humpback": sys.argv[1:], "in": os.getcwd(), "joins": joins}}
with open(os.environ["NOTES"], "a") as notes:
    notes.write(json.dumps(note) + "\\n")
"""
# Each folder of $HOSTS is a host. What is not shared lies in the host's own folder.
GCLOUD = """#!{real}
import json, os, pathlib, shutil, subprocess, sys

with open(os.environ["NOTES"], "a") as notes:
    notes.write(json.dumps({{"gcloud": sys.argv[1:]}}) + "\\n")
words = [word for word in sys.argv[4:] if not word.startswith("--")]
flags = dict(word[2:].split("=", 1) for word in sys.argv[4:] if word.startswith("--"))
hosts = sorted(pathlib.Path(os.environ["HOSTS"]).iterdir())
failed = 0
for host in hosts if flags["worker"] == "all" else [hosts[int(flags["worker"])]]:
    if words[0] == "scp":
        shutil.copy(words[1], host / words[2].split(":")[1])
    else:
        command = flags["command"]
        for folder in os.environ.get("UNSHARED", "").split():
            command = command.replace(folder, str(host) + folder)
        environment = {{**os.environ, "HOME": str(host)}}
        failed |= subprocess.run(["bash", "-c", command], cwd=host, env=environment).returncode
sys.exit(failed)
"""


class Machines:
    """A clone, two hosts, a folder of programs that hides all others, and notes of their calls."""

    def __init__(self, folder: Path) -> None:
        self.clone, self.hosts = folder / "a clone", folder / "hosts"
        self.programs, self.notes_file = folder / "programs", folder / "notes.jsonl"
        for made in (self.clone, self.programs, self.hosts / "0", self.hosts / "1"):
            made.mkdir(parents=True)
        for name in TOOLS:
            (self.programs / name).symlink_to(shutil.which(name) or name)
        shutil.copytree(ROOT / "tpu_scripts", self.clone / "tpu_scripts")
        for name in ("constraints.txt", ".gitignore"):
            shutil.copy(ROOT / name, self.clone)
        self.program("gcloud", GCLOUD)
        (self.programs / "humpback.txt").write_text(HUMPBACK.format(real=sys.executable))
        (self.programs / "humpback.txt").chmod(0o755)

    def program(self, name: str, text: str, **fields: object) -> None:
        path = self.programs / name
        path.write_text(text.format(real=sys.executable, **fields))
        path.chmod(0o755)

    def python(self, name: str, minor: int, has_venv: bool = True, has_pip: bool = True) -> None:
        fields = {"version": (3, minor, 0), "has_venv": has_venv, "has_pip": has_pip}
        self.program(name, PYTHON, **fields)

    def call(self, script: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": str(self.programs),
            "HOME": str(self.hosts / "0"),
            "HOSTS": str(self.hosts),
            "NOTES": str(self.notes_file),
            **variables,
        }
        return subprocess.run(
            ["bash", f"tpu_scripts/{script}", *words],
            cwd=self.clone,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def notes(self, kind: str) -> list[dict[str, object]]:
        if not self.notes_file.exists():
            return []
        found = map(json.loads, self.notes_file.read_text().splitlines())
        return [note for note in found if kind in note]


@pytest.fixture
def machines(tmp_path: Path) -> Machines:
    return Machines(tmp_path)


def test_a_stock_tpu_image_whose_python3_is_3_10_installs_nothing(machines: Machines) -> None:
    machines.python("python3", 10)
    machines.python("python3.12", 12)
    done = machines.call("run_on_vm.sh", "--config=configs/tiny.py", "--workdir=a run")
    assert done.returncode == 0, done.stderr
    (installed,) = machines.notes("python")
    assert installed["python"] == [3, 12, 0]
    assert installed["call"] == INSTALL
    (run,) = machines.notes("humpback")
    assert run["humpback"] == ["run", "--config=configs/tiny.py", "--workdir=a run"]
    assert run["joins"] is None


def test_an_environment_that_an_older_python_made_is_kept(machines: Machines) -> None:
    machines.python("python3", 10)
    old = machines.clone / ".venv" / "bin"
    old.mkdir(parents=True)
    shutil.copy(machines.programs / "python3", old / "python")
    machines.python("python3.11", 11)
    assert machines.call("run_on_vm.sh").returncode == 0
    assert machines.notes("python")[0]["python"] == [3, 11, 0]


def test_a_good_environment_is_made_anew_by_every_call(machines: Machines) -> None:
    machines.python("python3", 13)
    assert machines.call("run_on_vm.sh").returncode == 0
    kept = machines.clone / ".venv" / "kept"
    kept.touch()
    assert machines.call("run_on_vm.sh").returncode == 0
    assert kept.exists()


def test_an_environment_without_pip_stays_without(machines: Machines) -> None:
    """What `python3 -m venv` leaves behind where python3-venv is missing."""
    machines.python("broken", 12, has_pip=False)
    half = machines.clone / ".venv" / "bin"
    half.mkdir(parents=True)
    shutil.copy(machines.programs / "broken", half / "python")
    machines.python("python3", 12)
    assert machines.call("run_on_vm.sh").returncode == 0
    assert (machines.clone / ".venv" / "bin" / "humpback").exists()


def test_uv_s_python_is_not_found_without_a_login_shell(machines: Machines) -> None:
    machines.python("python3", 10)
    machines.python("python3.12", 12)
    own = machines.hosts / "0" / ".local" / "bin"
    own.mkdir(parents=True)
    for name in ("python3.12", "humpback.txt"):
        shutil.move(machines.programs / name, own / name)
    assert machines.call("run_on_vm.sh").returncode == 0
    assert machines.notes("python")[0]["python"] == [3, 12, 0]


@pytest.mark.parametrize("has_venv", [True, False], ids=["too old", "without venv"])
def test_without_a_fitting_python_the_error_does_not_say_how_to_get_one(
    machines: Machines, has_venv: bool
) -> None:
    machines.python("python3", 10 if has_venv else 12, has_venv)
    done = machines.call("run_on_vm.sh", "--workdir=x")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "uv python install 3.12" in line and "PYTHON=" in line
    assert not (machines.clone / ".venv").exists()
    assert not machines.notes("humpback")


def test_a_python_that_was_named_is_not_taken(machines: Machines) -> None:
    machines.python("python3", 11)
    machines.python("mine", 13)
    assert machines.call("run_on_vm.sh", PYTHON="mine").returncode == 0
    assert machines.notes("python")[0]["python"] == [3, 13, 0]


def on_a_slice(machines: Machines) -> None:
    machines.python("python3", 10)
    machines.python("python3.12", 12)
    for command in (["init", "--quiet"], ["add", "tpu_scripts", ".gitignore"]):
        subprocess.run(["git", *command], cwd=machines.clone, check=True)
    (machines.clone / "my_config.py").write_text("mine")  # not yet known to git
    (machines.clone / "runs").mkdir()
    (machines.clone / "runs" / "large").write_text("ignored by git")


def test_only_one_host_of_a_slice_is_set_up_and_none_joins_the_others(
    machines: Machines, tmp_path: Path
) -> None:
    on_a_slice(machines)
    out = tmp_path / "shared" / "tuned"
    words = ["train", "--data=my rows.jsonl", f"--out={out}", "--config.train.steps=2"]
    done = machines.call("run_on_slice.sh", "my-tpu", "europe-west4-b", *words)
    assert done.returncode == 0, done.stderr
    for host, run, installed in zip(
        sorted(machines.hosts.iterdir()),
        machines.notes("humpback"),
        machines.notes("python"),
        strict=True,
    ):
        assert run == {"humpback": words, "in": str(host / "humpback_jax"), "joins": "1"}
        assert installed["python"] == [3, 12, 0] and installed["call"] == INSTALL
        assert installed["in"] == str(host / "humpback_jax")
        assert (host / "humpback_jax" / "my_config.py").exists()
        assert not (host / "humpback_jax" / "runs").exists()
    calls = [note["gcloud"] for note in machines.notes("gcloud")]
    for call in calls:
        assert isinstance(call, list)
        assert call[:3] == ["compute", "tpus", "tpu-vm"]
        assert "--zone=europe-west4-b" in call and any("my-tpu" in word for word in call)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("form", ["--out={}", "--out {}"])
def test_hosts_that_do_not_share_the_output_train_until_the_first_save(
    machines: Machines, tmp_path: Path, form: str
) -> None:
    on_a_slice(machines)
    flags = form.format(f"{tmp_path}/mine/scores.jsonl").split()
    done = machines.call(
        "run_on_slice.sh", "tpu", "zone", "score", *flags, UNSHARED=f"{tmp_path}/mine"
    )
    assert done.returncode != 0
    assert "does not see" in done.stderr and "shared" in done.stderr
    assert not machines.notes("humpback")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tpu", "zone"], "usage"),
        (["tpu", "zone", "run", "--out=/mnt/x"], "train, sample and score"),
        (["tpu", "zone", "train", "--data=x"], "needs --out"),
        (["tpu", "zone", "train", "--out=runs/tuned"], "absolute"),
        (["tpu", "zone", "train", "--out=gs://bucket/tuned"], "buckets"),
        (["tpu", "zone", "train", "--data", "web=gs://b/x", "--out=/mnt/x"], "buckets"),
    ],
)
def test_what_no_slice_can_do_is_found_after_the_installation(
    machines: Machines, words: list[str], message: str
) -> None:
    on_a_slice(machines)
    done = machines.call("run_on_slice.sh", *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert not machines.notes("gcloud")


def test_a_model_in_a_bucket_is_refused_though_it_can_be_read(
    machines: Machines, tmp_path: Path
) -> None:
    on_a_slice(machines)
    words = ["train", "--model=gs://bucket/llama", f"--out={tmp_path}/shared"]
    assert machines.call("run_on_slice.sh", "tpu", "zone", *words).returncode == 0


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "tpu_scripts").iterdir()))
def test_a_script_does_not_parse(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / "tpu_scripts" / script)], check=True)
