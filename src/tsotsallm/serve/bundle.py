"""Everything that a computer without a connection needs to run a model, in one folder, for instance on a USB stick."""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tsotsallm.checkpoint.gguf_place import parts_at
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.errors import ResourceError, ServeError
from tsotsallm.export.gguf import export_gguf
from tsotsallm.export.verify import read_back
from tsotsallm.files import lines, read_utf8
from tsotsallm.serve.served import name_of
from tsotsallm.units import human_bytes
from tsotsallm.version import __version__

NAME = "tsotsallm"
EXTRAS = "serve,llama"
SUMS = "SHA256SUMS"
INSTALLED = ("INSTALLER", "REQUESTED", "direct_url.json")
"""Files that an installation adds to those of a wheel."""
GLIBC = (5, 12, 17, 24, 26, 27, 28, 31, 34, 35)
"""Versions 2.x of glibc for which wheels for Linux are built; a system runs those for its own version and all older ones."""
PLATFORMS = {
    "linux-x86_64": (*(f"manylinux_2_{minor}_x86_64" for minor in GLIBC), "manylinux2014_x86_64", "manylinux1_x86_64"),
    "linux-aarch64": (*(f"manylinux_2_{minor}_aarch64" for minor in GLIBC), "manylinux2014_aarch64"),
    "windows-x86_64": ("win_amd64",),
    "macos-arm64": tuple(f"macosx_{major}_0_{kind}" for major in range(11, 16) for kind in ("arm64", "universal2")),
    "macos-x86_64": tuple(f"macosx_{version}_{kind}"
                          for version in ("10_9", "10_12", "10_13", "11_0", "12_0", "13_0", "14_0")
                          for kind in ("x86_64", "universal2")),
}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Bundled:
    """The content of a bundle."""

    path: Path
    models: tuple[str, ...]
    wheels: int
    bytes: int


def bundle(models: Sequence[str], out: Path, *, platform: str | None = None, python: str | None = None,
           index: str | None = None, say: Say = print) -> Bundled:
    """Write a folder with wheels, models as GGUF files, reports, scripts that install and start, and checksums.

    `platform` is one of PLATFORMS and `python` a version such as 3.12 (by default those of this computer); `index` is a
    further package index, for instance that of torch's CPU builds. The folder gets its name when it is complete. Raises
    ServeError where a model, the platform or a wheel is missing, ResourceError where the folder cannot be written.
    """
    if platform is not None and platform not in PLATFORMS:
        raise ServeError(f"there is no platform {platform!r}; choose one of {', '.join(PLATFORMS)}")
    if not models:
        raise ServeError("no model is given; name one to bundle: a GGUF file, a folder of `fit`, or a checkpoint")
    partial = out.with_name(out.name + ".partial")
    for path in (out, partial):
        if path.exists():
            raise ServeError(f"{path} exists already; choose another name with -o, or delete it first")
    try:
        partial.mkdir(parents=True)
        names = _models(models, partial, say)
        wheels = _wheels(partial / "wheels", platform, python, index, say)
        _scripts(partial, names, platform, python)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        lines = [f"{_digest(path)}  {path.relative_to(partial).as_posix()}\n" for path in files]
        (partial / SUMS).write_text("".join(lines), "utf-8", newline="\n")
        size = sum(path.stat().st_size for path in files)
        partial.rename(out)
    except BaseException as error:                  # Ctrl-C included: nothing half-written stays
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise ResourceError(f"the bundle cannot be written at {out} ({error.strerror or error}); it takes about 1 GB, so "
                            "choose a place with room for it") from None
    return Bundled(out, tuple(names), wheels, size)


