"""The Python door in an environment that has neither Ray nor anything else of the server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys

class Blocker:
    blocked = {"ray", "fastapi", "starlette", "uvicorn", "grpc", "google", "prometheus_client", "opentelemetry"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
from dspark import LLM, SamplingParams
assert "torch" not in sys.modules
with LLM(sys.argv[1], dtype="float32", kv_tokens=512, profile=False) as llm:
    (output,) = llm.generate([{"role": "user", "content": "hi"}], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
    assert [len(delta.token_ids) > 0 for delta in llm.stream("abc", SamplingParams(max_tokens=2, ignore_eos=True))]
print(len(output.token_ids))
from dspark.cli import main
sys.exit(main(["serve"]))
"""


def test_generating_needs_no_server_packages(tiny_folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tiny_folder)], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "4\n", done.stderr
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: dspark serve needs ray: pip install 'dspark-serve[serve]'")
