"""One batch of every method: each row gets, token for token, what its adapter gives it alone.

The adapters are those that our training methods make, and alone they are served by PEFT.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.worker.inference.engine.test_runner import greedy
from tests.worker.inference.test_own_model import write_adapter
from tests.worker.inference.tiny import collect, submit, tiny_llama
from worker.inference.engine.engine import BatchingEngine, Request
from worker.inference.engine.params import Sampling
from worker.inference.engine.pool import AdapterLease
from worker.inference.engine.wrapped import rms_epsilon

# peft 0.21.2 reads an attribute that transformers 5.24 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

N_TOKENS = 8
PROMPTS = [tuple(range(40, 60)), (7,)]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "r": 4},
    "dora": {"type": "lora", "r": 8, "use_dora": True},
    "ia3": {"type": "ia3"},
    "houlsby": {"type": "houlsby", "r": 4},
    "pfeiffer": {"type": "houlsby", "r": 12, "placement": "pfeiffer", "activation": "relu"},
    "adamix": {"type": "adamix", "r": 6, "experts": 3},
    "meft1": {"type": "meft", "r": 4, "lambda_bits": 3},
    "meft2": {"type": "meft", "r": 8, "lambda_bits": 7, "variant": "meft2"},
    "meft3": {"type": "meft", "r": 4, "lambda_bits": 2, "variant": "meft3"},
}


def test_a_batch_of_every_method_gives_each_row_what_it_gets_alone(tmp_path: Path) -> None:
    """Each method on every family, by its logits: ``tests/worker/training/test_methods.py``."""
    model = tiny_llama(hidden_size=32, intermediate_size=48, num_hidden_layers=3)

    def fresh() -> Any:
        return copy.deepcopy(model)

    expected = {("base", prompt): greedy(fresh(), prompt) for prompt in PROMPTS}
    for seed, (name, peft) in enumerate(METHODS.items()):
        write_adapter(tmp_path / name, peft, seed, fresh())
        alone = PeftModel.from_pretrained(fresh(), str(tmp_path / name)).eval()
        expected |= {(name, prompt): greedy(alone, prompt) for prompt in PROMPTS}
    for prompt in PROMPTS:
        answers = {tuple(expected[name, prompt]) for name in ("base", *METHODS)}
        assert len(answers) == 1 + len(METHODS), "two of them say the same"

    def spell(ids: Any) -> str:
        return "".join(chr(256 + i) for i in ids)

    engine = BatchingEngine(fresh(), spell, [])
    leases: dict[str, AdapterLease | None] = {"base": None}
    for name in METHODS:
        leases[name] = engine.load(name, tmp_path / name)
    sampling = Sampling(N_TOKENS, temperature=0)
    streams = {
        (name, prompt): submit(engine, Request(prompt, sampling, lease=leases[name]))
        for name, prompt in expected
    }
    found = {key: [ord(c) - 256 for c in collect(stream)[0]] for key, stream in streams.items()}
    engine.close()
    assert found == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_that_loops_compute_are_known_by_trying_them(dtype: torch.dtype) -> None:
    def drawn(norm: torch.nn.Module) -> torch.nn.Module:
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter)
        return norm.to(dtype).requires_grad_(False)

    assert rms_epsilon(drawn(LlamaRMSNorm(24, 1e-5))) == 1e-5
    assert rms_epsilon(drawn(torch.nn.RMSNorm(24, 1e-6))) == 1e-6
    assert rms_epsilon(drawn(GemmaRMSNorm(24))) is None, "its weights are off by one"
    assert rms_epsilon(drawn(torch.nn.LayerNorm(24, bias=False))) is None, "it centres"
    assert rms_epsilon(drawn(torch.nn.RMSNorm(24))) is None, "its epsilon is that of its dtype"
    assert rms_epsilon(LlamaRMSNorm(24).half()) is None
