"""Check that the parts of a feature-set file agree with each other."""

from __future__ import annotations

import math
from collections.abc import Iterator

from saeguard.features.schema import FeaturePart, FeatureSetFile, ModelPart, ProbePart, SaePart
from saeguard.yaml_files.findings import Finding
from saeguard.yaml_files.reader import Document, Loc

MEASURE = "`saeguard features calibrate --topk approximate`"


CALIBRATE = "`saeguard features calibrate`"


def disagreements(content: FeatureSetFile, document: Document) -> Iterator[Finding]:
    """Yield everything for which the file cannot be served.

    Args:
        content: the file, each of whose parts is well-formed.
        document: the same with positions.
    """
    yield from contradictions(content, document)
    yield from _unfinished(content, document)


def contradictions(content: FeatureSetFile, document: Document) -> Iterator[Finding]:
    """Yield every contradiction between parts of the file that calibration does not set.

    Args:
        content: the file, each of whose parts is well-formed.
        document: the same with positions.
    """
    if content.sae is not None:
        yield from _shape(content.sae, content.model, document)
        yield from _name_of_sae(content.sae, document)
        yield from _measured(content.sae, document)
    for name, feature in content.features.items():
        yield from _feature(content.sae, name, feature, document)
        if feature.probe is not None:
            yield from _layers(content, name, feature.probe, document)
    yield from _norms(content, document)


def _unfinished(content: FeatureSetFile, document: Document) -> Iterator[Finding]:
    """Yield a finding for each value that `saeguard features calibrate` is still to set."""
    if content.sae is not None and content.sae.sha256 is None and content.status != "published":
        message = (
            'the key "sha256" is missing: features hold only for the checkpoint they were found '
            f"in; run {CALIBRATE}, or write status: published if the set was never calibrated"
        )
        yield document.error("not-pinned", message, ("sae",), at_key=True)
    for name, feature in content.features.items():
        here: Loc = ("features", name)
        keys = ("low", "high", "threshold")
        missing = [key for key in keys if math.isnan(getattr(feature, key))]
        if missing:
            message = (
                f"the feature has no {', '.join(missing)} yet; run {CALIBRATE}, which "
                "finds its range and its threshold"
            )
            yield document.error("not-calibrated", message, here, at_key=True)
        elif feature.low >= feature.high:
            message = (
                f"low ({feature.low:g}) must be below high ({feature.high:g}): a share is "
                "(value - low) / (high - low)"
            )
            yield document.error("empty-range", message, (*here, "low"))


def _shape(sae: SaePart, model: ModelPart, document: Document) -> Iterator[Finding]:
    if sae.d_in != model.hidden_size:
        message = (
            f"sae.d_in is {sae.d_in}, but model.hidden_size is {model.hidden_size}; the SAE reads "
            "the model's residual stream, so write the same width in both"
        )
        yield document.error("model-mismatch", message, ("sae", "d_in"))
    if sae.layer >= model.num_layers:
        message = (
            f"sae.layer is {sae.layer}, but model.num_layers is {model.num_layers}; write a layer "
            f"from 0 to {model.num_layers - 1}"
        )
        yield document.error("model-mismatch", message, ("sae", "layer"))


def _name_of_sae(sae: SaePart, document: Document) -> Iterator[Finding]:
    ways: dict[str, dict[str, object]] = {
        "path": {"path": sae.path},
        "release": {"release": sae.release, "id": sae.id},
        "repo": {"repo": sae.repo, "folder": sae.folder, "files": sae.files},
    }
    used = {way: [k for k, v in keys.items() if v is not None] for way, keys in ways.items()}
    given = [way for way, keys in used.items() if keys]
    here: Loc = ("sae",)
    if len(given) != 1:
        found = ", ".join(key for way in given for key in used[way]) or "none of them"
        message = f"found {found}; give either path, or release and id, or repo, files and folder"
        yield document.error("sae-name", message, here, at_key=True)
        return
    if given == ["release"] and len(used["release"]) == 1:
        message = f"found {used['release'][0]} alone; release and id belong together"
        yield document.error("sae-name", message, (*here, used["release"][0]), at_key=True)
    if given == ["repo"] and (sae.repo is None or sae.files is None):
        message = f"found {', '.join(used['repo'])}; repo and files belong together"
        yield document.error("sae-name", message, (*here, used["repo"][0]), at_key=True)
    if sae.path is not None and sae.revision is not None:
        message = "revision names a commit of a repository, but the SAE is given by path; remove it"
        yield document.error("sae-name", message, (*here, "revision"), at_key=True)
    for loc, name in (
        ((*here, "folder"), sae.folder or ""),
        *(((*here, "files", i), name) for i, name in enumerate(sae.files or ())),
    ):
        if ".." in name.split("/"):
            message = "folder and files lie within the repository; write them without `..`"
            yield document.error("sae-name", message, loc)


