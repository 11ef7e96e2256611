"""The README's example of the `openai` SDK, run as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.flow.conftest import Up, first_rows

README = Path(__file__).parents[2] / "README.md"


def test_the_sdk_example_of_the_readme_runs(up: Up, tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    first_rows(tmp_path / "my-data.jsonl", 16)
    environment = os.environ | {"OPENAI_BASE_URL": f"{up.url}/v1", "OPENAI_API_KEY": up.key}
    result = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=880,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "The job has successfully completed" in result.stdout
    assert result.stdout.splitlines()[-1].strip() != ""
