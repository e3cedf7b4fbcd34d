"""``groundswell k8s``: write, check and apply the manifests of a run; see how it goes; take it away."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from launch import options
from launch.bundled import read_config
from launch.kubernetes.kubectl import kubectl, references, status_line
from launch.kubernetes.manifests import render
from launch.kubernetes.pods import cluster_of
from launch.kubernetes.reasons import reason
from launch.kubernetes.validation import check
from launch.kubernetes.yaml_text import dump
from orchestrator.config import RunConfig
from orchestrator.config.worker_pods import job_name
from orchestrator.errors import ConfigError, GroundswellError, Problem

_IS_MANIFEST = re.compile(r"^(apiVersion|kind):", re.MULTILINE)


def _refusals(command: Callable[..., Any]) -> Callable[..., Any]:
    """What is refused is said on stderr, with exit code 2."""

    @wraps(command)
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            return command(*arguments, **options)
        except GroundswellError as error:
            click.echo(str(error), err=True)
            raise click.exceptions.Exit(2) from error

    return call


_kind = click.option(
    "--kind",
    type=click.Choice(["RayJob", "RayCluster"]),
    default="RayJob",
    show_default=True,
    help="A job with a cluster of its own, or a cluster that stands, to submit to.",
)


def _on_a_config(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.argument("config")(options.overrides(_kind(_refusals(command))))


@click.group(name="k8s", short_help="Run on Kubernetes with KubeRay.")
def k8s_group() -> None:
    """Run on a Kubernetes cluster with the KubeRay operator, as the config's section cluster says."""


@k8s_group.command(name="render")
@_on_a_config
@click.option("--explain", is_flag=True, help="Say in a comment why a field is there, where its name does not.")
@click.option(
    "-o", "--output", "folder", type=click.Path(file_okay=False, path_type=Path), help="Write files into this folder."
)
def write_manifests(config: str, overrides: tuple[str, ...], kind: Any, explain: bool, folder: Path | None) -> None:
    """Write the manifests of CONFIG, which needs a section cluster, to the terminal or into a folder."""
    settings = _load(config, overrides)
    documents = render(settings, kind=kind)
    why = reason if explain else None
    if folder is None:
        click.echo(dump(documents, why), nl=False)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        for number, document in enumerate(documents, start=1):
            # Numbered, since kubectl applies the files of a folder in the order of their names.
            path = folder / f"{number}-{document['kind'].lower()}.yaml"
            path.write_text(dump([document], why), encoding="utf-8")
            click.echo(str(path))


@k8s_group.command(name="validate")
@click.argument("targets", nargs=-1, required=True)
@options.overrides
@_kind
@_refusals
def check_manifests(targets: tuple[str, ...], overrides: tuple[str, ...], kind: Any) -> None:
    """Check manifests, or those of configs, against KubeRay's schema and rules; no cluster is asked.

    TARGETS are files with manifests, folders of such files, and configs with a section cluster.
    """
    problems: list[Problem | str] = []
    for target in targets:
        try:
            texts = _texts(target, overrides, kind)
        except ConfigError as error:
            problems += error.problems
            continue
        for text, source in texts:
            report = check(text, source)
            problems += report.problems
            for name in report.unknown:
                click.echo(f"{source}: {name} is of a kind that is not checked", err=True)
            if report.checked and not report.problems:
                click.echo(f"OK {source}: {', '.join(report.checked)}")
    if problems:
        raise ConfigError(*problems)


@k8s_group.command(name="apply")
@_on_a_config
@click.option("--dry-run", is_flag=True, help="Only ask the cluster whether it would take them.")
def apply_manifests(config: str, overrides: tuple[str, ...], kind: Any, dry_run: bool) -> None:
    """Check the manifests of CONFIG and hand them to kubectl apply."""
    settings = _load(config, overrides)
    text = dump(render(settings, kind=kind))
    if found := check(text, config).problems:
        raise ConfigError(*found)
    kubectl(settings, "apply", *(["--dry-run=server"] if dry_run else []), "--filename", "-", text=text)


@k8s_group.command(name="status")
@_on_a_config
def show_status(config: str, overrides: tuple[str, ...], kind: Any) -> None:
    """Say how the job of CONFIG stands, as the operator knows it."""
    settings = _load(config, overrides)
    found = kubectl(settings, "get", kind.lower(), _name(settings), "--output", "json", read=True)
    click.echo(status_line(json.loads(found), attempts=cluster_of(settings).backoff_limit + 1))


@k8s_group.command(name="logs")
@_on_a_config
@click.option("-f", "--follow", is_flag=True, help="Go on until the job ends.")
def show_logs(config: str, overrides: tuple[str, ...], kind: Any, follow: bool) -> None:
    """Print what the job of CONFIG says; of a cluster that stands, what its head says."""
    settings = _load(config, overrides)
    head = f"app.kubernetes.io/instance={_name(settings)},ray.io/node-type=head"
    whose = [f"job/{_name(settings)}"] if kind == "RayJob" else ["--selector", head, "--container", "ray-head"]
    kubectl(settings, "logs", *whose, *(["--follow"] if follow else []))


@k8s_group.command(name="delete")
@_on_a_config
@click.option("--storage", is_flag=True, help="Also delete the volume claim that was made, with all runs on it.")
def delete_manifests(config: str, overrides: tuple[str, ...], kind: Any, storage: bool) -> None:
    """Take the job of CONFIG away, which stops it; the claim with its runs stays unless it is asked for."""
    settings = _load(config, overrides)
    documents = render(settings, kind=kind)
    claims = [document for document in documents if document["kind"] == "PersistentVolumeClaim"]
    going = documents if storage else [document for document in documents if document not in claims]
    kubectl(settings, "delete", "--ignore-not-found", *references(going[::-1]))
    if claims and not storage:
        click.echo(f"Kept: {', '.join(references(claims))}, with its runs; --storage deletes it as well", err=True)


def _load(config: str, overrides: tuple[str, ...]) -> RunConfig:
    settings = read_config(config, overrides)
    if settings.cluster is None:
        fix = "give cluster.image, cluster.worker_groups and cluster.storage; "
        fix += "groundswell config show digits_on_kubernetes has them all"
        raise ConfigError(Problem(source=config, key="cluster", rule="this section must be given", fix=fix))
    return settings


def _name(settings: RunConfig) -> str:
    return job_name(cluster_of(settings), settings.run.name)


def _texts(target: str, overrides: tuple[str, ...], kind: Any) -> list[tuple[str, str]]:
    """The manifests that ``target`` names, each text with where it comes from."""
    path = Path(target)
    if path.is_dir():
        files = sorted(each for each in path.iterdir() if each.suffix in (".yaml", ".yml"))
        if not files:
            raise GroundswellError(f"{target} holds no file that ends in .yaml")
        return [(_read(each), str(each)) for each in files]
    if path.is_file() and _IS_MANIFEST.search(text := _read(path)):
        return [(text, target)]
    settings = _load(target, overrides)
    return [(dump(render(settings, kind=kind)), f"{target}, rendered")]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(Problem(source=str(path), rule=f"cannot be read: {error}")) from error
