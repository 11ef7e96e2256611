"""The page's scripts: their pure part, and that they can do nothing that /v1 cannot."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi.routing import APIRoute

from api.app import create_app
from api.ui import frame, pages
from models.settings import Settings

HERE = Path(__file__).parent
SCRIPTS = sorted((frame.HERE / "static" / "js").glob("*.js"))
TEMPLATES = sorted((frame.HERE / "templates").glob("*.html"))


def test_the_pure_functions() -> None:
    beside_python = str(Path(sys.executable).parent)
    node = shutil.which("node") or shutil.which("node", path=beside_python)
    assert node is not None, "the set-up of the page brings Node where there is none"
    done = subprocess.run(
        [node, "--test", str(HERE / "test_lib.mjs")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_every_call_of_a_script_is_a_route_of_the_api() -> None:
    described = create_app(Settings()).openapi()["paths"]
    known = {(method.upper(), path) for path, methods in described.items() for method in methods}
    called = set()
    for script in SCRIPTS:
        text = script.read_text()
        for method, path in re.findall(
            r'(?:call|send|open)\(\s*"([A-Z]+)",\s*[`"](?:\$\{root\})?(/v1/[^`"?]*)', text
        ):
            called.add((method, path))
        for path in re.findall(r"(?:EventSource|fetch)\(`\$\{root\}(/v1/[^`?]*)", text):
            called.add(("GET", path))
    assert len(called) >= 8
    for method, path in called:
        # A variable in the path is one part of a route: an id, or the name of an action.
        part = r"(?:\{[^/]+\}|[a-z_]+)"
        pattern = part.join(re.escape(each) for each in re.split(r"\$\{[^}]*\}", path))
        matching = [each for verb, each in known if verb == method and re.fullmatch(pattern, each)]
        assert matching, f"{method} {path}"


def test_scripts_and_templates_keep_to_the_policy() -> None:
    for script in SCRIPTS:
        text = script.read_text()
        assert text.startswith("// @ts-check"), script.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|eval\(|new Function", text)
        assert not re.search(r"https?://", text.replace("http://www.w3.org/2000/svg", ""))
    for template in TEMPLATES:
        text = template.read_text()
        assert not re.search(r"\son[a-z]+=|\sstyle=|javascript:", text), template.name
        assert "|safe" not in text.replace(" ", ""), template.name
        for script in re.findall(r"<script(?![^>]*(?:src=|application/json))[^>]*>", text):
            pytest.fail(f"inline script in {template.name}: {script}")


def test_pages_only_read() -> None:
    """Every change is a call of /v1; the page's own routes but logging in and out are GET."""
    own = [each for each in pages.router.routes if isinstance(each, APIRoute)]
    changing = {each.path for each in own if each.methods != {"GET"}}
    assert changing == {"/ui/session", "/ui/logout"}
