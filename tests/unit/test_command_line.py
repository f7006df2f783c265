"""What every tool shares: one-line errors, exit codes, argument types."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from traceback import format_exception

import pytest

from megatron_exact.command_line import (
    ToolParser,
    describe,
    fraction,
    png_path,
    positive_int,
    positive_number,
    printable,
    progress_bar,
    run_tool,
)


def exit_code(main: Callable[[], int | None]) -> int:
    with pytest.raises(SystemExit) as end:
        run_tool(main)
    assert isinstance(end.value.code, int)
    return end.value.code


def raising(error: BaseException) -> Callable[[], int | None]:
    def main() -> int | None:
        raise error

    return main


@pytest.fixture(autouse=True)
def _restore_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.delenv("MEGATRON_EXACT_TRACEBACK", raising=False)


def test_exit_codes_of_success() -> None:
    assert exit_code(lambda: None) == 0
    assert exit_code(lambda: 0) == 0
    assert exit_code(lambda: 3) == 3


def test_a_users_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(raising(ValueError("row length 0\n   is  wrong"))) == 1
    assert capsys.readouterr().err == "error: row length 0 is wrong\n"


def test_control_characters_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    text = "x\x1b]0;title\x07\u202e\udcff\n.safetensors has 7 bytes, größer 大"
    assert exit_code(raising(ValueError(text))) == 1
    line = "x\\x1b]0;title\\x07\\u202e\\udcff .safetensors has 7 bytes, größer 大"
    assert capsys.readouterr().err == f"error: {line}\n"
    assert describe(FileNotFoundError(2, "No such file", "a\x1bb")) == "a\\x1bb: No such file"


def test_what_a_tool_prints_cannot_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        print("a shard\x1b[2K\r\u202e\udcff: 3 documents\n\tgrößer", flush=True)
        sys.stdout.writelines(["\x07", "end\n"])
        assert sys.stdout.encoding.lower() == "utf-8"

    assert exit_code(main) == 0
    assert capsys.readouterr().out == (
        "a shard\\x1b[2K\\r\\u202e\\udcff: 3 documents\n\tgrößer\n\\x07end\n"
    )
    assert printable("two\nlines") == "two\\nlines"


def test_an_os_error_names_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing"

    def main() -> None:
        missing.read_text()

    assert exit_code(main) == 1
    assert capsys.readouterr().err == f"error: {missing}: No such file or directory\n"
    assert describe(FileNotFoundError("P.bin is missing")) == "P.bin is missing"
    assert describe(ValueError()) == "ValueError"
    try:
        raise ValueError("a.bin was cut: restore it")
    except ValueError as error:
        original = "".join(format_exception(error))
        wrapped = f"Caught ValueError in DataLoader worker process 1.\nOriginal {original}"
    assert describe(ValueError(wrapped)) == "a.bin was cut: restore it"


def test_interrupt_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError):
        run_tool(raising(TypeError("a bug")))
    monkeypatch.setenv("MEGATRON_EXACT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="shown"):
        run_tool(raising(ValueError("shown")))


def test_warnings_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("an empty\nbucket", stacklevel=1)

    with warnings.catch_warnings():  # pytest records warnings; here they go where a tool sends them
        assert exit_code(main) == 0
    assert capsys.readouterr().err == "warning: an empty bucket\n"


def test_a_reader_that_left_is_no_traceback() -> None:
    script = (
        "from megatron_exact.command_line import run_tool\n"
        "def main():\n"
        "    for _ in range(100_000): print('x' * 100)\n"
        "run_tool(main)\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as tool:
        assert tool.stdout is not None
        assert tool.stderr is not None
        tool.stdout.readline()
        tool.stdout.close()
        assert tool.stderr.read() == ""
    assert tool.returncode == 141


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1), ("4096", 4096), ("1_000", 1000), ("4K", 4096), ("2m", 2 << 20)]
)
def test_positive_int(text: str, value: int) -> None:
    assert positive_int(text) == value


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "K", "", "four", "nan"])
def test_what_is_no_positive_int(text: str) -> None:
    with pytest.raises(ValueError, match="is not"):
        positive_int(text)


def test_positive_number() -> None:
    assert positive_number("2e-3") == 0.002
    for text in ("0", "-1", "nan", "inf", "many"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not"):
            positive_number(text)


@pytest.mark.parametrize(("text", "value"), [("0", 0.0), ("0.01", 0.01), ("9e-1", 0.9)])
def test_fraction(text: str, value: float) -> None:
    assert fraction(text) == value


@pytest.mark.parametrize("text", ["1", "-0.1", "nan", "inf", "a half"])
def test_what_is_no_fraction(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a number|is not in"):
        fraction(text)


def test_argparse_names_the_option_and_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--row-tokens", type=positive_int)
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--row-tokens", "0"])
    assert end.value.code == 2
    assert "--row-tokens: '0' is not above 0" in capsys.readouterr().err


def test_a_tools_parser_gives_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        parser = ToolParser(prog="pack")
        parser.add_argument("--fraction", type=fraction)
        parser.parse_args(["--fraction", "2"])

    assert exit_code(main) == 1
    line = "error: argument --fraction: '2' is not in [0, 1) (see pack --help)\n"
    assert capsys.readouterr().err == line


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("pack", 10, "rows") as bar:
        bar.update(10)
        assert bar.n == 10
    assert capsys.readouterr().err == ""


def test_long_work_without_a_terminal_prints_the_time_left_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("megatron_exact.command_line.time.monotonic", lambda: now)

    def said(*steps: tuple[float, float], total: int | None = 1000) -> str:
        nonlocal now
        with progress_bar("tokenize", total, "B") as bar:
            for seconds, amount in steps:
                now += seconds
                bar.update(amount)
        return capsys.readouterr().err

    assert said((2, 10), (2, 10)) == ""  # nothing before five seconds
    line = "tokenize: about 8 min left, 2% of the work is done\n"  # 20 in 10 s, 980 are left
    assert said((5, 10), (5, 10), (600, 10)) == line.replace("2%", "1%").replace("8", "9")
    assert said((4, 10), (6, 10), (6, 10)) == line.replace("8", "9")
    # 500 were there from a run before: they say nothing about the rate
    assert said((0.5, 500), (10, 20)) == "tokenize: about 4 min left, 52% of the work is done\n"
    assert said((10, 500)) == ""  # less than a minute is left
    assert said((10, 20), total=None) == ""


def test_sigterm_cleans_up_and_is_143(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from megatron_exact.command_line import run_tool\n"
        "from megatron_exact.files import atomic_folder\n"
        "def main():\n"
        "    with atomic_folder(Path(sys.argv[1]) / 'new' / 'pack') as temporary:\n"
        "        (temporary / 'rows').write_text('half')\n"
        "        print('inside', flush=True)\n"
        "        time.sleep(60)\n"
        "run_tool(main)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as tool:
        assert tool.stdout is not None
        assert tool.stdout.readline() == "inside\n"
        tool.send_signal(signal.SIGTERM)
        _, errors = tool.communicate(timeout=60)
    assert (tool.returncode, errors) == (143, "terminated\n")
    assert list(tmp_path.iterdir()) == []


def test_sigterm_is_as_before_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []
    exit_code(lambda: seen.append(signal.getsignal(signal.SIGTERM)))
    assert seen != [before]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("text", ["a.png", "folder/a.b.PNG"])
def test_png_path(text: str) -> None:
    assert png_path(text) == Path(text)


@pytest.mark.parametrize("text", ["a", "a.txt", "a.svg", "png", ".png", ""])
def test_what_is_no_png_path(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="figures are PNG files"):
        png_path(text)