def verify(folder: Path) -> int:
    """Check every file of a bundle against its checksum and return their number; raises ServeError at the first fault."""
    listed = folder / SUMS
    try:
        content = read_utf8(listed, ServeError)
    except FileNotFoundError:
        raise ServeError(f"{folder} is not a bundle: it has no {SUMS}; give a folder that `{NAME} bundle` wrote") from None
    known: dict[str, str] = {}
    for line in lines(content):
        digest, _, name = line.partition("  ")
        parts = Path(name).parts
        if len(digest) != 64 or not parts or ".." in parts or Path(name).is_absolute():
            raise ServeError(f"{listed} is damaged at {line[:80]!r}; copy the bundle again")
        known[name] = digest
    for name, digest in known.items():
        path = folder / name
        if not path.is_file():
            raise ServeError(f"{name} is missing from {folder}; copy the bundle again")
        if _digest(path) != digest:
            raise ServeError(f"{name} in {folder} is not what was written; copy the bundle again")
    more = [path for path in _files(folder) if path not in known]
    if more:
        raise ServeError(f"{folder} holds {more[0]}, which does not belong to the bundle; delete it, or copy the bundle "
                         "again")
    return len(known)


def _files(folder: Path) -> Iterator[str]:
    """Files of a bundle, except its list of checksums and the environment that was installed from it."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != SUMS and not name.startswith("environment/"):
            yield name


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _models(models: Sequence[str], folder: Path, say: Say) -> list[str]:
    """Copy or export each model to a GGUF file with a unique name, with its report beside it."""
    (folder / "models").mkdir()
    names: list[str] = []
    for given in models:
        path = Path(given)
        fitted = path / "model.gguf"
        source = path if path.suffix == ".gguf" and len(parts_at(path)) == 1 else fitted if fitted.is_file() else None
        name = name_of(given)
        others = (f"{name}-{number}" for number in range(2, len(models) + 2))
        name = next(free for free in (name, *others) if free not in names)
        target = folder / "models" / f"{name}.gguf"
        if source is not None:
            if not source.is_file():
                raise ServeError(f"{source} does not exist; give a GGUF file, a folder of `fit`, or a checkpoint")
            read_back(source)
            shutil.copyfile(source, target)
        else:
            export_gguf(Checkpoint.open(given), target, name=name)
        for report in (path / "report.html", path.parent / "report.html" if source is path else path / "report.html"):
            if report.is_file():
                shutil.copyfile(report, folder / "models" / f"{name}-report.html")
                break
        names.append(name)
        say(f"{name}: {human_bytes(target.stat().st_size)}")
    return names


# -- wheels -----------------------------------------------------------------------------------------------------------


def _wheels(folder: Path, platform: str | None, python: str | None, index: str | None, say: Say) -> int:
    """Fetch this package's wheel and all that it needs, in the versions installed here; returns the number of wheels."""
    folder.mkdir()
    own = _own_wheel(folder)
    with tempfile.TemporaryDirectory() as scratch:
        pins = Path(scratch) / "constraints.txt"
        here = ((installed.metadata["Name"], installed.version) for installed in importlib.metadata.distributions()
                if installed.metadata["Name"])
        pins.write_text("".join(f"{name}=={version.partition('+')[0]}\n" for name, version in here if name.lower() != NAME))
        words = ["download", "--dest", str(folder), "--constraint", str(pins), f"{own}[{EXTRAS}]"]
        if platform is not None or python is not None:
            words += ["--only-binary=:all:", "--implementation", "cp"]
            words += [part for tag in PLATFORMS[platform] for part in ("--platform", tag)] if platform is not None else []
            words += ["--python-version", python] if python is not None else []
        words += ["--extra-index-url", index] if index is not None else []
        say("fetching wheels; torch alone takes about 200 MB")
        _pip(words)
    if not any(path.suffix == ".whl" for path in folder.glob("torch-*")):
        raise ServeError("no wheel of torch exists for that platform and version of Python; choose others")
    return len(list(folder.glob("*.whl")))


def _pip(words: Sequence[str]) -> None:
    """Run pip; raises ServeError with its message where it fails."""
    process = subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *words],
                             capture_output=True, text=True, check=False)
    if process.returncode:
        lines = process.stderr.splitlines()
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
        raise ServeError(f"pip could not {words[0]} what a bundle needs: {' '.join(errors)[:600]}; make the bundle where "
                         "there is a connection, or give another package index with --index")


