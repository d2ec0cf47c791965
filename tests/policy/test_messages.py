"""Golden messages: what is written, what `saeguard check` says of it."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.policy.example import GOOD, changed, read

GOLDEN = Path(__file__).with_name("messages.txt")


def blocks() -> list[str]:
    """Return the blocks of the golden file."""
    return GOLDEN.read_text().split("\n\n")[1:]


def apply(block: str) -> str:
    """Return the good policy with the change that a block starts with."""
    lines = block.splitlines()
    old = "".join(f"{line[2:]}\n" for line in lines if line.startswith("- "))
    new = "".join(f"{line[2:]}\n" for line in lines if line.startswith("+ "))
    return changed((old, new))


def told(folder: Path, block: str) -> str:
    """Return the block as it should be, with today's messages."""
    change = [line for line in block.splitlines() if line.startswith(("- ", "+ "))]
    _, errors = read(folder, apply(block))
    messages = [error.render().replace(f"{folder}/", "") for error in errors]
    return "\n".join([*change, *messages])


@pytest.mark.parametrize("block", blocks(), ids=lambda block: block.split("[")[1].split("]")[0])
def test_message(tmp_path: Path, block: str) -> None:
    """Each mistake is found where it stands, and told in words that say what to do."""
    assert told(tmp_path, block) == block.rstrip("\n")


def test_all_at_once(tmp_path: Path) -> None:
    """Mistakes do not hide one another, and are listed in the order of the file."""
    text = changed(
        ("severity: high", "severity: hihg"),
        ("owner: safety-code@example.com", "owner: no"),
        ("on_error: allow", "on_errors: allow"),
        ("mode: shadow", "mode: enforce"),
        ("condition: shell and", "condition: shel and"),
        ("keep: 16 tokens", "keep: &k 16 tokens"),
    )

    _, errors = read(tmp_path, text)

    assert [(error.line, error.code) for error in errors] == [
        (4, "ambiguous-value"),
        (5, "not-allowed"),
        (6, "on-error-missing"),
        (8, "unknown-key"),
        (17, "unused-selection"),
        (19, "unknown-selection"),
        (21, "anchor"),
    ]


def test_every_missing_key_is_named(tmp_path: Path) -> None:
    """An empty mapping is told every key that it needs."""
    _, errors = read(tmp_path, "{}")

    required = {line.split(":")[0] for line in GOOD.splitlines() if re.match("[a-z]", line)}
    optional = {"on_error", "falsepositives", "review_by", "for", "keep", "exceptions"}
    assert {f'the key "{key}" is missing; add it' for key in required - optional} == {
        error.message for error in errors
    }


def test_what_needs_an_early_match(tmp_path: Path) -> None:
    """Neither a stop nor a clamp waits for the end of a request."""
    last = ("for: 3 of 8 tokens\nkeep: 16 tokens", "for: the last token")
    clamp = "action: clamp\nclamp: {features: [shell_exec], to: 0}"
    whole = ("above: 0.4}", "above: 0.4, over: mean of the request}")
    for says, *changes in (
        ("decided when the request has ended, and action: stop comes too late",
         last, ("action: flag", "action: stop")),
        ("decided when the request has ended, and action: clamp comes too late",
         last, ("action: flag", clamp)),
        ("a clamp decides at each token, and cannot compare the mean of the request",
         whole, ("action: flag", clamp)),
    ):  # fmt: skip
        _, [error] = read(tmp_path, changed(*changes))
        assert error.code == "decided-late"
        assert says in error.message
    policy, errors = read(tmp_path, changed(last, whole))
    assert (policy is not None, errors) == (True, [])


def test_render(tmp_path: Path) -> None:
    """A rendered error has place, code, message, source line and caret."""
    _, [error] = read(tmp_path, changed(("severity: high", "severity: hihg")))

    assert error.render() == (
        f'{tmp_path}/p.yaml:5:11: error[not-allowed]: found "hihg"; did you mean "high"? '
        "allowed: low, medium, high, critical\n"
        "  5 | severity: hihg\n"
        "    |           ^"
    )


def test_render_long_line(tmp_path: Path) -> None:
    """The source of an error far to the right is shown around it."""
    padding = ", ".join(f"padding {i:03}" for i in range(45))
    _, [error] = read(tmp_path, changed(("[Security tutorials]", f"[{padding}, 12]")))

    source, caret = error.render().splitlines()[1:]
    assert len(source) < 150
    assert source[caret.index("^") :] == "12]"


def test_render_keeps_the_terminal_safe(tmp_path: Path) -> None:
    """Control characters of the file do not reach the terminal."""
    _, errors = read(tmp_path, "title: \x1b]0;owned\x07\n")

    assert "\x1b" not in errors[0].render()
    assert "\x07" not in errors[0].render()


def test_caret_after_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    """Files saved on Windows are read, and columns are those of an editor."""
    text = "\ufeff" + changed(("severity: high", "severity: hihg")).replace("\n", "\r\n")

    _, [error] = read(tmp_path, text)

    assert (error.line, error.column, error.source) == (5, 11, "severity: hihg")


def test_columns_count_characters(tmp_path: Path) -> None:
    """Letters outside ASCII count as one column each."""
    _, [error] = read(tmp_path, changed(("[Security tutorials]", "[héllo, 😀😀, 12]")))

    assert (error.line, error.column) == (14, 29)


if __name__ == "__main__":
    with TemporaryDirectory() as name:
        rewritten = [told(Path(name), block) for block in blocks()]
    heading = GOLDEN.read_text().split("\n\n")[0]
    GOLDEN.write_text("\n\n".join([heading, *rewritten]) + "\n")
