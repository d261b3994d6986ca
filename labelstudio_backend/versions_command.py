"""The command `yolonas-labelstudio versions`: list, compare, roll back, pin."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import click

from labelstudio_backend.cli import settings_from
from labelstudio_backend.registry import ProjectRegistry, Registry
from labelstudio_backend.version import Version, compare, summary
from yolonas.errors import YolonasError


@click.group(invoke_without_command=True)
@click.option("--project", help="Label Studio's number of the project, or the backend's key; not needed for one alone.")
@click.option("--state-dir", help="Folder of versions, jobs and cached images.")
@click.pass_context
def versions(context: click.Context, /, project: str | None, **options: Any) -> None:
    """List a project's versions; compare two, roll back, pin. The server follows within a minute."""
    registry = Registry(settings_from(**options).projects_dir)
    context.obj = (registry, project)
    if context.invoked_subcommand is None:
        listed = registry.projects() if project is None else []
        for one in listed or [_project(context.obj)]:
            _print_list(one)


@versions.command("list")
@click.pass_obj
def list_(target: tuple[Registry, str | None]) -> None:
    """The versions, their figures, and which one serves."""
    _print_list(_project(target))


@versions.command("compare")
@click.argument("a", type=int)
@click.argument("b", type=int)
@click.pass_obj
def compare_(target: tuple[Registry, str | None], a: int, b: int) -> None:
    """Figures of two versions side by side."""
    project = _project(target)
    found = compare(project.version(a), project.version(b))
    left, right = found["a"], found["b"]
    where = "measured on the same images" if found["same_images"] else "each measured on its own held-out images"
    click.echo(f"{left['name']}  ->  {right['name']}, {where}")
    click.echo(f"  {'':24} {'v' + str(a):>9} {'v' + str(b):>9} {'change':>9}")
    for title, name in (("AP", "ap"), ("AP50", "ap50")):
        _row(title, left[name], right[name])
    for label in dict.fromkeys([*left["per_class"], *right["per_class"]]):
        _row(f"AP of {label}", left["per_class"].get(label), right["per_class"].get(label))
    for title, name in (("training images", "train"), ("training boxes", "train_boxes"), ("judged by", "held_out")):
        _row(title, left["tasks"].get(name), right["tasks"].get(name))


@versions.command()
@click.argument("number", type=int)
@click.pass_obj
def rollback(target: tuple[Registry, str | None], number: int) -> None:
    """Have version NUMBER serve; the next training starts from it."""
    click.echo(f"{_project(target).rollback(number).name} serves. The next training starts from it.")


@versions.command()
@click.argument("number", type=int)
@click.pass_obj
def pin(target: tuple[Registry, str | None], number: int) -> None:
    """Have version NUMBER serve until `unpin`; what is trained meanwhile is kept as a candidate."""
    click.echo(f"{_project(target).pin(number).name} serves until it is unpinned.")


@versions.command()
@click.pass_obj
def unpin(target: tuple[Registry, str | None]) -> None:
    """Let the next version that is trained and passes the gate serve again."""
    click.echo(f"{_project(target).unpin().name} serves until the next version.")


def _project(target: tuple[Registry, str | None]) -> ProjectRegistry:
    registry, wanted = target
    found = [p for p in registry.projects() if wanted in (None, p.key, p.key.partition("-")[0])]
    if len(found) == 1:
        return found[0]
    keys = ", ".join(project.key for project in registry.projects())
    if not keys:
        raise YolonasError(f"there is no project in {registry.root}; Label Studio makes it known by /setup")
    if wanted is None or found:
        raise YolonasError(f"say which project: --project KEY, one of {keys}")
    raise YolonasError(f"there is no project {wanted!r}; known are {keys}")


def _print_list(project: ProjectRegistry) -> None:
    current, pinned = project.current(), project.pinned()
    click.echo(f"Project {project.key} of {project.metadata().get('hostname') or '?'}")
    click.echo(f"  {'version':>7}  {'published':16}  {'AP':>6} {'AP50':>6}  {'images':>6}")
    for version in project.versions():
        click.echo(_line(version, current, pinned))


def _line(version: Version, current: Version, pinned: bool) -> str:
    facts = summary(version)
    when = datetime.fromtimestamp(facts["published"]).strftime("%Y-%m-%d %H:%M")
    remarks = [] if version.trained else [f"start: {version.weights}"]
    if version == current:
        remarks.append("serves, pinned" if pinned else "serves")
    elif version.number > current.number and version.trained and not version.removed:
        remarks.append("does not serve: another was chosen")
    if version.removed:
        remarks.append("files removed")
    images = facts["tasks"].get("train", "")
    ap, ap50 = _figure(facts["ap"]), _figure(facts["ap50"])
    name = f"v{version.number}"
    return f"  {name:>7}  {when:16}  {ap:>6} {ap50:>6}  {images:>6}  {', '.join(remarks)}".rstrip()


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _row(title: str, a: float | None, b: float | None) -> None:
    change = ""
    if a is not None and b is not None:
        change = f"{b - a:+.3f}" if isinstance(b, float) or isinstance(a, float) else f"{b - a:+d}"
    click.echo(f"  {title:24} {_figure(a):>9} {_figure(b):>9} {change:>9}")
