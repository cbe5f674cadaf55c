"""Build the gateway image: `python -m image.build [--profile generic] [--force] [--keys FOLDER]`.

What happens, in order:

1. needs are checked (root, tools, disk space), so that nothing dies half-way for a reason known at the start;
2. a Debian 13 *tools tree* is made under .build/tools with mmdebstrap. It holds mkosi and everything mkosi
   runs, so the versions on the build machine do not matter. Its packages come from the machine's own
   sources (aptsources.py);
3. mkosi builds the image out of mkosi.conf and image/, under .build/ only;
4. the packages that went in are compared with packages.lock (lock.py): a difference is said, and with
   --locked it is a failure;
5. beside the image: a zstd copy to publish, a block map to flash by, the package manifest, SHA256SUMS, and
   with --keys its signature (keys.py).

The hash of everything that goes in is kept beside the result: when nothing changed, nothing is built. Time
stamps are not looked at, a fresh clone with a copied .build/ is up to date.

Exit status: 0 built or up to date, 1 the build failed, 2 wrong usage, 3 the machine lacks something.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from image.aptsources import KEYRING, Source, SourcesError, debian_sources, transport_options
from image.keys import Keys, KeysError
from image.lock import LockError, compare, packages_of, read_lock, write_lock
from image.sbom import write_sbom

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / ".build"
TOOLS = BUILD / "tools"
RELEASE = "trixie"
LOCK = ROOT / "image/packages.lock"
ARCHIVES = BUILD / "cache/packages/cache/apt/archives"  # the .deb files of the last builds
MKOSI_VERSION = "25.3"  # later versions only warn about unknown settings, and renamed some of ours

# apt suggests far more; this is what mkosi 25 runs for this image, what flash.py needs, and an editor of
# ESPs (mtools).
TOOLS_PACKAGES = (
    *("apt", "bmap-tools", "ca-certificates", "cpio", "dosfstools", "e2fsprogs", "erofs-utils", "git-core"),
    *("kmod", "libcryptsetup12", "libtss2-rc0t64", "mkosi", "mtools", "openssh-client", "sbsigntool"),
    *("squashfs-tools", "systemd-boot-efi", "systemd-repart", "systemd-ukify", "xz-utils", "zstd"),
)

# What the image is made of. A test or a README may change without a new image.
INPUTS = (
    "mkosi.conf",
    "image/mkosi.*",
    "image/nic.sh",
    "image/slots.sh",
    "image/aptsources.py",
    "dataplane",
    "provision/agent",
)
IGNORED = re.compile(r"(^|/)(__pycache__|\.[^/]*)(/|$)|_test\.c$|\.md$")
FREE_BYTES_WANTED = 6 * 2**30
PROFILES = ("cloud", "generic")

EXIT_FAILED = 1
EXIT_NEEDS = 3


class BuildError(Exception):
    """One sentence for the operator, and the exit status it deserves."""

    def __init__(self, message: str, *, status: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Paths:
    """Where one profile keeps its results, and another version than mkosi.conf's (a test's) its own.
    Profiles do not share caches: mkosi would evict one for the other.
    """

    profile: str
    version: str = ""

    @property
    def output(self) -> Path:
        parts = ("image", *([self.profile] if self.profile != "cloud" else []), *filter(None, [self.version]))
        return BUILD / "-".join(parts)

    @property
    def image(self) -> Path:
        return self.output / f"gateway_{self.version or version()}.raw"

    @property
    def log(self) -> Path:
        return self.output / "build.log"

    @property
    def stamp(self) -> Path:
        return self.output / "inputs.json"


def say(message: str) -> None:
    print(f"image: {message}", flush=True)


def version() -> str:
    """ImageVersion= of mkosi.conf: the one place where the image's version is written."""
    match = re.search(r"^ImageVersion=(\S+)$", (ROOT / "mkosi.conf").read_text(), re.MULTILINE)
    if not match:
        raise BuildError("mkosi.conf: no ImageVersion= line; add one, such as ImageVersion=0.1.0")
    return match[1]


