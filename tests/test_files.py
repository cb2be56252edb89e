"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pws._files import partial_of, write_whole, written_whole


@pytest.mark.parametrize("content", ["naïve Ω\n", b"\x00\xff", ""])
@pytest.mark.parametrize("before", [None, b"old"])
def test_what_was_written_is_there_alone(content: str | bytes, before: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    if before is not None:
        path.write_bytes(before)
    write_whole(path, content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode("utf-8"))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("no")])
@pytest.mark.parametrize("before", [None, b"old"])
def test_a_block_that_fails_leaves_what_was_there(error: BaseException, before: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    if before is not None:
        path.write_bytes(before)

    def fail() -> None:
        with written_whole(path) as partial:
            partial.write_bytes(b"half of the n")
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    if isinstance(error, OSError):
        assert caught.value.args == (28, "No space left on device")
        assert caught.value.filename == str(path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([] if before is None else [before])


def test_a_library_sees_the_suffix_and_a_path_beside_the_file(tmp_path: Path) -> None:
    with written_whole(tmp_path / "model.onnx") as partial:
        assert (partial.suffix, partial.parent) == (".onnx", tmp_path.resolve())
        partial.write_bytes(b"1")


def test_a_file_too_large_for_the_disk(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    code = f"""
import resource, signal
from pathlib import Path
from pws._files import write_whole
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_whole(Path({str(tmp_path / "file")!r}), b"n" * 2000)
except OSError as error:
    print(error.filename)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "file")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


def test_killed_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    child = os.fork()
    if child == 0:
        with written_whole(path) as partial:
            partial.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert path.read_bytes() == b"old"


def test_a_link_stays_a_link_and_a_device_a_device(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "there" / "file.txt")
    write_whole(link, "new")
    assert link.is_symlink()
    assert (tmp_path / "there" / "file.txt").read_text() == "new"
    write_whole(Path(os.devnull), "new")
    assert Path(os.devnull).is_char_device()


def test_a_folder_is_not_written_over(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path, "new")
    assert not partial_of(tmp_path).exists()
