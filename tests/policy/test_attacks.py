"""Hostile files: each in attacks/ is refused with the code that starts its name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from saeguard.policy.errors import PolicyErrors
from saeguard.policy.files import MAX_FILES
from saeguard.policy.load import load_policies
from saeguard.policy_tools.test_cases import read_cases
from tests.policy.example import GOOD, changed, policy, read, read_policy

ATTACKS = sorted(Path(__file__).with_name("attacks").glob("*.yaml"))


@pytest.mark.parametrize("path", ATTACKS, ids=[path.stem for path in ATTACKS])
def test_refused(path: Path) -> None:
    """The file is refused for the reason in its name."""
    found, errors = read_policy(path)

    assert found is None
    assert path.stem.split("--")[0] in {error.code for error in errors}


def test_larger_than_the_limit(tmp_path: Path) -> None:
    """A file of many megabytes is refused without reading all of it."""
    found, [error] = read(tmp_path, GOOD.encode() + b"#" * (8 << 20))

    assert (found, error.code) == (None, "too-large")


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? "])
def test_as_deep_as_the_file_is_long(tmp_path: Path, opening: str) -> None:
    """Nesting up to the size limit neither recurses nor takes long."""
    found, [*_, error] = read(tmp_path, opening * (60_000 // len(opening)))

    assert found is None
    assert error.code in {"too-deep", "key-type", "yaml-syntax"}


@pytest.mark.parametrize(
    ("trace", "column"),
    [("1e9x3", 26), ("0x99999999", 26), ("0x9999 0x9999", 34), ("0x-1", 26), ("nan", 26)],
)
def test_traces(tmp_path: Path, trace: str, column: int) -> None:
    """Traces cannot ask for more tokens than the limit, nor for numbers that are none."""
    path = tmp_path / "p.test.yaml"
    case = "{name: hostile, prompt_tokens: 0, expect: match,\n    shares: {shell_exec: '%s'}}"
    path.write_text(
        "schema: saeguard.test/v1\npolicy: unsafe-code.shell-injection\n"
        f"cases:\n  - {case % trace}\n  - {case % 0}\n"
    )

    cases, errors = read_cases(path, policy(tmp_path))

    assert cases == ()
    assert (5, column, "test-trace") in [(e.line, e.column, e.code) for e in errors]


class TestFolders:
    """What may be in a folder of policies."""

    def test_named_pipe(self, tmp_path: Path) -> None:
        """A pipe is refused rather than waited for."""
        os.mkfifo(tmp_path / "p.yaml")

        with pytest.raises(PolicyErrors) as caught:
            load_policies(tmp_path)

        assert [error.code for error in caught.value.errors] == ["unreadable"]

    def test_link_to_a_folder_above(self, tmp_path: Path) -> None:
        """A link back up is told, not followed for ever."""
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "up").symlink_to(tmp_path)
        (tmp_path / "p.yaml").write_text(GOOD)

        with pytest.raises(PolicyErrors) as caught:
            load_policies(tmp_path)

        assert [(e.code, e.path.name) for e in caught.value.errors] == [("link-loop", "up")]

    def test_link_to_itself(self, tmp_path: Path) -> None:
        """A link that leads nowhere is told."""
        (tmp_path / "p.yaml").symlink_to("p.yaml")

        with pytest.raises(PolicyErrors) as caught:
            load_policies(tmp_path)

        assert [error.code for error in caught.value.errors] == ["unreadable"]

    def test_dangling_link(self, tmp_path: Path) -> None:
        """A link whose target is gone is told."""
        (tmp_path / "p.yaml").symlink_to("gone.yaml")

        with pytest.raises(PolicyErrors) as caught:
            load_policies(tmp_path)

        assert [error.code for error in caught.value.errors] == ["not-found"]

    def test_yml(self, tmp_path: Path) -> None:
        """A file that would be overlooked is told."""
        (tmp_path / "p.yml").write_text(GOOD)

        with pytest.raises(PolicyErrors) as caught:
            load_policies(tmp_path)

        assert [error.code for error in caught.value.errors] == ["file-name"]

    def test_too_many_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The number of files is bounded."""
        assert MAX_FILES == 20_000
        monkeypatch.setattr("saeguard.policy.files.MAX_FILES", 3)
        for i in range(4):
            (tmp_path / f"{i}.yaml").write_text(changed(("id: ", f"id: p{i}.")))

        with pytest.raises(PolicyErrors) as caught:
            load_policies(tmp_path)

        assert [error.code for error in caught.value.errors] == ["too-many-files"]

    @pytest.mark.parametrize("name", ["gone", "a" * 300, "nul\0", "p.yaml/below"])
    def test_no_such_path(self, tmp_path: Path, name: str) -> None:
        """A path that cannot be is told as a policy error too."""
        (tmp_path / "p.yaml").write_text(GOOD)

        with pytest.raises(PolicyErrors) as caught:
            load_policies(tmp_path / name)

        assert [e.code for e in caught.value.errors] in (["not-found"], ["unreadable"])

    def test_name_that_is_not_unicode(self, tmp_path: Path) -> None:
        """A file name of stray bytes can be told on a terminal."""
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\x1b.yaml"))
        path.write_text("id: 12")

        with pytest.raises(PolicyErrors) as caught:
            load_policies(tmp_path)

        assert str(caught.value).isascii() or "\x1b" not in str(caught.value)
        str(caught.value).encode()


@pytest.mark.parametrize("path", ATTACKS, ids=[path.stem for path in ATTACKS])
def test_refused_without_libyaml(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused too where PyYAML was built without libyaml, if in other words."""
    monkeypatch.setattr("saeguard.yaml_files.reader._LOADER", yaml.SafeLoader)

    found, errors = read_policy(path)

    assert found is None
    assert errors