def image_path(profile: str = "cloud") -> Path:
    return Paths(profile).image


# --- needs ----------------------------------------------------------------------------------------


def check_needs() -> None:
    if os.geteuid() != 0:
        raise BuildError(
            "building an image needs root (it makes file systems with root's files); run: sudo make image",
            status=EXIT_NEEDS,
        )
    packages = {
        "mmdebstrap": "mmdebstrap",
        "apt-config": "apt",
        "zstd": "zstd",
        "/usr/bin/python3": "python3",
    }
    missing = sorted(package for program, package in packages.items() if not shutil.which(program))
    if not KEYRING.exists():
        missing.append("debian-archive-keyring")
    if missing:
        raise BuildError(f"missing tools; run: apt-get install -y {' '.join(missing)}", status=EXIT_NEEDS)
    BUILD.mkdir(exist_ok=True)
    free = shutil.disk_usage(BUILD).free
    if free < FREE_BYTES_WANTED:
        raise BuildError(
            f"{BUILD}: {free / 2**30:.1f} GiB free, the build needs {FREE_BYTES_WANTED / 2**30:.0f}; "
            "make room and repeat",
            status=EXIT_NEEDS,
        )


# --- running things -------------------------------------------------------------------------------


def run_logged(
    command: Sequence[str],
    log: Path,
    *,
    what: str,
    stages: re.Pattern[str] | None = None,
    env: dict[str, str] | None = None,
) -> None:
    """Run with all output in `log`; show the lines that `stages` matches with the time used; raise with the
    tail.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    tail: deque[str] = deque(maxlen=20)
    with log.open("a") as sink:
        sink.write(f"\n$ {' '.join(command)}\n")
        sink.flush()
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=ROOT,
            env=os.environ | (env or {}),
            stdin=subprocess.DEVNULL,
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    sink.write(line)
                    if line.strip():
                        tail.append(line.rstrip())
                    if stages and (match := stages.match(line)):
                        say(f"{time.monotonic() - start:5.0f} s  {match[1].strip()}")
            except BaseException:
                # Left by a KeyboardInterrupt, `with` would not wait for mkosi to take down its mounts.
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=60)
                raise
    if process.returncode != 0:
        lines = "\n".join(f"    {line}" for line in tail)
        raise BuildError(
            f"{what} failed with status {process.returncode}; the whole log is {log}; its end:\n{lines}"
        )


def tool(*argv: str, tree: Path = TOOLS) -> list[str]:
    """The command line of a program in the tools tree (or another), run in place with the tree's own
    libraries: no chroot, no mount.
    """
    libraries = tree / "usr/lib/x86_64-linux-gnu"
    loader = [
        str(tree / "lib64/ld-linux-x86-64.so.2"),
        "--library-path",
        f"{libraries}:{libraries / 'systemd'}",
    ]
    return [*loader, str(tree / "usr/bin" / argv[0]), *argv[1:]]


# --- the tools tree -------------------------------------------------------------------------------


def ensure_tools(log: Path) -> None:
    write_sandbox(debian_sources(RELEASE))
    ensure_tree(TOOLS, TOOLS_PACKAGES, log, holds="mkosi and what it runs")


def ensure_tree(top: Path, packages: Sequence[str], log: Path, *, holds: str) -> None:
    """Make a tree of Debian 13's programs unless it is there and was made from this very list."""
    sources = debian_sources(RELEASE)
    wanted = hashlib.sha256("\n".join([RELEASE, *packages]).encode()).hexdigest()
    stamp = top / "etc/dsnat-tools"
    if stamp.exists() and stamp.read_text().strip() == wanted:
        return
    say(f"making the tree {top.relative_to(ROOT)}: {holds}, from Debian 13")
    start = time.monotonic()
    fresh = BUILD / f"{top.name}.{os.getpid()}"
    command = ["mmdebstrap", "--variant=apt", "--mode=auto", "--architectures=amd64", f"--keyring={KEYRING}"]
    for option in ['Apt::Install-Recommends "false"', *(line.rstrip(";") for line in transport_options())]:
        command.append(f"--aptopt={option}")
    for unwanted in ("doc", "man", "locale"):
        command.append(f"--dpkgopt=path-exclude=/usr/share/{unwanted}/*")
    command += [f"--include={','.join(packages)}", RELEASE, str(fresh)]
    command += [line for source in sources for line in source.one_line()]
    try:
        run_logged(command, log, what=f"making {top.relative_to(ROOT)} (mmdebstrap)")
        (fresh / "etc/dsnat-tools").write_text(wanted + "\n")
        if top.exists():
            shutil.rmtree(top)
        fresh.rename(top)
    finally:
        if fresh.exists():
            shutil.rmtree(fresh, ignore_errors=True)
    say(f"{top.relative_to(ROOT)} made in {time.monotonic() - start:.0f} s")


