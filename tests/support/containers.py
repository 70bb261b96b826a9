"""A Containerfile's steps without a container engine: each in a chroot with mounts of its own, an overlay per stage."""

import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# A stage gets copies of what this machine reaches package servers by. Nothing of this machine that could be written to
# is mounted: a step of apt-get would write there.
BUNDLE = Path(os.environ.get("PIP_CERT", "/etc/ssl/certs/ca-certificates.crt"))
PASSED_ON = ("PIP_DEFAULT_TIMEOUT", "http_proxy", "https_proxy", "no_proxy")
DEVICES = ("null", "zero", "random", "urandom")


def instructions(path: Path) -> list[tuple[str, str]]:
    """Return a Containerfile's instructions and what they say, on one line each."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.strip().partition(" ") for line in lines) if name]


@dataclass
class Stage:
    """A stage as it was built, and how it runs.

    Attributes:
        layer: a folder of what the steps changed of `base`.
        settings: the last of each instruction that sets one, such as "USER".
    """

    layer: Path
    base: Path
    environment: dict[str, str] = field(
        default_factory=lambda: {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
    )
    settings: dict[str, str] = field(default_factory=dict)

    def command(self, command: list[str], *, as_it_runs: bool = False, also: str = "") -> list[str]:
        """Return the command line that runs a command in this stage.

        Args:
            command: to run.
            as_it_runs: as its user without capabilities, its root read-only but for /tmp, and nothing of this machine.
            also: what else the shell does when all is mounted; $root is the stage.
        """
        root, upper, work = (self.layer / name for name in ("root", "upper", "work"))
        for folder in (root, upper, work):
            folder.mkdir(parents=True, exist_ok=True)
        script = [
            "set -e",
            f"root={shlex.quote(str(root))}",
            f"mount -t overlay overlay -o lowerdir={self.base},upperdir={upper},workdir={work} $root",
            "mount -t proc -o ro proc $root/proc",
            "mount -t tmpfs tmpfs $root/dev",
            *(f"touch $root/dev/{one}; mount --bind /dev/{one} $root/dev/{one}" for one in DEVICES),
        ]
        environment = dict(self.environment)
        if as_it_runs:
            uid, _, gid = self.settings["USER"].partition(":")
            script += ["mount -o remount,ro $root", "mount -t tmpfs tmpfs $root/tmp"]
            user = [f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--bounding-set=-all", "--no-new-privs"]
            command = ["setpriv", *user, *command]
        else:
            script += [
                "mount -t tmpfs tmpfs $root/run",
                f"cp {BUNDLE} $root/run/bundle.crt",
                "cp --remove-destination /etc/resolv.conf $root/etc/resolv.conf",
            ]
            environment |= {name: os.environ[name] for name in PASSED_ON if name in os.environ}
            environment["PIP_CERT"] = "/run/bundle.crt"
        inner = shlex.join(["env", "-i", *(f"{name}={value}" for name, value in environment.items()), *command])
        script += [also, f"exec chroot $root {inner}"]
        return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", "\n".join(script)]

    def run(self, command: list[str], **options: Any) -> None:
        done = subprocess.run(self.command(command, **options), capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def build(containerfile: Path, context: Path, base: Path, folder: Path, *, packages: bool) -> Stage:
    """Run a Containerfile's steps; return its last stage.

    Args:
        containerfile: whose steps they are.
        context: a folder with the files that it copies.
        base: a root folder, which stands for all images that it starts from; it isn't changed.
        folder: where stages are kept.
        packages: run the steps of apt-get too; else `base` has what they install.
    """
    stages: dict[str, Stage] = {}
    arguments: dict[str, str] = {}
    stage = None
    for name, rest in instructions(containerfile):
        if name == "FROM":
            alias = rest.partition(" AS ")[2] or "last"
            stage = stages[alias] = Stage(folder / alias, base)
        elif name == "ARG":
            key, _, value = rest.partition("=")
            arguments[key] = value
        elif name == "RUN" and (packages or not rest.startswith("apt-get")):
            stage.environment |= arguments
            stage.run(["sh", "-c", rest])
            for key in arguments:
                del stage.environment[key]
        elif name == "COPY":
            *flags, source, target = rest.split()
            if flags:
                other = stages[flags[0].removeprefix("--from=")]
                came = f"{other.layer}/upper{source}"  # what that stage made, and not its image
            else:
                (found,) = context.glob(source)
                came = str(found)
            stage.run(
                ["true"], also=f"mkdir -p $root{Path(target).parent if flags else target}; cp -a {came} $root{target}"
            )
        elif name == "ENV":
            stage.environment |= dict(one.split("=", 1) for one in shlex.split(rest))
        else:
            stage.settings[name] = rest
    return stage


def healthcheck(stage: Stage) -> list[str]:
    """Return the command that looks whether a stage is well."""
    return json.loads(stage.settings["HEALTHCHECK"].partition("CMD ")[2])


def debian(folder: Path) -> Path:
    """Return a root folder with a minimal Debian, as images named slim are."""
    suite = re.search(r"^VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text(), re.MULTILINE)[1]
    subprocess.run(["debootstrap", "--variant=minbase", suite, folder], check=True, capture_output=True)
    shutil.rmtree(folder / "var/cache/apt/archives", ignore_errors=True)
    return folder
