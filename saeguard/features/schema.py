"""The form of a feature-set file, `saeguard.features/v1`, and its reading from YAML."""

from __future__ import annotations

import difflib
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from saeguard.errors import InputError

SCHEMA = "saeguard.features/v1"
MAX_BYTES = 8 << 20

M = TypeVar("M", bound=BaseModel)

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Latent = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(description="Factor of the latent's activation.")]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=100)]


class FeatureSetError(InputError):
    """A feature-set file is malformed or does not fit its SAE; names file and field."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class ModelPart(_Strict):
    """The model the features hold for."""

    name: str = Field(min_length=1)
    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    sha256: Digest | None = None


class RatePart(_Strict):
    """A measured rate of tokens, with its exact 95 % interval."""

    rate: float = Field(ge=0, le=1)
    interval: list[float] = Field(min_length=2, max_length=2)
    hits: int = Field(ge=0)
    tokens: int = Field(gt=0)


class StandInPart(_Strict):
    """A threshold that stands for one latent's rank."""

    threshold: float
    precision: RatePart = Field(description="Of the tokens above it, those in the top k.")
    recall: RatePart = Field(description="Of the tokens in the top k, those above it.")


class MeasuredPart(_Strict):
    """What `saeguard features calibrate --topk approximate` measured; not to be written by hand."""

    k: int = Field(gt=0)
    sha256: Digest = Field(description="Of the weight file it was measured with.")
    texts_sha256: Digest = Field(description="Of the token ids it was measured on.")
    texts: int = Field(gt=0)
    tokens: int = Field(gt=0)
    latents: dict[Latent, StandInPart] = Field(min_length=1)


class SaePart(_Strict):
    """The checkpoint the latents are numbered in: a path, a release and id, or a repository."""

    path: str | None = Field(
        default=None, min_length=1, description="Folder, relative to this file or absolute."
    )
    release: str | None = Field(default=None, description="As SAELens names it.")
    id: str | None = Field(default=None, description="Of one SAE of the release.")
    repo: str | None = Field(
        default=None,
        pattern=r"^[\w.-]+/[\w.-]+$",
        description="Repository of the Hugging Face hub.",
    )
    folder: str | None = Field(
        default=None,
        pattern=r"^[\w.-]+(/[\w.-]+)*$",
        description="Of one SAE within the repository.",
    )
    files: list[str] | None = Field(
        default=None, min_length=1, description="Within the folder, the weights first."
    )
    revision: str | None = Field(
        default=None, pattern=r"^[0-9a-f]{40}$", description="Commit of the repository."
    )
    sha256: Digest | None = Field(default=None, description="Of the weight file.")
    config_sha256: Digest | None = Field(default=None, description="Of the file beside it.")
    layer: int = Field(ge=0)
    d_in: int = Field(gt=0)
    d_sae: int = Field(gt=0)
    k: int | None = Field(default=None, gt=0, description="Where the files do not say it.")
    norm_factor: float | None = Field(
        default=None, gt=0, description="Of `expected_average_only_in`, not in the files."
    )
    convention: Literal["openmoss", "saelens"] | None = Field(
        default=None, description="Reading of Llama Scope."
    )
    topk: Literal["exact", "approximate"] = Field(
        default="exact",
        description="approximate: measured thresholds stand for the ranks of a TopK SAE's latents.",
    )
    topk_measured: MeasuredPart | None = Field(
        default=None, description="Those thresholds, and how well they agree with ranks."
    )

    @model_validator(mode="after")
    def _one_name(self) -> SaePart:
        ways = [
            self.path is not None,
            self.release is not None or self.id is not None,
            self.repo is not None or self.folder is not None or self.files is not None,
        ]
        if sum(ways) != 1:
            raise ValueError("give either path, or release and id, or repo, files and folder")
        if (self.release is None) != (self.id is None):
            raise ValueError("release and id belong together")
        if (self.repo is None) != (self.files is None):
            raise ValueError("repo and files belong together")
        if any(".." in name.split("/") for name in (self.folder or "", *(self.files or []))):
            raise ValueError("folder and files lie within the repository, without `..`")
        if self.path is not None and self.revision is not None:
            raise ValueError("revision is a repository's, path needs none")
        self._measured()
        return self

    def _measured(self) -> None:
        """Refuse an approximation that nobody has measured, or not with this checkpoint."""
        how = "`saeguard features calibrate --topk approximate`"
        if (self.topk == "approximate") != (self.topk_measured is not None):
            raise ValueError(
                "topk: approximate and topk_measured belong together, and the latter is measured, "
                f"not written: leave both out and run {how} on your own texts"
            )
        found = self.sha256 if self.topk_measured is None else self.topk_measured.sha256
        if found != self.sha256:
            raise ValueError(
                f"topk_measured.sha256 is {found}, but sha256 is {self.sha256}, another "
                f"checkpoint; leave topk and topk_measured out and run {how}"
            )