def _own_wheel(folder: Path) -> Path:
    """A wheel of this package: built from its source where it runs from there, else assembled from the installed files."""
    source = Path(__file__).parents[3]
    if (source / "pyproject.toml").is_file() and (source / "src" / NAME).is_dir():
        _pip(["wheel", "--no-deps", "--wheel-dir", str(folder), str(source)])
        return next(folder.glob(f"{NAME}-*.whl"))
    target = folder / f"{NAME}-{__version__}-py3-none-any.whl"
    files = importlib.metadata.files(NAME) or []
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as wheel:
        for file in files:
            if ".." not in file.parts and file.suffix != ".pyc" and file.name not in INSTALLED:
                wheel.write(str(file.locate()), file.as_posix())
    return target


# -- scripts ----------------------------------------------------------------------------------------------------------


def _scripts(folder: Path, names: Sequence[str], platform: str | None, python: str | None) -> None:
    version = python or f"{sys.version_info.major}.{sys.version_info.minor}"
    files = " ".join(f"models/{name}.gguf" for name in names)
    install = f"pip install --no-index --find-links wheels '{NAME}[{EXTRAS}]'"
    (folder / "install.sh").write_text(
        f"#!/bin/sh\n# Installs {NAME} into the folder `environment`, using only the files in this folder.\nset -e\n"
        "cd \"$(dirname \"$0\")\"\n"
        f"${{PYTHON:-python3}} -m venv environment\nenvironment/bin/{install}\n"
        "echo 'installed; start with: sh start.sh'\n", "utf-8", newline="\n")
    (folder / "start.sh").write_text(
        "#!/bin/sh\n# Serves the models in this folder on a page for this computer.\ncd \"$(dirname \"$0\")\"\n"
        f"exec environment/bin/{NAME} serve {files} \"$@\"\n", "utf-8", newline="\n")
    windows = [f"models\\{name}.gguf" for name in names]
    (folder / "install.bat").write_text(
        "@echo off\r\ncd /d \"%~dp0\"\r\npython -m venv environment || exit /b 1\r\nenvironment\\Scripts\\python -m "
        + install.replace("'", '"') + " || exit /b 1\r\necho installed; start with start.bat\r\n", "utf-8", newline="")
    (folder / "start.bat").write_text(
        f"@echo off\r\ncd /d \"%~dp0\"\r\nenvironment\\Scripts\\{NAME} serve {' '.join(windows)} %*\r\n", "utf-8",
        newline="")
    for script in ("install.sh", "start.sh"):
        (folder / script).chmod(0o755)
    where = platform or "the same kind of computer as it was made on"
    (folder / "README.txt").write_text(f"""{NAME} {__version__}: {', '.join(names)}

For {where}, with Python {version} installed. No connection is needed.

  Linux, macOS    sh install.sh      then    sh start.sh
  Windows         install.bat        then    start.bat

The program prints an address; open it in a browser. What you write there does not leave this computer.
The models are in `models` (GGUF files, which llama.cpp and Ollama run too), with their reports where there are any.
To check that everything arrived intact: sha256sum -c {SUMS}, or {NAME} bundle verify FOLDER where it is installed.


Pour {f"un ordinateur de type {platform}" if platform else "un ordinateur semblable à celui où ce dossier a été préparé"}, où
Python {version} est installé. Aucune connexion n’est nécessaire.

  Linux, macOS    sh install.sh      puis    sh start.sh
  Windows         install.bat        puis    start.bat

Le programme affiche une adresse : ouvrez-la dans un navigateur. Ce que vous y écrivez ne quitte pas cet ordinateur.
Les modèles sont dans `models` (des fichiers GGUF, que llama.cpp et Ollama savent aussi exécuter), avec leurs rapports s’il
y en a. Pour vérifier que tout est arrivé intact : sha256sum -c {SUMS}, ou {NAME} bundle verify DOSSIER s’il est installé.
""", "utf-8", newline="\n")