def _measured(sae: SaePart, document: Document) -> Iterator[Finding]:
    """Yield a finding if an approximation was not measured, or with another checkpoint."""
    measured = sae.topk_measured
    if (sae.topk == "approximate") != (measured is not None):
        message = (
            "topk: approximate and topk_measured belong together, and the latter is measured, not "
            f"written: leave both out and run {MEASURE} on your own texts"
        )
        key = "topk" if measured is None else "topk_measured"
        yield document.error("topk-measured", message, ("sae", key), at_key=True)
    elif measured is not None and measured.sha256 != sae.sha256:
        message = (
            f"topk_measured.sha256 is {measured.sha256}, but sae.sha256 is {sae.sha256}, another "
            f"checkpoint; leave topk and topk_measured out and run {MEASURE}"
        )
        yield document.error("topk-measured", message, ("sae", "topk_measured", "sha256"))


def _layers(
    content: FeatureSetFile, name: str, probe: ProbePart, document: Document
) -> Iterator[Finding]:
    here: Loc = ("features", name, "probe")
    if probe.layer is not None and probe.layers is not None:
        message = f"found layer: {probe.layer} and layers: {probe.layers}; keep one of them"
        yield document.error("probe-layers", message, (*here, "layer"), at_key=True)
    if probe.layer is None and probe.layers is None and content.sae is None:
        message = (
            "found neither layer nor layers, and the set has no SAE whose layer could be meant; "
            "add layer: N, the layer that the probe was fitted on"
        )
        yield document.error("probe-layers", message, here, at_key=True)
    listed = probe.layers or []
    if listed != sorted(set(listed)):
        message = (
            f"found {listed}; write each layer once, in ascending order, as the rows of "
            f"{probe.name}.weight stand"
        )
        yield document.error("probe-layers", message, (*here, "layers"))
    deepest = content.model.num_layers - 1
    read: list[tuple[Loc, int]] = [((*here, "layers", i), layer) for i, layer in enumerate(listed)]
    read += [] if probe.layer is None else [((*here, "layer"), probe.layer)]
    for loc, layer in read:
        if layer > deepest:
            message = (
                f"found layer {layer}, but model.num_layers is {deepest + 1}; write a layer from 0 "
                f"to {deepest}"
            )
            yield document.error("model-mismatch", message, loc)


def _norms(content: FeatureSetFile, document: Document) -> Iterator[Finding]:
    """Yield bounds on the norm that are of no layer, or that leave out ordinary tokens."""
    depth = content.model.num_layers
    for key in ("max_norm", "norms_measured"):
        for layer in getattr(content, key) or ():
            if layer >= depth:
                message = (
                    f"found layer {layer}, but model.num_layers is {depth}; write a layer from 0 "
                    f"to {depth - 1}"
                )
                yield document.error("model-mismatch", message, (key, layer), at_key=True)
    for layer, bound in (content.max_norm or {}).items():
        measured = (content.norms_measured or {}).get(layer)
        if measured is not None and bound <= measured.median:
            message = (
                f"found {bound:g}, but the median norm at layer {layer} is {measured.median:g}: "
                "more than half of all tokens would be left out; run `saeguard features calibrate`"
            )
            yield document.error("max-norm", message, ("max_norm", layer))


def _feature(
    sae: SaePart | None, name: str, feature: FeaturePart, document: Document
) -> Iterator[Finding]:
    here: Loc = ("features", name)
    if (feature.detect is None) == (feature.probe is None):
        found = "neither" if feature.detect is None else "both"
        message = f"found {found} of detect and probe; give either detect or probe"
        yield document.error("detect-or-probe", message, here, at_key=True)
    for key, latents in (("detect", feature.detect or {}), ("clamp", feature.clamp)):
        for latent in latents:
            loc = (*here, key, latent)
            if sae is None:
                message = (
                    f"found latent {latent}, but the set has no SAE; add the key sae, which names "
                    "the checkpoint, or detect by a probe"
                )
                yield document.error("no-sae", message, loc, at_key=True)
            elif latent >= sae.d_sae:
                message = (
                    f"found latent {latent}, but sae.d_sae is {sae.d_sae}; write a number from 0 "
                    f"to {sae.d_sae - 1}"
                )
                yield document.error("unknown-latent", message, loc, at_key=True)
            elif sae.topk_measured is not None and latent not in sae.topk_measured.latents:
                message = (
                    f"found latent {latent}, whose threshold is not among sae.topk_measured; run "
                    f"{MEASURE} again"
                )
                yield document.error("topk-measured", message, loc, at_key=True)
