"""`saeguard browse`: a page on which to look at latents, features, policies and events."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saeguard.cli.options import (
    DeviceOption,
    DtypeOption,
    ModelOptions,
    OptionalModel,
    SetOption,
    existing_file,
)
from saeguard.errors import InputError

if TYPE_CHECKING:
    from saeguard.browse.live import Live
    from saeguard.browse.site import Site


def verb(
    index: Annotated[
        Path, typer.Argument(help="Index that `features index` made.", callback=existing_file)
    ],
    set_: SetOption = None,
    policies: Annotated[
        Path | None, typer.Option(help="Folder of policies; those of --set are shown.")
    ] = None,
    events: Annotated[
        Path | None, typer.Option(help="Event log of a server.", callback=existing_file)
    ] = None,
    model: OptionalModel = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.", min=0, max=65535)] = 8765,
    export: Annotated[
        Path | None, typer.Option(help="Write static files into this folder, and end.")
    ] = None,
    latents: Annotated[
        list[int] | None,
        typer.Option(
            "--latent",
            help="With --export: latent to write. Repeatable. Default: those of features, and the "
            "densest.",
        ),
    ] = None,
    most: Annotated[int, typer.Option(help="With --export: latents by default.", min=1)] = 500,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
) -> None:
    """Serve a page on this machine, or write it as files.

    With --model, texts can be tried on the page. Only this machine reaches it: through SSH, forward
    the port (`ssh -L 8765:127.0.0.1:8765 HOST`).
    """
    site = _site(index, set_, policies, events)
    if export is not None:
        from tqdm import tqdm

        from saeguard.browse.export import export as write
        from saeguard.browse.export import usual_latents

        chosen = latents or usual_latents(site, most)
        for latent in chosen:
            site.index.check_latent(latent)
        with tqdm(total=len(chosen), desc="export", unit="latent") as bar:
            pages = write(site, export, chosen, bar.update)
        typer.echo(f"Wrote {pages} pages into {export}; open {export / 'index.html'}.")
        return
    import uvicorn

    from saeguard.browse.server import app

    live = _live(site, model, ModelOptions(dtype, device))
    typer.echo(f"http://127.0.0.1:{port}/ (Ctrl-C ends it)")
    uvicorn.run(
        app(site, live), host="127.0.0.1", port=port, log_level="warning", server_header=False
    )


def _site(index: Path, set_: Path | None, policies: Path | None, events: Path | None) -> Site:
    """Return what the page shows.

    Raises:
        InputError: the index is of another SAE than the set, or there are policies without a set.
    """
    from saeguard.browse.site import Site
    from saeguard.events.reader import read_log
    from saeguard.events.record_schema import Event
    from saeguard.features.load import load_feature_set, sae_of
    from saeguard.latents.index import Index
    from saeguard.policy.load import load_policies

    opened = Index(index)
    log = [] if events is None else [e for e in read_log(events) if isinstance(e, Event)]
    if set_ is None:
        if policies is not None:
            raise InputError("--policies: give the --set that they read, too")
        return Site(opened, events=log)
    features = load_feature_set(set_)
    info = sae_of(features).inspect()
    opened.check_sae(info)
    known = () if policies is None else load_policies(policies)
    return Site(opened, info, features, [p for p in known if p.feature_set == features.id], log)


def _live(site: Site, model: Path | None, options: ModelOptions) -> Live | None:
    if model is None:
        return None
    if site.info is None:
        raise InputError("--model: give the --set with the SAE, too")
    from saeguard.browse.live import Live
    from saeguard.features.model_fit import sae_misfit
    from saeguard.hf.model import load_model

    lm = load_model(model, **options._asdict())
    misfit = sae_misfit(site.info.d_in, site.info.layer, lm.shape)
    if misfit:
        raise InputError(f"--model: {model}: {misfit}; name the model that it was trained on")
    return Live(lm, site.info, site.features)
