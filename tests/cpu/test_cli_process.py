"""The command line as a process: signals, standard streams, environment."""

import functools
import os
import signal
import subprocess
import sys

import pytest


def test_ctrl_c_ends_without_a_traceback(text_folder):
    slow = "decode = Engine._round; Engine._round = lambda self: (time.sleep(0.05), decode(self))[1]"
    code = f"import sys, time; from orthrus_rt import Engine, cli; {slow}; sys.exit(cli.main())"
    command = [sys.executable, "-c", code, "generate", "--model", text_folder, "--dtype", "float32", "--raw", "hello"]
    command += ["--mode", "ar", "--ignore-eos", "--max-new-tokens", "500", "--max-seq-len", "512"]
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background jobs start with it ignored
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=listen) as process:
        assert os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err


def test_ctrl_c_in_torchs_import_ends_the_process():
    """As an exception it would be lost in its C++, or leave a module half imported."""
    code = """
import signal, sys
from orthrus_rt import cli

def find_spec(name, path=None, target=None):
    if name == "torch":
        print(signal.getsignal(signal.SIGINT) is signal.SIG_DFL)

sys.meta_path.insert(0, type("Watch", (), {"find_spec": find_spec}))
code = cli.main()
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, code)
"""
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background jobs start with it ignored
    command = [sys.executable, "-c", code, "generate", "--model", "/nowhere", "hello"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=listen)
    assert done.stdout == "True\nTrue 2\n", done.stderr


@pytest.mark.parametrize("unbuffered", ("", "1"))
def test_what_cannot_be_written(unbuffered):
    """A reader that has gone causes no traceback, and a full disk is an error, also if Python writes only at exit."""
    light = "cli.run_info = lambda args: print('facts') or 0; sys.exit(cli.main(['info']))"
    command = [sys.executable, "-c", f"import sys; from orthrus_rt import cli; {light}"]
    how = dict(stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    nobody, stdout = os.pipe()
    os.close(nobody)
    done = subprocess.run(command, stdout=stdout, **how)
    os.close(stdout)
    assert (done.stderr, done.returncode) == (b"", 2)
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, **how)
    assert (done.stderr, done.returncode) == (b"orthrus-rt info: [Errno 28] No space left on device\n", 2)


@pytest.mark.parametrize("error", ("ValueError", "KeyError"))  # a user's error, and a bug
@pytest.mark.parametrize("stderr", ("full", "closed"))
def test_a_complaint_that_nobody_takes_changes_no_exit_code(stderr, error):
    fails = f"def run(args): raise {error}('x')"
    code = f"import sys; from orthrus_rt import cli\n{fails}\ncli.run_info = run; sys.exit(cli.main(['info']))"
    shell = '"$@" 2>/dev/full' if stderr == "full" else '"$@" 2>&-'
    done = subprocess.run(["sh", "-c", shell, "sh", sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert (done.stdout, done.returncode) == (b"", 2)


@pytest.mark.parametrize("given", (None, "ACTIVE"))
def test_torchs_threads_do_not_spin_beside_busy_programs(given):
    """For the command, which has a process of its own. A program that calls main() with arguments keeps its setting."""
    code = "import os; print(os.environ.get('OMP_WAIT_POLICY'))"
    begin = "import sys; sys.argv = ['orthrus-rt', 'info']; from orthrus_rt import cli"
    for passed, want in (("", given or "PASSIVE"), ("['info']", str(given))):
        env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        env |= {} if given is None else {"OMP_WAIT_POLICY": given}
        command = [
            sys.executable,
            "-c",
            f"{begin}\ndef run(args): {code}; return 0\ncli.run_info = run; sys.exit(cli.main({passed}))",
        ]
        assert subprocess.run(command, env=env, capture_output=True, text=True).stdout == f"{want}\n"