def write_sandbox(sources: list[Source]) -> None:
    """Give mkosi our sources. Its own list would add a -debug suite that few mirrors carry, and the build
    would die.
    """
    apt = BUILD / "sandbox/etc/apt"
    (apt / "sources.list.d").mkdir(parents=True, exist_ok=True)
    (apt / "apt.conf.d").mkdir(exist_ok=True)
    (apt / "sources.list.d/mkosi.sources").write_text("\n".join(source.stanza() for source in sources))
    (apt / "apt.conf.d/90-machine").write_text("\n".join([*transport_options(), ""]))


# --- the image ------------------------------------------------------------------------------------


def input_files() -> Iterator[Path]:
    for pattern in INPUTS:
        for top in sorted(ROOT.glob(pattern)):
            for path in [top] if top.is_file() else sorted(top.rglob("*")):
                if (path.is_file() or path.is_symlink()) and not IGNORED.search(str(path.relative_to(ROOT))):
                    yield path


def inputs_hash(profile: str, more: str = "") -> str:
    """Content, names and execute bits of all that goes in. Not the packages: --force asks the archive
    again.
    """
    digest = hashlib.sha256(f"{profile}\n{RELEASE}\n{TOOLS_PACKAGES}\n{more}".encode())
    for path in input_files():
        digest.update(f"{path.relative_to(ROOT)} {os.access(path, os.X_OK)}\n".encode())
        digest.update(str(path.readlink()).encode() if path.is_symlink() else path.read_bytes())
    return digest.hexdigest()


def up_to_date(paths: Paths, wanted: str) -> bool:
    try:
        stamp = json.loads(paths.stamp.read_text())
    except (OSError, ValueError):
        return False
    return stamp.get("inputs") == wanted and all(
        (paths.output / name).exists() for name in stamp.get("files", ())
    )


def workspace() -> Path:
    """A folder of links where mkosi finds mkosi.images: it looks for them beside the first mkosi.conf only,
    and the top of the repository is not the place for them.
    """
    top = BUILD / "mkosi"
    top.mkdir(exist_ok=True)
    for name, target in {
        "mkosi.conf": "mkosi.conf",
        "image": "image",
        "mkosi.images": "image/mkosi.images",
    }.items():
        link = top / name
        if not link.is_symlink():
            link.symlink_to(Path("../..") / target)
    return top


