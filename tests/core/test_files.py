"""Atomic writes, names that never overwrite, hashes, and what the operating system refuses."""

import errno
import hashlib
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from physformer_core.errors import DataError, OutputError, PhysFormerError
from physformer_core.files import atomic_folder, atomic_write, next_free_name, sha256_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_writes_and_replaces(tmp_path):
    target = tmp_path / "new" / "picture.png"
    for content in (b"one", b"two"):
        with atomic_write(target) as temporary:
            assert temporary.parent == target.parent and temporary.suffix == ".png" and temporary != target
            temporary.write_bytes(content)
        assert target.read_bytes() == content
    assert names(target.parent) == ["picture.png"]


@pytest.mark.parametrize(
    "fault", [ValueError("x"), KeyboardInterrupt(), SystemExit(1), FileNotFoundError(2, "no", "in")]
)
def test_any_exception_leaves_the_old_file_and_nothing_else(tmp_path, fault):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(type(fault)), atomic_write(target) as temporary:
        temporary.write_text("half")
        raise fault
    assert target.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_full_disk_is_told_with_a_hint(tmp_path):
    with pytest.raises(OutputError, match="no space left") as caught, atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("half")
        with open("/dev/full", "w") as full:  # the kernel's own ENOSPC
            full.write("x")
    assert "free some space" in caught.value.hint and names(tmp_path) == []


def test_a_full_disk_at_the_sync(tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="no space left"), atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("x")
    assert names(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_no_permission(tmp_path, monkeypatch, code):
    def refuse(path, *_):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OutputError, match="cannot write") as caught, atomic_write(tmp_path / "a"):
        pytest.fail("the block must not run")
    assert "may write" in caught.value.hint
    with pytest.raises(OutputError, match="cannot write"):
        next_free_name(tmp_path / "a")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="permission denied"), atomic_write(tmp_path / "a"):
        pass


def test_the_target_is_a_folder_or_below_a_file(tmp_path):
    with pytest.raises(OutputError, match="is a folder"), atomic_write(tmp_path):
        pytest.fail("the block must not run")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="part of its path"), atomic_write(tmp_path / "file" / "x"):
        pass
    with pytest.raises(OutputError, match="part of its path"):
        next_free_name(tmp_path / "file" / "x")


# --- folders ----------------------------------------------------------------------------------------------------


def test_a_folder_appears_whole(tmp_path):
    with atomic_folder(tmp_path / "new" / "a") as folder:
        (folder / "inside").mkdir()
        (folder / "inside" / "x").write_text("1")
        os.chmod(folder / "inside" / "x", 0o600)
        assert not (tmp_path / "new" / "a").exists() and folder.name.startswith(".a.")
    assert names(tmp_path / "new") == ["a"]
    written = tmp_path / "new" / "a" / "inside" / "x"
    shared = written.parent.parent.stat().st_mode & 0o666
    assert written.read_text() == "1" and written.stat().st_mode & 0o666 == shared


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (ValueError("x"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), OutputError),
        (OSError(errno.EIO, "Input/output error"), OutputError),
        (RuntimeError("Error while serializing: No space left on device (os error 28)"), OutputError),
    ],
)
def test_a_folder_that_fails_leaves_nothing(tmp_path, fault, told):
    with pytest.raises(told) as caught, atomic_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("half")
        raise fault
    assert names(tmp_path) == []
    if told is OutputError:
        assert re.search("no space left|Input/output error", str(caught.value))


def test_a_folder_tells_of_its_own_files_alone(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "a"):
        (tmp_path / "what-the-caller-reads").read_text()
    with pytest.raises(OutputError, match=r"cannot write .*a: "), atomic_folder(tmp_path / "a") as folder:
        (folder / "no-such-folder" / "x").write_text("1")
    assert names(tmp_path) == []


def test_a_folder_that_appeared_meanwhile_is_not_written_over(tmp_path):
    with pytest.raises(OutputError), atomic_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("mine")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "x").write_text("theirs")
    assert names(tmp_path) == ["a"] and (tmp_path / "a" / "x").read_text() == "theirs"


# --- names ------------------------------------------------------------------------------------------------------


def test_free_names_count_up_and_are_claimed(tmp_path):
    found = [next_free_name(tmp_path / "bird.png").name for _ in range(3)]
    assert found == ["bird.png", "bird_1.png", "bird_2.png"]
    assert next_free_name(tmp_path / "bird.png", claim=False).name == "bird_3.png"
    assert not (tmp_path / "bird_3.png").exists()


def test_a_dangling_link_is_not_written_through(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "elsewhere")
    assert next_free_name(tmp_path / "a").name == "a_1"


def test_a_claim_is_given_back_when_the_write_fails(tmp_path):
    name = next_free_name(tmp_path / "bird.png")
    with pytest.raises(KeyboardInterrupt), atomic_write(name):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_an_unused_claim_is_given_back_at_the_end_of_the_process(tmp_path):
    code = "import sys; from physformer_core.files import next_free_name; next_free_name(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=True)
    assert names(tmp_path) == []


def test_processes_side_by_side_get_different_names(tmp_path):
    code = (
        "import sys; from physformer_core.files import *\n"
        "for _ in range(10):\n"
        "    name = next_free_name(sys.argv[1])\n"
        "    with atomic_write(name) as t: t.write_text('x')\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a.txt")]) for _ in range(6)]
    assert [process.wait() for process in running] == [0] * 6
    assert len(names(tmp_path)) == 60


def test_sha256(tmp_path):
    content = os.urandom(3 << 20)
    (tmp_path / "a").write_bytes(content)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    with pytest.raises(DataError, match="cannot read"):
        sha256_file(tmp_path / "none")


def test_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(OutputError("what", hint="how")))
    assert (type(error), str(error), error.hint) == (OutputError, "what", "how")
    assert isinstance(error, PhysFormerError)
