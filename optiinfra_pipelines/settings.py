"""Where fleet.yaml is, what it says, and where state is kept.

`load_fleet` reads a fleet.yaml into frozen nouns (`optiinfra_pipelines.domain.fleet`) or raises SettingsError with
everything that is wrong at once. The environment comes in as an argument. YAML is `settings_yaml`, the checks and
their wording `settings_checks` and `settings_rollouts`; thresholds are `optiinfra_pipelines.domain.thresholds`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from optiinfra_pipelines.domain.base import Frozen
from optiinfra_pipelines.domain.fleet import Fleet
from optiinfra_pipelines.settings_checks import check_fleet, explain
from optiinfra_pipelines.settings_rollouts import check_rollouts
from optiinfra_pipelines.settings_yaml import Problem, read_document

# A fleet of 1,000 targets takes some 150 kB; more than this is the wrong file.
MAX_FILE_BYTES = 16 * 1024 * 1024


class SettingsError(ValueError):
    """fleet.yaml (or a path setting) cannot be used. `problems` holds each fault; the text names all, by line."""

    def __init__(self, where: Path | str, problems: Sequence[Problem]) -> None:
        self.where = str(where)
        self.problems = tuple(sorted(problems))
        count = len(self.problems)
        lines = [f"{where}: {count} error{'s' if count != 1 else ''}"]
        for problem in self.problems:
            key = f"{problem.key}: " if problem.key else ""
            lines.append(f"  {where}:{problem.line}:{problem.column}: {key}{problem.message}")
        super().__init__("\n".join(lines))


class Paths(Frozen):
    """Where everything is; all absolute. `home` holds the state: it may be moved, backed up or deleted as one."""

    home: Path
    warehouse_dir: Path
    dagster_home: Path
    reports_dir: Path
    rollouts_dir: Path
    fleet_file: Path


def find_paths(environ: Mapping[str, str]) -> Paths:
    """OPTIINFRA_HOME (default: `state` in the repository) and OPTIINFRA_FLEET (default: its fleet.yaml).

    OPTIINFRA_HOME must be absolute: Dagster's processes start elsewhere and would each make a state of their own.
    A relative OPTIINFRA_FLEET counts from the working folder. Raises SettingsError.
    """
    repository = Path(__file__).resolve().parent.parent
    home = Path(environ.get("OPTIINFRA_HOME") or repository / "state").expanduser()
    if not home.is_absolute():
        message = f"is {str(home)!r}, a relative path; write it from the root, such as {home.absolute()}"
        raise SettingsError("environment", [Problem(1, 1, "OPTIINFRA_HOME", message)])
    fleet_file = Path(environ.get("OPTIINFRA_FLEET") or repository / "fleet.yaml").expanduser()
    return Paths(
        home=home,
        warehouse_dir=home / "warehouse",
        dagster_home=home / "dagster",
        reports_dir=home / "reports",
        rollouts_dir=home / "rollouts",
        fleet_file=fleet_file.absolute(),
    )


def load_fleet(path: Path, environ: Mapping[str, str]) -> Fleet:
    """Read fleet.yaml. `${NAME}` is replaced from `environ`, anywhere in a value.

    Raises SettingsError naming the file and, for everything wrong in it, line, column, key, fault and remedy.
    """
    return parse_fleet(_read(path), environ, where=path, folder=path.absolute().parent)


def parse_fleet(
    text: str, environ: Mapping[str, str], *, where: Path | str = "fleet.yaml", folder: Path | None = None
) -> Fleet:
    """`load_fleet` for text that has been read already; `where` is the name that errors give it.

    folder: from which relative files in it count; without one they are neither resolved nor looked for.
    """
    document = read_document(text, environ)
    if document.problems and not document.value:
        raise SettingsError(where, document.problems)
    check_fleet(document)
    check_rollouts(document, folder)
    try:
        fleet = Fleet.model_validate(document.value)
    except ValidationError as error:
        # include_input: what was read may be a secret from the environment; messages show the file's own text.
        for details in error.errors(include_url=False, include_input=False):
            found = explain(details, document)
            if found is not None:
                document.complain(*found)
    if document.problems:
        raise SettingsError(where, document.problems)
    return fleet


def _read(path: Path) -> str:
    try:
        # A pipe or /dev/stdin has no size to ask for, and /dev/zero has no end.
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise _unreadable(path, f"is larger than {MAX_FILE_BYTES} bytes; is it the right file?")
        return content.decode("utf-8")
    except FileNotFoundError:
        remedy = "does not exist; set OPTIINFRA_FLEET to your fleet's file, or restore the fleet.yaml that is shipped"
        raise _unreadable(path, remedy) from None
    except IsADirectoryError:
        raise _unreadable(path, "is a folder; name the file in it") from None
    except UnicodeDecodeError as error:
        raise _unreadable(path, f"is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise _unreadable(path, f"cannot be read: {error.strerror}; check its permissions") from None


def _unreadable(path: Path, message: str) -> SettingsError:
    return SettingsError(path, [Problem(1, 1, "", message)])