def mkosi_command(paths: Paths, keys: Keys | None, *verb: str) -> list[str]:
    profile = paths.profile
    caches = BUILD / "cache" / profile
    packages = BUILD / "cache/packages"
    for folder in (paths.output, caches / "trees", caches / "build", packages):
        folder.mkdir(parents=True, exist_ok=True)
    return [
        "/usr/bin/python3",
        "-m",
        "mkosi",
        f"--directory={workspace()}",
        f"--tools-tree={TOOLS}",
        f"--build-sources={ROOT / 'dataplane'}:dataplane",
        f"--build-sources={ROOT / 'provision'}:provision",
        f"--sandbox-tree={BUILD / 'sandbox'}",
        f"--output-directory={paths.output}",
        f"--cache-directory={caches / 'trees'}",
        f"--build-dir={caches / 'build'}",
        f"--package-cache-dir={packages}",
        *(["--profile", profile] if profile != "cloud" else []),
        *([f"--image-version={paths.version}"] if paths.version else []),
        *([f"--extra-tree={BUILD / 'keys'}", *keys.mkosi_options()] if keys else []),
        *verb,
    ]


def mkosi_env() -> dict[str, str]:
    return {"PYTHONPATH": str(TOOLS / "usr/lib/python3/dist-packages"), "PYTHONDONTWRITEBYTECODE": "1"}


def run_mkosi(paths: Paths, keys: Keys | None, *, refresh: bool) -> None:
    stages = re.compile(r"^\S*‣ +(?:\x1b\[[0-9;]*m)*((?!Using|Loading|Unlinking|Removing|Copying).{4,90})")
    run_logged(
        mkosi_command(paths, keys, "-ff" if refresh else "-f", "build"),
        paths.log,
        what="mkosi",
        stages=stages,
        env=mkosi_env(),
    )
    # mkfs.fat says this and goes on; the firmware then sees no file system at all.
    if "less then suggested minimum" in paths.log.read_text(errors="replace"):
        raise BuildError(
            "the ESP is too small for FAT32, firmware would not read it; raise SizeMinBytes= in 00-esp.conf"
        )


@functools.cache
def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(paths: Paths, keys: Keys | None) -> list[str]:
    """Beside the image: what one downloads (zstd), flashes by (block map), and checks both with
    (SHA256SUMS and its signature).
    """
    image = paths.image
    subprocess.run(["zstd", "--quiet", "--force", "-6", "-T0", str(image), "-o", f"{image}.zst"], check=True)
    stem = image.name.removesuffix(".raw")
    # What an update sends, in one form only. systemd-sysupdate 257 would write zstd to the slot as it is.
    for part in paths.output.glob(f"{stem}.root-*.raw"):
        subprocess.run(["gzip", "--force", "--no-name", "-1", str(part)], check=True)
    subprocess.run(
        ["bmaptool", "--quiet", "create", "-o", str(image.with_suffix(".bmap")), str(image)], check=True
    )
    write_sbom(
        image.with_suffix(".manifest"), paths.version or version(), RELEASE, image.with_suffix(".cdx.json")
    )
    files = sorted(
        path
        for path in paths.output.iterdir()
        if path.is_file()
        and not path.is_symlink()
        and (path.name.startswith(stem) or path.suffix == ".debug")
    )
    sums = paths.output / "SHA256SUMS"
    sums.write_text("".join(f"{sha256(path)}  {path.name}\n" for path in files))
    signature = keys.sign(sums) if keys else None
    return [path.name for path in (*files, sums, *filter(None, [signature]))]


def clear_outputs(paths: Paths) -> None:
    """Split files carry the hash of their content in the name: those of the last build would be published
    again.
    """
    if paths.output.exists():
        for path in paths.output.iterdir():
            if (
                path.name.startswith(("gateway", "initrd", "SHA256SUMS", "inputs.json"))
                or path.suffix == ".debug"
            ):
                path.unlink()