class ProbePart(_Strict):
    """A linear probe."""

    file: str = Field(min_length=1, description="Relative to this file or absolute.")
    name: str = Field(min_length=1)
    sha256: Digest


class FeaturePart(_Strict):
    """One feature."""

    title: str = Field(min_length=1)
    behaviour: str = Field(min_length=1)
    detect: dict[Latent, Weight] | None = Field(default=None, min_length=1)
    probe: ProbePart | None = None
    clamp: dict[Latent, Weight] = Field(default_factory=dict)
    low: float
    high: float
    threshold: float = Field(gt=0)
    evidence: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> FeaturePart:
        if (self.detect is None) == (self.probe is None):
            raise ValueError("give either detect or probe")
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        return self


class Document(_Strict):
    """A whole file."""

    model_config = ConfigDict(populate_by_name=True)

    schema_: Literal["saeguard.features/v1"] = Field(alias="schema")
    id: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*(/[a-z0-9][a-z0-9_.-]*)*$", max_length=200)
    title: str = Field(min_length=1)
    status: Literal["calibrated", "published"] = Field(
        default="calibrated",
        description="published: ids from a publication, not verified here; for logging only.",
    )
    model: ModelPart
    sae: SaePart
    exclude_tokens: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list)
    features: dict[Name, FeaturePart] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Document:
        if self.sae.d_in != self.model.hidden_size:
            raise ValueError(
                f"sae.d_in is {self.sae.d_in}, model.hidden_size is {self.model.hidden_size}"
            )
        if self.sae.layer >= self.model.num_layers:
            raise ValueError(
                f"sae.layer is {self.sae.layer}, but the model has {self.model.num_layers} layers"
            )
        if self.sae.sha256 is None and self.status != "published":
            raise ValueError(
                "sae.sha256 is missing; only a published set, which has not been calibrated, may "
                "leave it open"
            )
        for name, feature in self.features.items():
            for latent in (*(feature.detect or {}), *feature.clamp):
                if latent >= self.sae.d_sae:
                    raise ValueError(
                        f"features.{name} names latent {latent}, sae.d_sae is {self.sae.d_sae}"
                    )
                measured = self.sae.topk_measured
                if measured is not None and latent not in measured.latents:
                    raise ValueError(
                        f"features.{name} names latent {latent}, whose threshold is not among "
                        "sae.topk_measured; run `saeguard features calibrate --topk approximate` "
                        "again"
                    )
        return self


_PARTS: tuple[type[BaseModel], ...] = (
    Document, ModelPart, SaePart, MeasuredPart, StandInPart, RatePart, ProbePart, FeaturePart,
)  # fmt: skip
_KEYS = sorted(
    {field.alias or name for part in _PARTS for name, field in part.model_fields.items()}
)


class _Loader(yaml.SafeLoader):
    """The safe loader without aliases and without repeated keys."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is repeated", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_document(path: Path) -> Document:
    """Read and check the form of the file at `path`.

    Raises:
        FeatureSetError: it is no YAML of this schema.
    """
    content = read_content(path)
    found = content.get("schema", SCHEMA)
    if found != SCHEMA:  # its other keys would be a page of mistakes
        message = f"{path}: schema: found {found!r}, {SCHEMA!r} is due"
        if "template" in str(found):
            message += "; a template's features have to be found and calibrated first"
        raise FeatureSetError(message)
    return validated(Document, content, path)


def read_content(path: Path) -> Any:
    """Return what the YAML file at `path` holds.

    Raises:
        FeatureSetError: it is no YAML that may be read here.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise FeatureSetError(f"{path}: larger than {MAX_BYTES} bytes")
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - safe
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise FeatureSetError(f"{path}{where}: {error.problem}") from error
    except OSError as error:
        raise FeatureSetError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FeatureSetError(f"{path}: not UTF-8; save the file as UTF-8") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:  # ValueError: 2027-99-99
        raise FeatureSetError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise FeatureSetError(
            f"{path}: file: found {found}, a mapping with the keys of a set is due"
        )
    return content


def validated(model: type[M], content: Any, path: Path) -> M:
    """Return the content of `path` as `model`.

    Raises:
        FeatureSetError: every way in which it is not one.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise FeatureSetError("\n".join(f"{path}: {_told(e)}" for e in error.errors())) from error


def _told(error: Any) -> str:
    """Say which field is wrong, how, and what was probably meant."""
    loc = [str(part) for part in error["loc"] if part != "[key]"]
    field = ".".join(loc) or "file"
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(loc[-1], _KEYS, n=1)
        return f"{field}: unknown key" + (f"; did you mean {close[0]!r}?" if close else "")
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] in {"missing", "value_error"}:
        return f"{field}: {message}"
    return f"{field}: {message}, found {error['input']!r}"
