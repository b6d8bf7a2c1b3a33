"""The bundle on disk: its pinned format, its seals, and that a failed export leaves nothing behind."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import var_export.bundle
from bundle_format import PINNED, format_text
from var_deploy import staging
from var_deploy.bundle import Bundle
from var_deploy.cli import app
from var_deploy.errors import BundleError, CheckpointError
from var_export.bundle import bundle_from_checkpoint, write_bundle
from var_train.run_checkpoints import RunCheckpoints
from var_train.run_state import RunState

ROOT = Path(__file__).parents[2]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty directory to export into."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def refused(pair, out: Path, error: type[Exception] = BundleError, **options) -> str:
    """The message of an export that fails; it must be one line."""
    with pytest.raises(error) as refusal:
        bundle_from_checkpoint(pair[1], pair[2], out, **options)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


# Format ---------------------------------------------------------------------------------------------------------------


def test_format_is_the_pinned_one(tiny_bundle):
    got, pinned = format_text(tiny_bundle), PINNED.read_text(encoding="utf-8")
    assert json.loads(got) == json.loads(pinned), "see tests/golden/bundle_format.py"
    assert got == pinned, "the order of keys, graphs or weights changed: see tests/golden/bundle_format.py"


def test_manifest_is_stable_text(tiny_bundle):
    text = (tiny_bundle / "bundle.json").read_text(encoding="utf-8")
    assert Bundle.open(tiny_bundle).manifest.to_json() == text
    assert text.endswith("}\n")


def test_seals_are_those_of_the_files(tiny_bundle):
    listed = json.loads((tiny_bundle / "bundle.json").read_text())["files"]
    assert sorted([*listed, "bundle.json"]) == files(tiny_bundle)
    for name, seal in listed.items():
        content = (tiny_bundle / name).read_bytes()
        assert seal == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}, name


def test_source_names_the_checkpoints_and_their_digests(tiny_bundle, tiny_pair):
    source = Bundle.open(tiny_bundle).manifest.source
    for key, path in (("var", tiny_pair[1]), ("vqvae", tiny_pair[2])):
        assert source[key] == {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_two_exports_are_identical_byte_by_byte(tiny_bundle, tiny_pair, place):
    again = bundle_from_checkpoint(tiny_pair[1], tiny_pair[2], place / "again")
    assert files(again) == files(tiny_bundle)
    for name in files(again):
        assert (again / name).read_bytes() == (tiny_bundle / name).read_bytes(), name


def test_bundle_can_be_moved_and_read_by_others(tiny_bundle, place):
    moved = shutil.copytree(tiny_bundle, place / "moved")
    assert Bundle.open(moved).manifest == Bundle.open(tiny_bundle).manifest
    assert tiny_bundle.stat().st_mode & 0o777 == 0o755
    assert all(file.stat().st_mode & 0o444 for file in tiny_bundle.iterdir())


def test_class_names_licence_and_parent_directories(tiny_pair, place):
    names = [f"ziffer {i} ä" for i in range(10)]
    out = place / "not" / "there" / "yet"
    bundle_from_checkpoint(tiny_pair[1], tiny_pair[2], out, class_names=names, license_note="CC BY 4.0")
    manifest = Bundle.open(out).manifest
    assert manifest.class_names == tuple(names)
    assert manifest.license == "CC BY 4.0"


def test_progress_reaches_all_bytes_of_the_weights(tiny_pair, place):
    heard: list[tuple[str, int, int]] = []
    out = bundle_from_checkpoint(tiny_pair[1], tiny_pair[2], place / "b", progress=lambda *event: heard.append(event))
    done = [d for what, d, _ in heard if what == "weights.safetensors"]
    assert done == sorted(done)
    size = (out / "weights.safetensors").stat().st_size
    assert {total for _, _, total in heard} == {size}
    assert size - done[-1] == 8 + int.from_bytes((out / "weights.safetensors").read_bytes()[:8], "little")
    assert [what for what, _, _ in heard if what.endswith(".onnx")] == [
        graph.file for graph in Bundle.open(out).manifest.graphs.values()
    ]


# Checkpoints of our own runs ------------------------------------------------------------------------------------------

CARRIED = [f"Klasse {i}" for i in range(10)]


@pytest.fixture(scope="module")
def run_pair(tiny_checkpoints, tmp_path_factory) -> tuple[None, Path, Path]:
    """Checkpoint directories of a VAR run and a VQVAE run, with the weights of `tiny_pair`; read only."""
    place = tmp_path_factory.mktemp("runs")
    var, vqvae = tiny_checkpoints.models()
    of_var = RunState(models={"var": var}, values={"class_names": CARRIED})
    of_vqvae = RunState(
        models={"vqvae": vqvae, "discriminator": torch.nn.Linear(1, 1)}, values={"patch_nums": [1, 2, 3, 4]}
    )
    return None, *(
        RunCheckpoints(place / name / "checkpoints").save(1200, state)
        for name, state in (("var", of_var), ("vqvae", of_vqvae))
    )


def test_checkpoints_of_runs_become_the_same_bundle_with_their_class_names(tiny_bundle, run_pair, place):
    out = bundle_from_checkpoint(run_pair[1], run_pair[2], place / "b")
    assert [name for name in files(out) if name != "bundle.json"] == [
        name
        for name in files(tiny_bundle)
        if name != "bundle.json" and digest_of(out, name) == digest_of(tiny_bundle, name)
    ]
    manifest = Bundle.open(out).manifest
    assert manifest.class_names == tuple(CARRIED)
    for key, path in (("var", run_pair[1]), ("vqvae", run_pair[2])):
        digest = hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()
        assert manifest.source[key] == {"file": "step_00001200/manifest.json", "sha256": digest}


def digest_of(directory: Path, name: str) -> str:
    return hashlib.sha256((directory / name).read_bytes()).hexdigest()


def with_names(pair, directory: Path, names: list[str]) -> tuple[None, Path, Path]:
    """The pair with a VAR file that carries class names."""
    path = directory / "named.safetensors"
    save_file(load_file(pair[1]), path, metadata={"class_names": json.dumps(names)})
    return None, path, pair[2]


def test_class_names_of_the_file_are_taken_unless_others_are_given(tiny_pair, tmp_path, place):
    pair, other = with_names(tiny_pair, tmp_path, CARRIED), [str(i) for i in range(10)]
    bundle_from_checkpoint(pair[1], pair[2], place / "a")
    assert Bundle.open(place / "a").manifest.class_names == tuple(CARRIED)
    bundle_from_checkpoint(pair[1], pair[2], place / "b", class_names=other)
    assert Bundle.open(place / "b").manifest.class_names == tuple(other)


def test_bad_class_names_of_the_file_leave_nothing_and_may_be_replaced(tiny_pair, tmp_path, place):
    pair = with_names(tiny_pair, tmp_path, CARRIED[1:])
    message = refused(pair, place / "b", CheckpointError)
    assert message.startswith(
        f"{pair[1]}: its class_names: got 9, expected one for each of the model's 10 classes; give"
    )
    assert files(place) == []
    bundle_from_checkpoint(pair[1], pair[2], place / "b", class_names=CARRIED)
    assert Bundle.open(place / "b").manifest.class_names == tuple(CARRIED)


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_commands_take_checkpoints_of_runs(run_pair, tiny_bundle, place):
    pair = ["--var", run_pair[1], "--vae", run_pair[2]]
    assert command("export", *pair, "--out", place / "b").exit_code == 0
    assert Bundle.open(place / "b").manifest.class_names == tuple(CARRIED)
    (place / "names.txt").write_text("\n".join("abcdefghij"))
    assert command("export", *pair, "--classes", place / "names.txt", "--out", place / "c").exit_code == 0
    assert Bundle.open(place / "c").manifest.class_names == tuple("abcdefghij")
    verified = command("verify", tiny_bundle, *pair, "--class", 3, "--json")
    assert verified.exit_code == 0
    assert json.loads(verified.stdout)["passed"]


def test_inspect_of_checkpoints_of_runs(run_pair, tiny_pair):
    of_var, of_vqvae, of_file = (
        json.loads(command("inspect", path, "--json").stdout) for path in (*run_pair[1:], tiny_pair[1])
    )
    assert of_var["var"] == of_file["var"] | {"class_names": CARRIED}
    assert of_file["var"]["class_names"] is None
    assert of_var["memory"] == of_file["memory"]
    assert of_var["size"] == sum(file.stat().st_size for file in run_pair[1].iterdir())
    assert of_vqvae["vqvae"]["patch_nums"] == [1, 2, 3, 4]
    assert "var" not in of_vqvae
    assert "Klasse 9" in command("inspect", run_pair[1]).stdout


def test_inspect_of_a_run_says_which_checkpoint_to_give_and_of_a_directory_expects_a_bundle(run_pair, tmp_path):
    run = run_pair[1].parents[1]
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text("{}")
    said = command("inspect", tmp_path / "run").exception
    step = tmp_path / "run" / "checkpoints" / "step_00001200"
    assert str(said).endswith(f"the directory of a training run, expected a checkpoint; give {step}")
    assert isinstance(command("inspect", tmp_path).exception, BundleError)


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_existing_output_is_refused_and_untouched(tiny_pair, place, kind):
    out = place / "bundle"
    if kind == "directory":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(place / "nowhere")
    message = refused(tiny_pair, out)
    assert message == f"{out}: exists already; nothing is overwritten, choose another name or remove it"
    assert files(place) == ["bundle"]
    if kind == "directory":
        assert (out / "mine.txt").read_text() == "mine"
    elif kind == "file":
        assert out.read_text() == "mine"
    else:
        assert out.is_symlink()


def test_output_that_appears_meanwhile_is_not_overwritten(tiny_pair, place):
    out = place / "bundle"

    def make_it(what: str, done: int, total: int) -> None:
        if what == "decoder.onnx":
            out.mkdir()

    assert "exists already" in refused(tiny_pair, out, progress=make_it)
    assert files(place) == ["bundle"]
    assert files(out) == []


@pytest.mark.parametrize("count", [0, 9, 11])
def test_wrong_number_of_class_names_is_refused(tiny_pair, place, count):
    message = refused(tiny_pair, place / "b", CheckpointError, class_names=[str(i) for i in range(count)])
    assert message == f"{count} class names for a checkpoint of 10 classes; give one per class"
    assert files(place) == []


def test_bad_checkpoint_leaves_nothing(tiny_pair, place, tmp_path):
    state = torch.load(_nan_checkpoint(tiny_pair, tmp_path), weights_only=True)
    assert state["head.bias"].isnan().any()
    message = refused((None, tmp_path / "nan.pth", tiny_pair[2]), place / "deep" / "b", CheckpointError)
    assert "head.bias holds NaN or infinite values" in message
    assert files(place) == []


def _nan_checkpoint(pair, directory: Path) -> Path:
    from safetensors.torch import load_file

    state = load_file(pair[1])
    state["head.bias"][3] = float("nan")
    torch.save(state, directory / "nan.pth")
    return directory / "nan.pth"


def test_too_little_free_space_is_said_before_writing(tiny_pair, place, monkeypatch):
    usage = shutil.disk_usage(place)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2_000_000))
    monkeypatch.setattr(var_export.bundle, "write_weights", lambda *_: pytest.fail("started to write"))
    message = refused(tiny_pair, place / "b")
    assert message.startswith(f"{place / 'b'}: needs ")
    assert message.endswith(" MB, 2 MB are free on that disk; free space")
    assert files(place) == []


@pytest.mark.parametrize(
    ("number", "step"),
    [
        (errno.ENOSPC, "free space and export again"),
        (errno.EDQUOT, "free space and export again"),
        (errno.EFBIG, "free space and export again"),
        (errno.EIO, "choose another place"),
        (errno.EROFS, "choose another place"),
    ],
    ids=errno.errorcode.get,
)
def test_failure_in_the_middle_of_the_weights_leaves_nothing(tiny_pair, place, monkeypatch, number, step):
    error = OSError(number, "the reason")

    def fails_half_way(path, weights, layout, on_bytes):
        path.write_bytes(layout.header)
        assert len(files(place)) == 1  # the staging directory is there now
        raise error

    monkeypatch.setattr(var_export.bundle, "write_weights", fails_half_way)
    message = refused(tiny_pair, place / "b")
    assert message == f"{place / 'b'}: writing failed (the reason); {step}; nothing is left behind"
    assert files(place) == []


def test_failure_removes_the_parents_it_made(tiny_pair, place, monkeypatch):
    def fails(*_):
        raise OSError(errno.ENOSPC, "the reason")

    monkeypatch.setattr(var_export.bundle, "write_weights", fails)
    refused(tiny_pair, place / "new" / "deeper" / "b")
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug of ours"), MemoryError()], ids=repr)
def test_any_other_failure_leaves_nothing_and_is_not_disguised(tiny_pair, place, monkeypatch, error):
    def fails(what: str, done: int, total: int) -> None:
        if what == "scale_02.onnx":
            raise error

    with pytest.raises(type(error)):
        bundle_from_checkpoint(tiny_pair[1], tiny_pair[2], place / "b", progress=fails)
    assert files(place) == []


def test_parent_that_is_a_file_is_refused(tiny_pair, place):
    (place / "file").write_text("mine")
    message = refused(tiny_pair, place / "file" / "b")
    assert message.startswith(f"{place / 'file' / 'b'}: writing failed (")
    assert message.endswith("; choose another place; nothing is left behind")
    assert (place / "file").read_text() == "mine"


@pytest.mark.parametrize("length", [250, 300])
def test_name_that_is_too_long_is_refused(tiny_pair, place, length):
    message = refused(tiny_pair, place / ("x" * length))
    assert message.endswith(": writing failed (File name too long); choose another place; nothing is left behind")
    assert files(place) == []


def test_read_only_parent_is_refused(tiny_pair, place, monkeypatch):
    def denied(**_):  # permission bits do not stop a superuser, under whom tests may run
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(staging.tempfile, "mkdtemp", denied)
    message = refused(tiny_pair, place / "b")
    assert message == f"{place / 'b'}: writing failed (Permission denied); choose another place; nothing is left behind"
    assert files(place) == []


# Real failures, in a process of their own -----------------------------------------------------------------------------


def script(body: str, *arguments: object) -> list[str]:
    head = f"""
        import sys
        sys.path[:0] = {[str(ROOT), str(ROOT / "export"), str(ROOT / "train"), str(ROOT / "kernels")]!r}
        from var_deploy.errors import VarDeployError
        from var_export.bundle import bundle_from_checkpoint
        var, vqvae, out = sys.argv[1:]
    """
    return [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(body), *map(str, arguments)]


def test_file_size_limit_of_the_system_leaves_nothing(tiny_pair, place):
    body = """
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        try:
            bundle_from_checkpoint(var, vqvae, out)
        except VarDeployError as error:
            print(f"{type(error).__name__}: {error}", end="")
    """
    done = subprocess.run(
        script(body, *tiny_pair[1:], place / "b"), capture_output=True, text=True, timeout=120, check=True
    )
    expected = f"{place / 'b'}: writing failed (File too large); free space and export again; nothing is left behind"
    assert done.stdout == f"BundleError: {expected}"
    assert files(place) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_killed_export_never_leaves_the_final_name(tiny_pair, place, number):
    body = """
        import signal, time
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in children of a background shell
        def stop_there(what, done, total):
            if what == "scale_01.onnx":
                print("writing", flush=True)
                time.sleep(100)
        bundle_from_checkpoint(var, vqvae, out, progress=stop_there)
    """
    command = script(body, *tiny_pair[1:], place / "b")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout.readline() == "writing\n"
            time.sleep(0.1)  # into the sleep, where Python handles a signal at once
            process.send_signal(number)
            process.wait(timeout=60)
        finally:
            process.kill()
    assert process.returncode != 0
    if number == signal.SIGINT:
        assert files(place) == []
    else:  # no chance to clean up: what is left is hidden and says what it is
        assert [name.startswith(".b.partial-") for name in files(place)] == [True]


def test_terminated_command_leaves_nothing(tiny_pair, place):
    body = """
        import time
        import var_deploy.cli, var_export.bundle
        def stop_there(*_):
            print("writing", flush=True)
            time.sleep(100)
        var_export.bundle.write_weights = stop_there
        sys.argv = ["var-deploy", "export", "--var", var, "--vae", vqvae, "--out", out]
        var_deploy.cli.main()
    """
    command = script(body, *tiny_pair[1:], place / "b")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout.readline() == "writing\n"
            time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 143
    assert files(place) == []


def test_leftover_of_a_killed_export_does_not_disturb_the_next_one(tiny_checkpoints, place):
    (place / ".b.partial-abc").mkdir()
    write_bundle(tiny_checkpoints, place / "b")
    Bundle.open(place / "b")
    assert files(place) == [".b.partial-abc", "b"]
