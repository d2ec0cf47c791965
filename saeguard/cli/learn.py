"""`saeguard features learn`: labelled texts and ordinary traffic in; features and policies out."""

from __future__ import annotations

import json
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from saeguard.atomic_files import write_atomically
from saeguard.cli import evaluate
from saeguard.cli.features_report import print_norms
from saeguard.cli.learnt import named_apart, print_learnt, print_table, write_policy
from saeguard.cli.options import DeviceOption, DtypeOption, ModelOption, existing_folder
from saeguard.cli.search_features import layers_to_read
from saeguard.errors import FINDINGS, InputError

if TYPE_CHECKING:
    from saeguard.features.types import FeatureSet


def verb(
    data: Annotated[
        Path,
        typer.Argument(
            help="Labelled texts (JSON lines): a file, or a folder of BEHAVIOUR/NAME.jsonl."
        ),
    ],
    model: ModelOption,
    benign: Annotated[Path, typer.Option(help="Ordinary texts: a file or a folder.")],
    set_: Annotated[Path, typer.Option("--set", help="Feature set to write.")],
    sae: Annotated[
        Path | None,
        typer.Option(
            help="Folder of an SAE checkpoint. Without one, only probes are learnt.",
            callback=existing_folder,
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers for probes, such as 14,18,22: each alone and all together. "
            "Default: the SAE's."
        ),
    ] = None,
    policies: Annotated[
        Path, typer.Option(help="Folder for the shadow policies and their tests.")
    ] = Path("policies"),
    out: Annotated[Path, typer.Option(help="Report to write, JSON.")] = Path("learnt.json"),
    per: Annotated[
        Literal["file", "behaviour", "kind"],
        typer.Option(help="What becomes one feature."),
    ] = "file",
    scope: Annotated[
        Literal["prompt", "output", "both"], typer.Option(help="Tokens to look at.")
    ] = "output",
    form: Annotated[
        Literal["best", "probe", "group", "latent"],
        typer.Option(help="Detector. best: the group, unless the probe is clearly better."),
    ] = "best",
    fpr: Annotated[
        float, typer.Option(help="Share of ordinary texts that may match.", min=0, max=1)
    ] = 0.01,
    owner: Annotated[
        str, typer.Option(help="Owner of the policies.")
    ] = "TODO: who answers for it, such as safety@example.com",
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps what the model computed, so that the command goes on where it "
            "was cut off."
        ),
    ] = None,
    holdout: Annotated[
        Path | None,
        typer.Option(help="Folder for the held-out texts, labelled and ordinary."),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Page of `saeguard evaluate` on the held-out texts. The model reads them again."
        ),
    ] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    seed: Annotated[int, typer.Option(help="Random seed of the cut and of the search.")] = 0,
    labelled_only: Annotated[
        bool,
        typer.Option(
            "--labelled-only",
            help="Choose on the labelled texts alone, not on ordinary texts as further negatives: "
            "for subtle behaviours whose labelled texts are all of one sort.",
        ),
    ] = False,
    topic: Annotated[
        bool,
        typer.Option(
            "--topic",
            help="Learn two features: the behaviour beside its twins (the negatives), and the "
            "topic beside ordinary texts. The policy asks for both.",
        ),
    ] = False,
    twin_fpr: Annotated[
        float,
        typer.Option(
            help="With --topic, share of twins above the behaviour's threshold.", min=0, max=1
        ),
    ] = 0.05,
    accept_weak: Annotated[
        bool,
        typer.Option("--accept-weak", help="Keep features that are no better than chance."),
    ] = False,
) -> None:
    """Learn features from labelled texts: cut, search, calibrate, and write shadow policies.

    The texts are cut by template into a part to choose on, one to set ranges on and one to measure
    on; the ordinary texts likewise. What is no better than chance is reported and left out.
    Policies that are there already are kept. Exit code 1: nothing was learnt.
    """
    from saeguard.features.cut import cut_by_template, last_part
    from saeguard.features.found import new_set, set_at
    from saeguard.features.learn import Wish, check_texts, learn
    from saeguard.features.load import load_feature_set, save_feature_set
    from saeguard.features.massive import chosen_bounds, norms_as_plain
    from saeguard.hf.held_out import write_held_out
    from saeguard.hf.labelled import by_part, counts_of, in_scope, read_groups, text_files
    from saeguard.hf.model import load_model, load_tokenizer
    from saeguard.hf.subjects import record
    from saeguard.hf.texts import read_texts
    from saeguard.sae import inspect

    info = None if sae is None else inspect(sae)
    probed, read_layers = layers_to_read(layers, info)
    for option, path in (("DATA", data), ("--benign", benign)):
        if not path.exists():
            raise InputError(f"{option}: {path}: there is no such file or folder; name one")
    ordinary_files, files = text_files(benign), text_files(data, [benign])
    tokenizer = load_tokenizer(model)
    groups = named_apart(read_groups(data, files, tokenizer, per), topic=topic)
    ordinary = [t for file in ordinary_files for t in read_texts(file, tokenizer)]
    part = cut_by_template(
        ((f"{g.name}/{t.label}", t.template) for g in groups for t in g.texts), seed
    )
    calm_part = cut_by_template((("ordinary", t.template) for t in ordinary), seed, (1, 1, 1))
    check_texts(
        {g.name: counts_of(g.texts, part) for g in groups},
        [len(texts) for texts in by_part([t for t in ordinary if in_scope(t, scope)], calm_part)],
        scope,
    )
    lm = load_model(model, tokenizer, dtype=dtype, device=device)
    features = set_at(new_set(set_, lm.shape, lm.path, info, lm.special_tokens, dtype=dtype))
    subjects, calm, sinks = record(
        lm, groups, ordinary, (part, calm_part), read_layers, cache,
        chosen_bounds(features.max_norm, features.norms),
    )  # fmt: skip
    features = features.with_norms(*sinks)
    print_norms(*sinks)
    wish = Wish(
        scope, form, fpr, layers=tuple(probed), seed=seed, accept_weak=accept_weak,
        labelled_only=labelled_only, topic=topic, twin_fpr=twin_fpr,
    )  # fmt: skip
    rows, written = list[dict[str, Any]](), list[Path]()
    for number, subject in enumerate(subjects, 1):
        typer.echo(f"[{number}/{len(groups)}] {subject.name}", err=True)
        features, learnt = learn(features, info, subject, calm, wish, tokenizer.decode)
        rows.append(learnt.report())
        print_learnt(learnt, features)
        if learnt.feature is not None:
            save_feature_set(features, set_)
            written += write_policy(learnt, load_feature_set(set_), policies, wish, owner, lm.name)
    report = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "saeguard": metadata.version("saeguard"),
        "model": {"name": lm.name, "sha256": features.model.sha256},
        "sae": None if info is None else {"sha256": info.sha256, "layer": info.layer},
        "arguments": {
            "per": per,
            "scope": scope,
            "form": form,
            "fpr": fpr,
            "seed": seed,
            "layers": list(read_layers),
            "dtype": dtype,
            "labelled_only": labelled_only,
            "topic": topic,
            "twin_fpr": twin_fpr if topic else None,
        },
        "ordinary_texts": [len(part) for part in calm],
        "max_norm": sinks[0],
        "norms_measured": norms_as_plain(sinks[1]),
        "learnt": rows,
        "policies": [str(path) for path in written],
    }
    write_atomically(out, json.dumps(report) + "\n")
    print_table(rows)
    if not any(row["learnt"] for row in rows):
        typer.echo(f"Nothing was learnt; {out} says why for each.", err=True)
        raise typer.Exit(FINDINGS)
    with ExitStack() as stack:
        folder = holdout or Path(stack.enter_context(TemporaryDirectory()))
        texts = write_held_out(files, data, last_part(part), folder / "labelled")
        calm_texts = write_held_out(
            ordinary_files, benign, last_part(calm_part), folder / "ordinary"
        )
        if html is not None:
            evaluate.verb(
                policies, model, data=texts, benign=calm_texts,
                feature_sets=root_of(features), html=html,
            )  # fmt: skip
    typer.echo(f"Wrote {set_}, {out} and {len(written)} policies in {policies}.")


def root_of(features: FeatureSet) -> Path:
    """Return the folder below which policies name a feature set."""
    return features.path.parents[features.id.count("/")]