def build(
    profile: str = "cloud",
    *,
    force: bool = False,
    version: str = "",
    keys: Keys | None = None,
    locked: bool = False,
) -> Path:
    """The image's path, built if anything that goes in has changed since the last time."""
    paths = Paths(profile, version)
    if keys:
        keys.check()
    wanted = inputs_hash(profile, f"{version} {keys.fingerprint() if keys else ''}".strip())
    image = paths.image
    if not force and up_to_date(paths, wanted):
        say(f"{image.relative_to(ROOT)} is up to date")
        return image
    check_needs()
    start = time.monotonic()
    paths.output.mkdir(parents=True, exist_ok=True)
    paths.log.write_text("")
    ensure_tools(paths.log)
    clear_outputs(paths)
    if keys:
        shutil.rmtree(BUILD / "keys", ignore_errors=True)
        (BUILD / "keys").mkdir()
        keys.public_tree(BUILD / "keys")
    run_mkosi(paths, keys, refresh=force)
    check_lock(paths, locked=locked)
    files = publish(paths, keys)
    seconds = round(time.monotonic() - start)
    paths.stamp.write_text(
        json.dumps({"inputs": wanted, "seconds": seconds, "files": files}, indent=1) + "\n"
    )
    size = Path(f"{image}.zst").stat().st_size
    say(f"built {image.relative_to(ROOT)} in {seconds} s; {size / 1e6:.0f} MB to download")
    return image


def check_lock(paths: Paths, *, locked: bool) -> None:
    """Are the packages those of packages.lock? Archives move on, so a difference stops a release only."""
    differences = compare(
        read_lock(LOCK), packages_of(paths.image.with_suffix(".manifest"), ARCHIVES), paths.profile
    )
    if not differences:
        say("every package is the one of image/packages.lock")
    elif locked:
        raise BuildError(
            "packages differ from image/packages.lock; build from an archive of its day, or look at what "
            "changed and run `make image-lock`:\n" + "\n".join(f"    {line}" for line in differences)
        )
    else:
        say(f"{len(differences)} packages differ from image/packages.lock, such as: {differences[0]}")


def a_version(text: str) -> str:
    """It becomes part of file names, boot entries and partition labels, which are short."""
    if re.fullmatch(r"[0-9][0-9A-Za-z.~-]{0,15}", text):
        return text
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a version such as 0.2.0: a digit, then letters, digits, . ~ and -, at most 16"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m image.build", description="Build the gateway image.")
    parser.add_argument(
        "--profile",
        choices=PROFILES,
        default="cloud",
        help="cloud: virtual machines; generic: hardware (larger kernel)",
    )
    parser.add_argument(
        "--force", action="store_true", help="build even if nothing changed, with the newest packages"
    )
    parser.add_argument(
        "--tools-only", action="store_true", help="only make the tools tree (make setup does this)"
    )
    parser.add_argument("--version", type=a_version, help="build as this version, into a folder of its own")
    parser.add_argument("--keys", type=Path, metavar="FOLDER", help="sign with these keys; see keys.py")
    parser.add_argument(
        "--locked", action="store_true", help="fail when a package is not the one of packages.lock"
    )
    parser.add_argument(
        "--lock", action="store_true", help="write the packages of the built image to packages.lock"
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback")
    options = parser.parse_args(arguments)
    try:
        if options.tools_only:
            check_needs()
            ensure_tools(BUILD / "tools.log")
        elif options.lock:
            image = build(options.profile)
            write_lock(
                LOCK, read_lock(LOCK), packages_of(image.with_suffix(".manifest"), ARCHIVES), options.profile
            )
            say(f"{LOCK.relative_to(ROOT)} is that of {image.name}; look at the difference and commit it")
        else:
            build(
                options.profile,
                force=options.force,
                version=options.version or "",
                keys=Keys(options.keys) if options.keys else None,
                locked=options.locked,
            )
    except KeyboardInterrupt:
        print("image: interrupted; nothing is left running, run it again", file=sys.stderr)
        return 130
    except (BuildError, SourcesError, KeysError, LockError) as error:
        if options.debug:
            raise
        print(f"image: {error}", file=sys.stderr)
        return error.status if isinstance(error, BuildError) else EXIT_NEEDS
    except (OSError, subprocess.SubprocessError) as error:  # a disk that fills up on the way
        if options.debug:
            raise
        print(f"image: {error}", file=sys.stderr)
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
