"""Count what two independent analysers object to in Python code: Bandit, and Semgrep with rules.

Neither is right about everything: both match patterns. Two of them with rules by different authors
guard against a clamp that avoids one pattern only.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from saeguard.errors import CannotRunError, InputError

GRAVE = frozenset({"MEDIUM", "HIGH"})
SECONDS = 900


def bandit(sources: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the tests of medium or high severity that Bandit reports for each source.

    Raises:
        CannotRunError: Bandit is not installed.
    """
    try:
        from bandit.core import config, manager  # noqa: PLC0415 - optional, and seconds to import
    except ImportError as error:
        raise CannotRunError(f"{error}; pip install bandit, or leave out --code") from error
    logging.getLogger("bandit").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        files = _write(Path(folder), sources)
        checker = manager.BanditManager(
            config.BanditConfig(), "file", quiet=True, ignore_nosec=True
        )
        checker.discover_files([str(file) for file in files])
        checker.run_tests()
        found = [
            (issue.fname, issue.test_id)
            for issue in checker.get_issue_list()
            if issue.severity in GRAVE
        ]
    return _by_source(found, len(sources))


def semgrep(sources: Sequence[str], rules: Path, command: str = "semgrep") -> list[tuple[str, ...]]:
    """Return the rules that Semgrep finds broken in each source.

    Args:
        sources: Python code.
        rules: a rule file or a folder of them; nothing is fetched.
        command: Semgrep's executable.

    Raises:
        InputError: Semgrep refuses the rules.
        CannotRunError: Semgrep is not there, or fails.
    """
    program = shutil.which(command)
    if program is None:
        raise CannotRunError(f"{command}: no such program; pip install semgrep, or name it")
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), sources)
        arguments = [
            program, "scan", "--config", str(rules.absolute()), "--json", "--metrics", "off",
            "--disable-version-check", "--no-git-ignore", "--disable-nosem", "--jobs", "1",
            "--quiet", folder,
        ]  # fmt: skip
        done = subprocess.run(  # noqa: S603 - the program that the user named
            arguments, capture_output=True, timeout=SECONDS, check=False
        )
        try:
            report = json.loads(done.stdout)
        except ValueError as error:
            last = done.stderr.decode(errors="replace").strip()[-300:]
            raise CannotRunError(
                f"{command} failed with exit code {done.returncode}: {last}"
            ) from error
    wrong = [e for e in report["errors"] if e.get("level") == "error"]
    if done.returncode not in {0, 1} or (wrong and not report["results"]):
        said = [e.get("message") or e.get("long_msg") or e.get("type") for e in wrong]
        raise InputError(f"{rules}: Semgrep: {said[0] if said else f'exit code {done.returncode}'}")
    # Checked by name: a scan of no file would read as code without findings.
    scanned = {Path(path).name for path in report["paths"]["scanned"]}
    missing = [i for i, s in enumerate(sources) if s.strip() and f"s{i}.py" not in scanned]
    if missing:
        raise CannotRunError(f"{command} did not scan {len(missing)} of {len(sources)} sources")
    found = [(r["path"], r["check_id"].rpartition(".")[2]) for r in report["results"]]
    return _by_source(found, len(sources))


def _write(folder: Path, sources: Sequence[str]) -> list[Path]:
    files = [folder / f"s{i}.py" for i in range(len(sources))]
    for file, source in zip(files, sources, strict=True):
        file.write_text(source + "\n", encoding="utf-8", errors="replace")
    return files


def _by_source(found: Sequence[tuple[str, str]], count: int) -> list[tuple[str, ...]]:
    out: list[list[str]] = [[] for _ in range(count)]
    for path, name in found:
        out[int(Path(path).stem[1:])].append(name)
    return [tuple(sorted(names)) for names in out]
